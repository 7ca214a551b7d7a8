/* The keeper's multiplexer: any number of host clients on the one line to the guest.
 *
 * Bytes in, bytes out: it does no I/O and reads no clock, so that tests and the fuzzer can drive it. The driver
 * (keepline.c) feeds it what it read and writes what lies in the `out` queues. It reads headers only; payloads
 * pass as they are, whole frames at a time, so that a client that stalls within a frame holds up nobody.
 *
 * Everything is bounded: a client is read only while its last frame has been taken (mux_wants), the line is read
 * only while no client's queue is over its mark (mux_line_wants). A guest that ignores windows stops itself.
 */
#ifndef TVINIT_MUX_H
#define TVINIT_MUX_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "bytes.h"
#include "frame.h"

enum {
    MUX_CLIENTS = 256,
    MUX_CHUNK = 64 * 1024,              /* at most this much is fed at once */
    MUX_LINE_HIGH = 256 * 1024,         /* frames of clients wait while the line holds more */
    MUX_CLIENT_HIGH = 4 * 1024 * 1024,  /* the line waits while a client holds more ... */
    MUX_TOTAL_HIGH = 32 * 1024 * 1024,  /* ... or all together do */
    MUX_SYNCED_SIZE = FRAME_HEADER + NONCE_SIZE,
};

enum mux_state {
    MUX_BROKEN,  /* the guest broke the protocol: its bytes are thrown away until mux_sync */
    MUX_SYNCING, /* SYNC is on its way: bytes are thrown away until SYNCED */
    MUX_SYNCED,
    MUX_LOST,    /* no line any more */
};

struct mux_client {
    uint16_t slot;
    bool closing; /* the driver closes it: it was malformed, or the line was lost under it */
    bool spoke;   /* the guest knows of it */
    bool held;    /* `frame` waits for the line */
    struct frame frame;
    struct bytes in, out;
    void *driver;
    struct parser parser;
};

struct mux {
    enum mux_state state;
    struct mux_client *clients[MUX_CLIENTS];
    size_t client_count, turn;
    uint16_t last_slot;
    struct bytes line; /* to the guest */
    size_t queued;     /* bytes in all clients' out queues, as of the last feed or take */
    uint8_t expected[MUX_SYNCED_SIZE]; /* how the SYNCED that ends SYNCING begins */
    uint8_t failure[MUX_SYNCED_SIZE];  /* of Knuth, Morris and Pratt */
    uint8_t version[4];
    size_t matched;
    uint32_t guest_version; /* what the guest said; another than ours breaks the line */
    uint64_t traffic; /* frames that count against idleness */
    uint64_t noise;   /* bytes from the guest that no client was waiting for */
    bool bye;
    uint32_t bye_status;
    void *context;
    void (*on_log)(void *context, const uint8_t *data, size_t size);
    /* What the machine's program wrote. It is noise as far as this says so. */
    void (*on_output)(void *context, const uint8_t *data, size_t size);
    /* A KEEPER* frame of a client. False: it is malformed. */
    bool (*on_keeper)(void *context, struct mux_client *c, const struct frame *f);
    struct parser guest;
};

/* Begin with a new nonce: what was queued for the guest is dropped; zeros and SYNC are queued. */
void mux_sync(struct mux *m, const uint8_t nonce[NONCE_SIZE]);

/* The line must be begun again: clients that the guest knows of are let go, the others wait for mux_sync. */
void mux_break(struct mux *m);

/* The line has closed: nothing can reach the guest any more. */
void mux_lose(struct mux *m);

/* A new client, or NULL if there are too many or memory is out. */
struct mux_client *mux_join(struct mux *m);

/* The client left: the guest is told. Frees it. */
void mux_leave(struct mux *m, struct mux_client *c);

bool mux_wants(const struct mux_client *c);
void mux_client_feed(struct mux *m, struct mux_client *c, const uint8_t *data, size_t size);

bool mux_line_wants(const struct mux *m);
void mux_guest_feed(struct mux *m, const uint8_t *data, size_t size);

/* The line took bytes: let the frames go that waited for it. */
void mux_pump(struct mux *m);

/* Queue a frame for a client, or for the guest as the keeper itself. False if memory is out. */
bool mux_answer(struct mux *m, struct mux_client *c, uint8_t type, uint32_t stream, const void *payload, size_t size);
bool mux_tell_guest(struct mux *m, uint8_t type, uint32_t stream, const void *payload, size_t size);

/* `n` bytes of the client's out queue were written. */
void mux_taken(struct mux *m, struct mux_client *c, size_t n);

#endif
