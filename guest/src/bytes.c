#include "bytes.h"

#include <stdlib.h>
#include <string.h>

enum { KEEP = 16 * 1024 };

uint8_t *bytes_room(struct bytes *b, size_t n) {
    if (b->size - b->start - b->used >= n && b->data)
        return b->data + b->start + b->used;
    if (b->data && b->size - b->used >= n && b->start >= b->used) {
        memcpy(b->data, b->data + b->start, b->used);
        b->start = 0;
        return b->data + b->used;
    }
    size_t want = b->size ? b->size : 256;
    while (want - b->used < n) {
        if (want > SIZE_MAX / 2)
            return NULL;
        want *= 2;
    }
    uint8_t *grown = malloc(want);
    if (!grown)
        return NULL;
    if (b->used)
        memcpy(grown, b->data + b->start, b->used);
    free(b->data);
    *b = (struct bytes){.data = grown, .used = b->used, .size = want};
    return grown + b->used;
}

void bytes_added(struct bytes *b, size_t n) { b->used += n; }

bool bytes_append(struct bytes *b, const void *data, size_t n) {
    uint8_t *at = bytes_room(b, n);
    if (!at)
        return false;
    if (n)
        memcpy(at, data, n);
    b->used += n;
    return true;
}

void bytes_take(struct bytes *b, size_t n) {
    b->start += n;
    b->used -= n;
    if (b->used == 0) {
        b->start = 0;
        if (b->size > KEEP)
            bytes_clear(b);
    }
}

void bytes_clear(struct bytes *b) {
    free(b->data);
    *b = (struct bytes){0};
}
