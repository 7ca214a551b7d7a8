#include "frame.h"

#include <string.h>

uint32_t get_u32(const uint8_t *p) {
    return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

void put_u32(uint8_t *p, uint32_t v) {
    for (int i = 0; i < 4; i++)
        p[i] = (uint8_t)(v >> 8 * i);
}

void frame_header(uint8_t out[FRAME_HEADER], uint8_t type, uint32_t stream, uint32_t length) {
    out[0] = FRAME_MAGIC;
    out[1] = type;
    out[2] = out[3] = 0;
    put_u32(out + 4, length);
    put_u32(out + 8, stream);
}

/* Move up to `want - p->used` bytes into the buffer; say whether it now holds `want`. */
static int fill(struct parser *p, size_t want, const uint8_t **data, size_t *size) {
    size_t n = want - p->used;
    if (n > *size)
        n = *size;
    memcpy(p->buffer + p->used, *data, n);
    p->used += n;
    *data += n;
    *size -= n;
    return p->used == want;
}

enum parse parser_feed(struct parser *p, const uint8_t **data, size_t *size, struct frame *out) {
    while (p->used == 0 && *size > 0 && **data == 0) {
        ++*data;
        --*size;
    }
    if (*size == 0)
        return PARSE_MORE;
    if (p->used < FRAME_HEADER) {
        int whole = fill(p, FRAME_HEADER, data, size);
        if (p->buffer[0] != FRAME_MAGIC)
            return PARSE_BAD;
        if (!whole)
            return PARSE_MORE;
    }
    uint32_t length = get_u32(p->buffer + 4);
    if (length > FRAME_MAX || p->buffer[2] || p->buffer[3])
        return PARSE_BAD;
    if (!fill(p, FRAME_HEADER + length, data, size))
        return PARSE_MORE;
    *out = (struct frame){.type = p->buffer[1],
                          .stream = get_u32(p->buffer + 8),
                          .length = length,
                          .payload = p->buffer + FRAME_HEADER};
    p->used = 0;
    return PARSE_FRAME;
}
