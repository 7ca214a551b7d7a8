/* STEPS: what a host asks of PID 1 to make a running kernel into this machine (PROTOCOL.md, "Steps").
 *
 * They are carried out at once, in order, while nothing else is done: they change what commands stand on. Each has a
 * bound on its time. */
#ifndef TVINIT_STEPS_H
#define TVINIT_STEPS_H

#include <stdbool.h>
#include <stddef.h>

#include "frame.h"

enum { STEPS_MAX = 256 };

struct steps {
    char **list[STEPS_MAX]; /* each NULL-terminated and of at least one word */
    size_t count;
};

bool steps_decode(const void *data, size_t size, struct steps *out);
void steps_free(struct steps *s);

/* Check that every step is known and has as many words as it needs. The number of the first that is not, or 0. */
size_t steps_check(const struct steps *s);

/* Carry out a STEPS frame and queue OK or ERROR. */
void steps_frame(const struct frame *f);

/* Run the machine's hooks. 0 or errno. */
int steps_hooks(void);

#endif
