#include "filter.h"

#include <errno.h>
#include <linux/audit.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#define OUR_ARCH AUDIT_ARCH_X86_64
#else
#define OUR_ARCH AUDIT_ARCH_AARCH64
#endif

static int digit(char c) {
    return c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

int filter_parse(const char *hex, struct sock_fprog *out) {
    size_t size = strlen(hex) / 2, each = sizeof(struct sock_filter);
    *out = (struct sock_fprog){0};
    errno = EINVAL;
    if (strlen(hex) % 2 || size == 0 || size % each || size / each > BPF_MAXINSNS)
        return -1;
    uint8_t *bytes = malloc(size);
    if (!bytes)
        return -1;
    for (size_t i = 0; i < size; i++) {
        int high = digit(hex[2 * i]), low = digit(hex[2 * i + 1]);
        if (high < 0 || low < 0) {
            free(bytes);
            errno = EINVAL;
            return -1;
        }
        bytes[i] = (uint8_t)(high << 4 | low);
    }
    *out = (struct sock_fprog){.len = (unsigned short)(size / each), .filter = (void *)bytes};
    return 0;
}

/* What is known of the accumulator before an instruction. */
struct before {
    bool reached, known;
    uint32_t value;
};

static bool jumps(const struct sock_filter *i, uint32_t value) {
    switch (BPF_OP(i->code)) {
    case BPF_JEQ:
        return value == i->k;
    case BPF_JGT:
        return value > i->k;
    case BPF_JGE:
        return value >= i->k;
    default:
        return value & i->k;
    }
}

static struct before after(const struct sock_filter *i, struct before b, int nr) {
    switch (BPF_CLASS(i->code)) {
    case BPF_LD:
        b.known = i->code == (BPF_LD | BPF_W | BPF_ABS) && (i->k == offsetof(struct seccomp_data, nr) || i->k == offsetof(struct seccomp_data, arch));
        b.value = i->k == offsetof(struct seccomp_data, nr) ? (uint32_t)nr : OUR_ARCH;
        break;
    case BPF_ALU:
    case BPF_MISC:
        b.known = false;
    }
    return b;
}

/* false: there is no such instruction. */
static bool reach(struct before *at, size_t len, size_t to, struct before b) {
    if (to >= len)
        return false;
    if (at[to].reached && (!b.known || b.value != at[to].value))
        b.known = false;
    b.known &= !at[to].reached || at[to].known;
    at[to] = b;
    return true;
}

/* Jumps only lead forward, so one pass sees every way to an instruction before the instruction itself. */
bool filter_lets(const struct sock_fprog *f, int nr) {
    struct before at[BPF_MAXINSNS];
    memset(at, 0, f->len * sizeof *at); /* len is at most BPF_MAXINSNS: filter_parse */
    at[0].reached = true;
    for (size_t n = 0; n < f->len; n++) {
        const struct sock_filter *i = &f->filter[n];
        struct before b = at[n];
        if (!b.reached)
            continue;
        if (BPF_CLASS(i->code) == BPF_RET) {
            if (i->code != (BPF_RET | BPF_K) || i->k != SECCOMP_RET_ALLOW)
                return false;
        } else if (BPF_CLASS(i->code) != BPF_JMP) {
            if (!reach(at, f->len, n + 1, after(i, b, nr)))
                return false;
        } else if (BPF_OP(i->code) == BPF_JA) {
            if (!reach(at, f->len, n + 1 + i->k, b))
                return false;
        } else {
            bool known = b.known && BPF_SRC(i->code) == BPF_K, jump = known && jumps(i, b.value);
            if ((!known || jump) && !reach(at, f->len, n + 1 + i->jt, b))
                return false;
            if ((!known || !jump) && !reach(at, f->len, n + 1 + i->jf, b))
                return false;
        }
    }
    return f->len > 0;
}
