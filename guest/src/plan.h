/* Plans: flat lists of operations, each a list of words (PROTOCOL.md, "Plans").
 *
 * A plan comes from the library that started us, not from a guest, but it is checked whole before its
 * first operation runs: every operation known, enough words, and the kinds in their order. */
#ifndef TVINIT_PLAN_H
#define TVINIT_PLAN_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { PLAN_MAX = 1 << 20 };

struct op {
    char **words; /* NULL-terminated; words[0] is the operation */
    size_t count; /* at least 1 */
};

struct plan {
    struct op *ops;
    size_t count;
};

struct reader;

/* Read u32 count, then that many lists of words, none empty. False if they are malformed: the reader is bad then, and
 * there is nothing to free. */
bool plan_take(struct reader *r, struct plan *out);

/* Decode a plan. False if it is malformed, with nothing to free. */
bool plan_decode(const void *data, size_t size, struct plan *out);

/* Read a plan from fd to its end and decode it. False with errno set (EPROTO: malformed, EFBIG: too big). */
bool plan_read(int fd, struct plan *out);

void plan_free(struct plan *p);

/* Overwrite every word of what plan_read gave last: its places are the host's, and we become somebody else's PID 1. */
void plan_forget(void);

/* Check the operations of one process. Returns NULL, or what is wrong, in a static buffer. */
const char *plan_check_launch(const struct op *ops, size_t count);

/* A decimal number within [low, high], and nothing else. */
bool plan_number(const char *word, long long low, long long high, long long *out);

#endif
