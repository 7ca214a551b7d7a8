/* Tracees: who they are, their registers, their memory. */
#include <elf.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/uio.h>
#include <sys/user.h>
#include <unistd.h>

#include "tracer.h"

enum { BUCKETS = 1024, PAGE = 4096, NEW_AUXV_MAX = 64, STACK_WORDS_MAX = 1 << 18 };

static struct tracee *buckets[BUCKETS];

static struct tracee **place(pid_t tid) {
    struct tracee **at = &buckets[(unsigned)tid % BUCKETS];
    while (*at && (*at)->tid != tid)
        at = &(*at)->next;
    return at;
}

struct tracee *tracee_of(pid_t tid) { return *place(tid); }

struct tracee *tracee_add(pid_t tid, pid_t tgid) {
    struct tracee *t = calloc(1, sizeof *t);
    if (t) {
        t->tid = tid;
        t->tgid = tgid;
        *place(tid) = t;
    }
    return t;
}

static struct tracee *take_out(pid_t tid) {
    struct tracee **at = place(tid), *t = *at;
    if (t)
        *at = t->next;
    return t;
}

void tracee_drop(pid_t tid) {
    struct tracee *t = take_out(tid);
    if (t)
        writer_free(&t->data);
    free(t);
}

struct tracee *tracee_moves(pid_t from, pid_t to) {
    struct tracee *t = take_out(from);
    tracee_drop(to);
    if (!t)
        return tracee_add(to, to);
    t->tid = t->tgid = to;
    t->next = NULL;
    *place(to) = t;
    return t;
}

/* ---- registers ---- */

#if defined __x86_64__
typedef struct user_regs_struct registers;
#define REG_RESULT(r) ((int64_t)(r).rax)
#define REG_SP(r) ((r).rsp)
static void registers_call(const registers *r, struct stopped *s) {
    const uint64_t args[6] = {r->rdi, r->rsi, r->rdx, r->r10, r->r8, r->r9};
    memcpy(s->args, args, sizeof args);
    s->nr = r->orig_rax;
}
#elif defined __aarch64__
typedef struct user_regs_struct registers;
#define REG_RESULT(r) ((int64_t)(r).regs[0])
#define REG_SP(r) ((r).sp)
static void registers_call(const registers *r, struct stopped *s) {
    memcpy(s->args, r->regs, sizeof s->args);
    s->nr = r->regs[8];
}
#else
#error "no registers are known for this architecture"
#endif

static bool registers_get(pid_t tid, registers *r) {
    struct iovec part = {r, sizeof *r};
    return ptrace(PTRACE_GETREGSET, tid, (void *)NT_PRSTATUS, &part) == 0;
}

static bool info_missing; /* PTRACE_GET_SYSCALL_INFO: Linux 5.3, not in gVisor */

bool stopped_filter_first(void) { return info_missing; }

static bool info_read(pid_t tid, struct stopped *s) {
    struct __ptrace_syscall_info i;
    memset(&i, 0, sizeof i);
    if (ptrace((enum __ptrace_request)PTRACE_GET_SYSCALL_INFO, tid, (void *)sizeof i, &i) < 0) {
        info_missing |= errno == EIO || errno == EINVAL;
        return false;
    }
    s->sp = i.stack_pointer;
    s->at = STOP_UNKNOWN;
    if (i.op == PTRACE_SYSCALL_INFO_EXIT) {
        s->at = STOP_EXIT;
        s->result = i.exit.rval;
    } else if (i.op == PTRACE_SYSCALL_INFO_ENTRY || i.op == PTRACE_SYSCALL_INFO_SECCOMP) {
        /* Both begin with number and arguments. */
        s->at = i.op == PTRACE_SYSCALL_INFO_ENTRY ? STOP_ENTRY : STOP_FILTER;
        s->nr = i.entry.nr;
        for (int n = 0; n < 6; n++)
            s->args[n] = i.entry.args[n];
        s->data = i.op == PTRACE_SYSCALL_INFO_SECCOMP ? i.seccomp.ret_data : 0;
    }
    return true;
}

bool stopped_read(pid_t tid, struct stopped *s) {
    *s = (struct stopped){0};
    if (!info_missing && info_read(tid, s) && s->at != STOP_UNKNOWN)
        return true;
    registers r;
    unsigned long data = 0;
    if (!registers_get(tid, &r))
        return false;
    registers_call(&r, s);
    s->result = REG_RESULT(r);
    s->sp = REG_SP(r);
    if (info_missing && ptrace(PTRACE_GETEVENTMSG, tid, NULL, &data) == 0)
        s->data = (uint32_t)data & 0xffff;
    return true;
}

bool stopped_refuse(pid_t tid, int error) {
    registers r;
    if (!registers_get(tid, &r))
        return false;
#if defined __x86_64__
    r.orig_rax = (unsigned long long)-1;
    r.rax = (unsigned long long)-error;
#else
    int none = -1;
    struct iovec number = {&none, sizeof none};
    r.regs[0] = (unsigned long long)-error;
    if (ptrace(PTRACE_SETREGSET, tid, (void *)NT_ARM_SYSTEM_CALL, &number) < 0)
        return false;
#endif
    struct iovec part = {&r, sizeof r};
    return ptrace(PTRACE_SETREGSET, tid, (void *)NT_PRSTATUS, &part) == 0;
}

/* ---- memory ---- */

/* Word by word: what is left for a tracee of another user, where we have no CAP_SYS_PTRACE but are its tracer. */
static size_t peek(pid_t tid, uint64_t from, uint8_t *to, size_t size) {
    size_t done = 0;
    while (done < size) {
        uint64_t at = from + done, skip = at % sizeof(long);
        errno = 0;
        long word = ptrace(PTRACE_PEEKDATA, tid, (void *)(uintptr_t)(at - skip), NULL);
        if (errno)
            break;
        size_t n = sizeof word - skip;
        if (n > size - done)
            n = size - done;
        memcpy(to + done, (uint8_t *)&word + skip, n);
        done += n;
    }
    return done;
}

size_t tracee_read(pid_t tid, uint64_t from, void *to, size_t size) {
    size_t done = 0;
    while (done < size) {
        /* Page by page: a copy ends where mapped memory does, and says how far it came. */
        size_t n = PAGE - (from + done) % PAGE;
        if (n > size - done)
            n = size - done;
        struct iovec ours = {(uint8_t *)to + done, n}, theirs = {(void *)(uintptr_t)(from + done), n};
        ssize_t got = process_vm_readv(tid, &ours, 1, &theirs, 1, 0);
        if (got < 0 && (errno == EPERM || errno == ENOSYS))
            return done + peek(tid, from + done, (uint8_t *)to + done, size - done);
        if (got <= 0)
            break;
        done += (size_t)got;
    }
    return done;
}

bool tracee_write_word(pid_t tid, uint64_t to, uint64_t word) {
    return ptrace(PTRACE_POKEDATA, tid, (void *)(uintptr_t)to, (void *)(uintptr_t)word) == 0;
}

/* The words at `*at` up to and with the first zero are passed over. */
static bool skip_list(pid_t tid, uint64_t *at) {
    uint64_t words[64];
    for (int left = STACK_WORDS_MAX; left > 0;) {
        size_t n = tracee_read(tid, *at, words, sizeof words) / sizeof *words;
        if (n == 0)
            return false;
        for (size_t i = 0; i < n; i++, left--) {
            *at += sizeof *words;
            if (words[i] == 0)
                return true;
        }
    }
    return false;
}

void tracee_hide_vdso(pid_t tid, uint64_t sp) {
    /* A new program's stack: argc, argv, NULL, environment, NULL, pairs of the auxiliary vector. */
    uint64_t at = sp + 8, pair[2];
    if (!skip_list(tid, &at) || !skip_list(tid, &at))
        return;
    for (int i = 0; i < NEW_AUXV_MAX && tracee_read(tid, at, pair, sizeof pair) == sizeof pair; i++, at += sizeof pair) {
        if (pair[0] == AT_NULL)
            return;
        if (pair[0] == AT_SYSINFO_EHDR)
            tracee_write_word(tid, at, AT_IGNORE);
    }
}
