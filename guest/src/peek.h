/* peek: whom a program wants to talk to, read from the first bytes that it sends (peek.c), or from the names that it asks for (peek_dns.c).
 *
 * Pure: bytes in, a verdict out. Whoever sends them is hostile, and wants us to read another name than the server will. So what can be read in two ways is
 * refused, and a name is nothing but letters, digits, hyphens and dots. */
#ifndef TV_PEEK_H
#define TV_PEEK_H

#include <stddef.h>
#include <stdint.h>

#define PEEK_NAME 254   /* a name of DNS without its last dot, in small letters, and a NUL */
#define PEEK_MOST 32768 /* bytes of a beginning: nothing longer is waited for */
#define PEEK_ADDRESSES 64

enum peek {
    PEEK_MORE,    /* it may become clear with more bytes */
    PEEK_NAMED,   /* `name` holds whom it asks for */
    PEEK_REFUSED, /* `why` says why */
};

struct peeked {
    char name[PEEK_NAME];
    const char *why;
};

/* The beginning of a TCP connection: a TLS client hello (RFC 8446, RFC 6066), or a request of HTTP/1 (RFC 9112), whichever it is. */
enum peek peek_stream(const uint8_t *data, size_t size, struct peeked *out);

/* Whether a datagram begins or continues a QUIC connection (RFC 8999: what all versions share), as far as that can be told. */
int peek_quic(const uint8_t *data, size_t size);

/* A question of DNS (RFC 1035). Returns its type and sets `name`, and `end` to where the question ends; 0 if it is not one plain question. */
unsigned peek_question(const uint8_t *message, size_t size, char name[PEEK_NAME], size_t *end);

/* The IPv4 addresses that an answer gives for the name that it was asked for, the chain of CNAME followed. Returns how many, -1 if the answer is
 * malformed, or holds more than PEEK_ADDRESSES. `ttl`: seconds that all of it holds. */
int peek_addresses(const uint8_t *message, size_t size, uint8_t out[PEEK_ADDRESSES][4], uint32_t *ttl);

/* Whether an address is one that no name of the internet may stand for: private, of the loopback, link-local, shared, multicast, reserved, for tests. */
int peek_private(const uint8_t address[4]);

#endif
