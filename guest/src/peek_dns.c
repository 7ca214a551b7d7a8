/* What a message of DNS asks for, and which addresses it answers with (RFC 1035). See peek.h.
 *
 * Names may point back into the message; a pointer only ever leads to an earlier place, so there is no loop, and names are short. */
#include <string.h>

#include "peek.h"

#define HEADER 12
#define TYPE_A 1
#define TYPE_CNAME 5
#define CLASS_IN 1
#define CHAIN 16
#define RECORDS 256

static unsigned get16(const uint8_t *at) {
    return (unsigned)at[0] << 8 | at[1];
}

/* Reads the name at `at` in small letters; a byte that no host name has becomes '?', which equals no host. Returns where it ends, 0 if it is malformed. */
static size_t name_at(const uint8_t *message, size_t size, size_t at, char name[PEEK_NAME]) {
    size_t end = 0, length = 0, limit = at;
    while (at < size && message[at]) {
        size_t label = message[at];
        if (label >= 0xc0) {
            if (at + 1 >= size)
                return 0;
            size_t to = get16(message + at) & 0x3fff;
            end = end ? end : at + 2;
            if (to >= limit || to < HEADER)
                return 0;
            at = limit = to;
            continue;
        }
        if (label > 63 || at + 1 + label >= size || length + label + 1 >= PEEK_NAME)
            return 0;
        if (length)
            name[length++] = '.';
        for (size_t i = 1; i <= label; i++) {
            uint8_t c = message[at + i];
            c = c >= 'A' && c <= 'Z' ? (uint8_t)(c + 32) : c;
            name[length++] = (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '-' || c == '_' ? (char)c : '?';
        }
        at += 1 + label;
    }
    if (at >= size)
        return 0;
    name[length] = 0;
    return end ? end : at + 1;
}

unsigned peek_question(const uint8_t *message, size_t size, char name[PEEK_NAME], size_t *end) {
    if (size < HEADER || get16(message + 4) != 1)
        return 0;
    size_t at = name_at(message, size, HEADER, name);
    if (!at || at + 4 > size || get16(message + at + 2) != CLASS_IN)
        return 0;
    *end = at + 4;
    return get16(message + at);
}

/* Walks the answers for those of `wanted`: takes its addresses, or sets `wanted` to what it is another name of. Returns -1 if they are malformed. */
static int walk(const uint8_t *message, size_t size, size_t at, char wanted[PEEK_NAME], int *renamed, uint8_t out[PEEK_ADDRESSES][4], uint32_t *ttl) {
    char owner[PEEK_NAME], alias[PEEK_NAME] = "";
    int count = 0;
    for (unsigned left = get16(message + 6); left; left--) {
        at = name_at(message, size, at, owner);
        if (!at || at + 10 > size || at + 10 + get16(message + at + 8) > size)
            return -1;
        unsigned type = get16(message + at), class = get16(message + at + 2), length = get16(message + at + 8);
        const uint8_t *data = message + at + 10;
        at += 10 + length;
        if (class != CLASS_IN || strcmp(owner, wanted))
            continue;
        uint32_t holds = (uint32_t)get16(data - 6) << 16 | get16(data - 4);
        if ((type == TYPE_A || type == TYPE_CNAME) && holds < *ttl)
            *ttl = holds;
        if (type == TYPE_A) {
            if (length != 4 || count == PEEK_ADDRESSES)
                return -1;
            memcpy(out[count++], data, 4);
        } else if (type == TYPE_CNAME) {
            if (*alias || name_at(message, size, (size_t)(data - message), alias) != at)
                return -1;
        }
    }
    *renamed = *alias != 0;
    if (*renamed)
        memcpy(wanted, alias, PEEK_NAME);
    return count;
}

int peek_addresses(const uint8_t *message, size_t size, uint8_t out[PEEK_ADDRESSES][4], uint32_t *ttl) {
    char wanted[PEEK_NAME];
    size_t at;
    *ttl = ~0u;
    if (!peek_question(message, size, wanted, &at) || !(message[2] & 0x80) || get16(message + 6) > RECORDS)
        return -1;
    for (int chain = 0; chain < CHAIN; chain++) {
        int renamed, count = walk(message, size, at, wanted, &renamed, out, ttl);
        if (count && renamed)
            return -1; /* a name with an alias has nothing else */
        if (count || !renamed)
            return count;
    }
    return -1;
}

int peek_private(const uint8_t address[4]) {
    static const struct {
        uint8_t network[4];
        int bits;
    } NEVER[] = {
        {{0, 0, 0, 0}, 8},      {{10, 0, 0, 0}, 8},    {{100, 64, 0, 0}, 10},  {{127, 0, 0, 0}, 8},    {{168, 63, 129, 16}, 32}, {{169, 254, 0, 0}, 16},
        {{172, 16, 0, 0}, 12},  {{192, 0, 0, 0}, 24},  {{192, 0, 2, 0}, 24},   {{192, 88, 99, 0}, 24}, {{192, 168, 0, 0}, 16},   {{198, 18, 0, 0}, 15},
        {{198, 51, 100, 0}, 24}, {{203, 0, 113, 0}, 24}, {{224, 0, 0, 0}, 4},   {{240, 0, 0, 0}, 4},    {{100, 100, 100, 200}, 32},
    };
    for (size_t i = 0; i < sizeof NEVER / sizeof *NEVER; i++) {
        uint32_t mask = NEVER[i].bits ? ~0u << (32 - NEVER[i].bits) : 0;
        const uint8_t *n = NEVER[i].network;
        uint32_t network = (uint32_t)n[0] << 24 | (uint32_t)n[1] << 16 | (uint32_t)n[2] << 8 | n[3];
        uint32_t asked = (uint32_t)address[0] << 24 | (uint32_t)address[1] << 16 | (uint32_t)address[2] << 8 | address[3];
        if ((asked & mask) == network)
            return 1;
    }
    return 0;
}
