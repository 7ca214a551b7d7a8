/* A queue of bytes: appended at one end, taken at the other. Holds no memory while it is empty and was big. */
#ifndef TVINIT_BYTES_H
#define TVINIT_BYTES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct bytes {
    uint8_t *data;
    size_t start, used, size; /* data[start .. start + used) is queued */
};

static inline const uint8_t *bytes_head(const struct bytes *b) { return b->data + b->start; }

/* Room for n more at the end, or NULL if memory is out; bytes_added() then makes them part of the queue. */
uint8_t *bytes_room(struct bytes *b, size_t n);
void bytes_added(struct bytes *b, size_t n);
bool bytes_append(struct bytes *b, const void *data, size_t n);
void bytes_take(struct bytes *b, size_t n);
void bytes_clear(struct bytes *b);

#endif
