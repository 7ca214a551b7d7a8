/* A firmware of 64 KiB that asks one question: does this accelerator run a guest, and at speed?
 *
 * From the reset vector to protected mode, to paging, through a while of arithmetic, fresh pages and
 * address-space switches (what a half-working hypervisor is slow or wrong at), then out to QEMU's
 * isa-debug-exit. The value written is 0x10 if the arithmetic came out right, so QEMU's status is 33.
 * The image is seen at 0xf0000, below the 4 GiB alias that the processor starts in. */

#define AT(label) (label - start + 0xf0000)
#define PAGES 0x1000
#define SCRATCH 0x400000
#define EXIT_PORT 0xf4
#define EXPECTED 0x27057501

    .text
    .globl start
start:
    .code16
real:
    cli
    xorw %ax, %ax
    movw %ax, %ds
    movw $0xf000, %ax
    movw %ax, %ds
    lgdtl gdt_pointer - start
    movl %cr0, %eax
    orl $1, %eax
    movl %eax, %cr0
    ljmpl $8, $AT(protected)

    .code32
protected:
    movl $16, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    movl $0x7000, %esp

    /* 4 MiB pages, all of the address space onto itself */
    movl $PAGES, %edi
    movl $0x83, %eax
1:  movl %eax, (%edi)
    addl $4, %edi
    addl $0x400000, %eax
    cmpl $PAGES + 0x1000, %edi
    jne 1b
    movl %cr4, %eax
    orl $0x10, %eax
    movl %eax, %cr4
    movl $PAGES, %eax
    movl %eax, %cr3
    movl %cr0, %eax
    orl $0x80000000, %eax
    movl %eax, %cr0
    jmp 2f
2:
    /* fresh pages: 16 MiB of them */
    movl $SCRATCH, %edi
    movl $4096, %ecx
3:  movl %ecx, (%edi)
    addl $4096, %edi
    loop 3b

    /* address-space switches */
    movl $2000, %ecx
4:  movl %cr3, %eax
    movl %eax, %cr3
    movl SCRATCH, %ebx
    loop 4b

    /* arithmetic: x = x * 1664525 + 1013904223, 20 million times, from 1 */
    movl $1, %eax
    movl $20000000, %ecx
5:  imull $1664525, %eax, %eax
    addl $1013904223, %eax
    decl %ecx
    jnz 5b

    movl $0x10, %ebx
    cmpl $EXPECTED, %eax
    je 6f
    movl $0x20, %ebx
6:  cmpl $4096, SCRATCH
    je 7f
    movl $0x30, %ebx
7:  movl %ebx, %eax
    movw $EXIT_PORT, %dx
    outl %eax, %dx
8:  hlt
    jmp 8b

    .balign 8
gdt:
    .quad 0
    .quad 0x00cf9b000000ffff
    .quad 0x00cf93000000ffff
gdt_pointer:
    .word gdt_pointer - gdt - 1
    .long AT(gdt)

    .org 0xfff0
    .code16
reset:
    .byte 0xea /* ljmpw: to the image below 1 MiB */
    .word real - start, 0xf000
    .org 0x10000
