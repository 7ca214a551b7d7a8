/* Payloads: little-endian numbers and byte strings with a 32-bit length (PROTOCOL.md, "Payloads").
 *
 * A reader never runs past its bytes: a read that would marks it bad and returns zero or an empty
 * string, so a decoder reads every field and asks once, at the end, whether all was well. */
#ifndef TVINIT_WIRE_H
#define TVINIT_WIRE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct reader {
    const uint8_t *at;
    size_t left;
    bool bad;
};

struct reader reader_of(const void *data, size_t size);
uint8_t read_u8(struct reader *r);
uint16_t read_u16(struct reader *r);
uint32_t read_u32(struct reader *r);
uint64_t read_u64(struct reader *r);
const uint8_t *read_bytes(struct reader *r, size_t size);

/* A string as a fresh C string; NULL (and bad) if it is cut short, holds a NUL, or memory is out. */
char *read_string(struct reader *r);

/* A list of strings: u32 count, then each. NULL-terminated; NULL (and bad) on any fault. Free with free_strings. */
char **read_strings(struct reader *r);
void free_strings(char **list);

/* True if all was read and nothing is left over. */
bool reader_done(const struct reader *r);

/* A growing buffer; `bad` after a failed allocation. */
struct writer {
    uint8_t *data;
    size_t used, size;
    bool bad;
};

void write_u8(struct writer *w, uint8_t v);
void write_u16(struct writer *w, uint16_t v);
void write_u32(struct writer *w, uint32_t v);
void write_u64(struct writer *w, uint64_t v);
void write_bytes(struct writer *w, const void *data, size_t size);
void write_string(struct writer *w, const char *s);
void writer_free(struct writer *w);

#endif
