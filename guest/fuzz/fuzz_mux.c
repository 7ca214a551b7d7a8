/* Arbitrary bytes from a guest and from clients, joining and leaving in any order, into the keeper's mux.
 *
 * The input is a list of steps: one byte says what (high bits) and who (low bits), one byte how much. */
#include <stdlib.h>
#include <string.h>

#include "mux.h"

enum { WHO = 8 };

static void on_log(void *context, const uint8_t *data, size_t size) {
    volatile uint8_t *sum = context;
    for (size_t i = 0; i < size; i++)
        *sum = (uint8_t)(*sum + data[i]);
}

static bool on_keeper(void *context, struct mux_client *c, const struct frame *f) {
    (void)context, (void)c;
    return f->length < 64;
}

static void sync_it(struct mux *m, bool answer) {
    static const uint8_t nonce[NONCE_SIZE] = {0x54, 2};
    mux_sync(m, nonce);
    if (!answer)
        return;
    uint8_t version[4];
    put_u32(version, PROTOCOL_VERSION);
    mux_guest_feed(m, m->expected, sizeof m->expected);
    mux_guest_feed(m, version, sizeof version);
}

static void step(struct mux *m, struct mux_client **who, uint8_t what, const uint8_t *data, size_t size) {
    struct mux_client **c = &who[what & (WHO - 1)];
    switch (what >> 3 & 7) {
    case 0:
        mux_guest_feed(m, data, size);
        break;
    case 1:
        if (!*c)
            *c = mux_join(m);
        break;
    case 2:
        if (*c)
            mux_leave(m, *c);
        *c = NULL;
        break;
    case 3:
        sync_it(m, what & 1);
        break;
    case 4:
        bytes_take(&m->line, m->line.used < size ? m->line.used : size * 64 % (m->line.used + 1));
        mux_pump(m);
        break;
    case 5:
        if (*c)
            mux_taken(m, *c, (*c)->out.used < size ? (*c)->out.used : size);
        break;
    default:
        if (*c && mux_wants(*c))
            mux_client_feed(m, *c, data, size);
    }
}

static void check(const struct mux *m) {
    size_t queued = 0;
    for (size_t i = 0; i < m->client_count; i++)
        queued += m->clients[i]->out.used;
    if (queued != m->queued || m->line.used > MUX_LINE_HIGH + 2 * FRAME_RESYNC + WHO * FRAME_HEADER)
        abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static uint8_t sum;
    struct mux *m = calloc(1, sizeof *m);
    struct mux_client *who[WHO] = {0};
    m->context = &sum;
    m->on_log = on_log;
    m->on_keeper = on_keeper;
    sync_it(m, true);
    while (size >= 2) {
        size_t n = data[1] < size - 2 ? data[1] : size - 2;
        step(m, who, data[0], data + 2, n);
        check(m);
        data += 2 + n;
        size -= 2 + n;
    }
    while (m->client_count)
        mux_leave(m, m->clients[0]);
    bytes_clear(&m->line);
    free(m);
    return 0;
}
