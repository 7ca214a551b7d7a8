#include "wire.h"

#include <stdlib.h>
#include <string.h>

struct reader reader_of(const void *data, size_t size) {
    return (struct reader){.at = data, .left = size};
}

const uint8_t *read_bytes(struct reader *r, size_t size) {
    if (r->bad || size > r->left) {
        r->bad = true;
        return NULL;
    }
    const uint8_t *at = r->at;
    r->at += size;
    r->left -= size;
    return at;
}

static uint64_t read_number(struct reader *r, size_t size) {
    const uint8_t *p = read_bytes(r, size);
    uint64_t v = 0;
    for (size_t i = 0; p && i < size; i++)
        v |= (uint64_t)p[i] << 8 * i;
    return v;
}

uint8_t read_u8(struct reader *r) { return (uint8_t)read_number(r, 1); }
uint16_t read_u16(struct reader *r) { return (uint16_t)read_number(r, 2); }
uint32_t read_u32(struct reader *r) { return (uint32_t)read_number(r, 4); }
uint64_t read_u64(struct reader *r) { return read_number(r, 8); }

char *read_string(struct reader *r) {
    uint32_t size = read_u32(r);
    const uint8_t *p = read_bytes(r, size);
    char *s = NULL;
    if (!p || (size && memchr(p, 0, size)) || !(s = malloc((size_t)size + 1))) {
        r->bad = true;
        return NULL;
    }
    if (size)
        memcpy(s, p, size);
    s[size] = 0;
    return s;
}

char **read_strings(struct reader *r) {
    uint32_t count = read_u32(r);
    /* Each string takes at least its four length bytes, which bounds the count by what arrived. */
    if (r->bad || count > r->left / 4) {
        r->bad = true;
        return NULL;
    }
    char **list = calloc((size_t)count + 1, sizeof *list);
    if (!list) {
        r->bad = true;
        return NULL;
    }
    for (uint32_t i = 0; i < count; i++) {
        if (!(list[i] = read_string(r))) {
            free_strings(list);
            return NULL;
        }
    }
    return list;
}

void free_strings(char **list) {
    for (char **s = list; s && *s; s++)
        free(*s);
    free(list);
}

bool reader_done(const struct reader *r) { return !r->bad && r->left == 0; }

void write_bytes(struct writer *w, const void *data, size_t size) {
    if (w->bad || size == 0)
        return;
    if (size > w->size - w->used) {
        size_t want = w->size ? w->size : 256;
        while (want - w->used < size) {
            if (want > SIZE_MAX / 2) {
                w->bad = true;
                return;
            }
            want *= 2;
        }
        uint8_t *grown = realloc(w->data, want);
        if (!grown) {
            w->bad = true;
            return;
        }
        w->data = grown;
        w->size = want;
    }
    memcpy(w->data + w->used, data, size);
    w->used += size;
}

static void write_number(struct writer *w, uint64_t v, size_t size) {
    uint8_t bytes[8];
    for (size_t i = 0; i < size; i++)
        bytes[i] = (uint8_t)(v >> 8 * i);
    write_bytes(w, bytes, size);
}

void write_u8(struct writer *w, uint8_t v) { write_number(w, v, 1); }
void write_u16(struct writer *w, uint16_t v) { write_number(w, v, 2); }
void write_u32(struct writer *w, uint32_t v) { write_number(w, v, 4); }
void write_u64(struct writer *w, uint64_t v) { write_number(w, v, 8); }

void write_string(struct writer *w, const char *s) {
    size_t size = strlen(s);
    write_u32(w, (uint32_t)size);
    write_bytes(w, s, size);
}

void writer_free(struct writer *w) {
    free(w->data);
    *w = (struct writer){0};
}
