/* The line to the keeper: frames in, frames out, never blocking.
 *
 * Out: one flat buffer. Small frames are queued and go out together at the end of a turn of the loop. Data
 * of commands is read straight into the buffer behind its header (line_reserve, line_commit), and only
 * while line_room() says that less than a frame waits, which bounds the buffer. Replies are bounded because
 * no more input is taken while LINE_HIGH bytes wait.
 *
 * In: after a malformed header everything is skipped until a whole SYNC has been seen. */
#ifndef TVINIT_LINE_H
#define TVINIT_LINE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "frame.h"

enum { LINE_HIGH = 256 * 1024, SYNC_SIZE = NONCE_SIZE + 4, DATA_HEADER = FRAME_HEADER + 1 };

/* Finds a SYNC in any bytes, at any offset. */
struct resync {
    uint8_t seen[FRAME_HEADER + SYNC_SIZE];
    size_t used;
};

/* Take bytes until a whole SYNC frame is in r->seen (true) or they end (false). */
bool resync_feed(struct resync *r, const uint8_t **data, size_t *size);

/* Parser and resynchronisation together, without a descriptor: what the fuzzer drives. */
struct intake {
    struct parser parser;
    struct resync resync;
    bool skipping;
};
bool intake_feed(struct intake *in, const uint8_t **data, size_t *size, struct frame *out);

/* Take the descriptor over: it becomes non-blocking and is watched. One that was the line before is closed, and what
 * was queued for it dropped. */
int line_open(int fd);

/* The next frame, valid until the next call. False: none now. */
bool line_next(struct frame *out);

/* True if line_next may give more without news from the loop. */
bool line_pending(void);

/* Close it: it is lost, until line_open. */
void line_close(void);

/* True once the other side of a socket has closed; never for a virtio port, whose host comes back. */
bool line_lost(void);

/* Answer a SYNC: what was queued is dropped. */
void line_synced(const uint8_t nonce[NONCE_SIZE]);

void line_send(uint8_t type, uint32_t stream, const void *payload, size_t size);
void line_error(uint32_t stream, int error, const char *text);

/* A LOG frame; false if no keeper listens or too much waits already. */
bool line_log(const char *text, size_t size);

/* Room for one more frame of data. */
bool line_room(void);

/* A keeper listens. */
bool line_heard(void);

/* Space for a data frame of `size` bytes after its header; NULL if memory is out. */
uint8_t *line_reserve(size_t size);
void line_commit(uint32_t stream, uint8_t channel, size_t size);

/* Write what the line takes now. */
void line_flush(void);

/* Write all, waiting up to `ms` in all. */
void line_drain(int ms);

#endif
