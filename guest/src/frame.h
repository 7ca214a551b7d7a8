/* Frames of the line between a host and a machine (PROTOCOL.md).
 *
 * A frame is a 12-byte header and a payload of at most FRAME_MAX bytes. Between frames, zero bytes
 * are padding and are skipped: a peer that may have been cloned in the middle of a frame is brought
 * back by FRAME_RESYNC zeros and a SYNC.
 */
#ifndef TVINIT_FRAME_H
#define TVINIT_FRAME_H

#include <stddef.h>
#include <stdint.h>
#include <unistd.h>

#undef F_OK /* access(2)'s, which is not used here and would silently turn our F_OK into 0 */

enum {
    FRAME_MAGIC = 0x54,
    FRAME_HEADER = 12,
    FRAME_MAX = 32768,
    FRAME_RESYNC = FRAME_HEADER + FRAME_MAX,
    PROTOCOL_VERSION = 1,
    NONCE_SIZE = 16,
    WINDOW_SIZE = 256 * 1024, /* bytes a sender may have in flight on one channel */
};

enum frame_type {
    /* the line itself, stream 0 */
    F_SYNC = 0x01,
    F_SYNCED = 0x02,
    F_GONE = 0x03,
    F_LOG = 0x06,
    F_BYE = 0x07,
    /* requests and their ends */
    F_SHUTDOWN = 0x08,
    F_STEPS = 0x09,
    F_OK = 0x0a,
    F_ERROR = 0x0b,
    F_PING = 0x0c,
    F_PONG = 0x0d,
    /* commands */
    F_EXEC = 0x10,
    F_STARTED = 0x11,
    F_EXITED = 0x12,
    F_DATA = 0x13,
    F_WINDOW = 0x14,
    F_SIGNAL = 0x15,
    F_RESIZE = 0x16,
    /* answered by the keeper, never sent to a guest */
    F_KEEPER = 0x40,
    F_KEEPER_INFO = 0x41,
    F_KEEPER_KILL = 0x42,
    F_KEEPER_STOP = 0x43,
};

enum channel { CH_STDIN = 0, CH_STDOUT = 1, CH_STDERR = 2, CH_TRACE = 3 };

struct frame {
    uint8_t type;
    uint32_t stream;
    uint32_t length;
    const uint8_t *payload; /* into the parser's buffer, valid until the next parser call */
};

/* Collects bytes until a frame is whole. Holds at most one frame. */
struct parser {
    uint8_t buffer[FRAME_HEADER + FRAME_MAX];
    size_t used;
};

enum parse { PARSE_MORE, PARSE_FRAME, PARSE_BAD };

/* Take bytes from *data (advancing it and *size) until a frame is whole, the bytes end, or a header
 * is malformed. After PARSE_FRAME call again with what is left. After PARSE_BAD the line is lost. */
enum parse parser_feed(struct parser *p, const uint8_t **data, size_t *size, struct frame *out);

/* Write a header into out[FRAME_HEADER]. */
void frame_header(uint8_t out[FRAME_HEADER], uint8_t type, uint32_t stream, uint32_t length);

/* Little-endian numbers at any alignment. */
uint32_t get_u32(const uint8_t *p);
void put_u32(uint8_t *p, uint32_t v);

#endif
