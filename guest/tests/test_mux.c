/* The keeper's multiplexer: who gets what, what is refused, and that everything is bounded. */
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "mux.h"

static const uint8_t nonce[NONCE_SIZE] = {0x54, 2, 0, 0, 20, 0, 0, 0, 0x54, 2, 0x54, 2, 0, 0, 7, 9};
static size_t logged, written;
static bool keeper_accepts = true;

static void on_log(void *context, const uint8_t *data, size_t size) {
    (void)context, (void)data;
    logged += size;
}

static void on_output(void *context, const uint8_t *data, size_t size) {
    (void)context, (void)data;
    written += size;
}

static bool on_keeper(void *context, struct mux_client *c, const struct frame *f) {
    mux_answer(context, c, F_KEEPER_INFO, f->stream, "a=b\n", 4);
    return keeper_accepts;
}

static struct mux *fresh(void) {
    struct mux *m = calloc(1, sizeof *m);
    m->context = m;
    m->on_log = on_log;
    m->on_output = on_output;
    m->on_keeper = on_keeper;
    mux_sync(m, nonce);
    return m;
}

static void discard(struct mux *m) {
    while (m->client_count)
        mux_leave(m, m->clients[0]);
    bytes_clear(&m->line);
    free(m);
}

static void from_guest(struct mux *m, uint8_t type, uint32_t stream, const void *payload, size_t size) {
    static uint8_t frame[FRAME_HEADER + FRAME_MAX];
    frame_header(frame, type, stream, (uint32_t)size);
    if (size)
        memcpy(frame + FRAME_HEADER, payload, size);
    mux_guest_feed(m, frame, FRAME_HEADER + size);
}

static void from_client(struct mux *m, struct mux_client *c, uint8_t type, uint32_t stream, const void *payload, size_t size) {
    static uint8_t frame[FRAME_HEADER + FRAME_MAX];
    frame_header(frame, type, stream, (uint32_t)size);
    if (size)
        memcpy(frame + FRAME_HEADER, payload, size);
    mux_client_feed(m, c, frame, FRAME_HEADER + size);
}

static void answer_sync(struct mux *m, uint32_t version) {
    uint8_t payload[NONCE_SIZE + 4];
    memcpy(payload, nonce, NONCE_SIZE);
    put_u32(payload + NONCE_SIZE, version);
    from_guest(m, F_SYNCED, 0, payload, sizeof payload);
}

static struct mux *synced(void) {
    struct mux *m = fresh();
    answer_sync(m, PROTOCOL_VERSION);
    CHECK(m->state == MUX_SYNCED);
    bytes_clear(&m->line);
    return m;
}

/* Take the first frame of a queue. */
static struct frame next(struct bytes *q) {
    static struct parser p;
    struct frame f = {0};
    const uint8_t *at = bytes_head(q);
    size_t left = q->used;
    p.used = 0;
    CHECK(parser_feed(&p, &at, &left, &f) == PARSE_FRAME);
    bytes_take(q, q->used - left);
    return f;
}

static void begins_with_zeros_and_sync(void) {
    struct mux *m = fresh();
    for (size_t i = 0; i < FRAME_RESYNC; i++)
        CHECK(bytes_head(&m->line)[i] == 0);
    struct frame f = next(&m->line);
    CHECK(f.type == F_SYNC && f.stream == 0 && f.length == NONCE_SIZE + 4 && !memcmp(f.payload, nonce, NONCE_SIZE));
    CHECK(m->line.used == 0);
    discard(m);
}

/* SYNCED is found behind anything, a half of itself included, and cut anywhere. */
static void finds_synced(void) {
    uint8_t bytes[512];
    for (size_t before = 0; before < 64; before++) {
        size_t used = 0;
        struct mux *m = fresh();
        memcpy(bytes, m->expected, before % MUX_SYNCED_SIZE);
        used += before % MUX_SYNCED_SIZE;
        memset(bytes + used, 0x54, before / 3);
        used += before / 3;
        memcpy(bytes + used, m->expected, MUX_SYNCED_SIZE);
        used += MUX_SYNCED_SIZE;
        put_u32(bytes + used, PROTOCOL_VERSION);
        used += 4;
        for (size_t i = 0; i + 1 < used; i++)
            mux_guest_feed(m, bytes + i, 1);
        CHECK(m->state == MUX_SYNCING);
        mux_guest_feed(m, bytes + used - 1, 1);
        CHECK(m->state == MUX_SYNCED && m->guest_version == PROTOCOL_VERSION);
        discard(m);
    }
    struct mux *m = fresh();
    answer_sync(m, 7);
    CHECK(m->state == MUX_BROKEN && m->guest_version == 7);
    discard(m);
}

static void rewrites_streams(void) {
    struct mux *m = synced();
    struct mux_client *a = mux_join(m), *b = mux_join(m);
    from_client(m, a, F_PING, 5, "x", 1);
    from_client(m, b, F_PING, 5, "y", 1);
    CHECK(next(&m->line).stream == (1u << 16 | 5));
    CHECK(next(&m->line).stream == (2u << 16 | 5));
    from_guest(m, F_PONG, 2u << 16 | 5, "y", 1);
    struct frame f = next(&b->out);
    CHECK(f.type == F_PONG && f.stream == 5 && f.payload[0] == 'y' && a->out.used == 0);
    from_guest(m, F_PONG, 9u << 16 | 5, "z", 1); /* nobody: it may have left */
    CHECK(m->state == MUX_SYNCED);
    mux_leave(m, a);
    CHECK(next(&m->line).type == F_GONE);
    mux_join(m);
    CHECK(m->clients[1]->slot == 3); /* a's slot rests until all others were used */
    m->last_slot = 65535;
    CHECK(mux_join(m)->slot == 1);
    m->last_slot = 65535;
    CHECK(mux_join(m)->slot == 4);
    discard(m);
}

static void waits_until_synced(void) {
    struct mux *m = fresh();
    struct mux_client *c = mux_join(m);
    bytes_clear(&m->line);
    from_client(m, c, F_KEEPER, 3, NULL, 0); /* answered at once */
    struct frame f = next(&c->out);
    CHECK(f.type == F_KEEPER_INFO && f.stream == 3);
    from_client(m, c, F_PING, 1, NULL, 0);
    CHECK(m->line.used == 0 && !mux_wants(c) && !c->closing);
    answer_sync(m, PROTOCOL_VERSION);
    mux_pump(m);
    CHECK(next(&m->line).type == F_PING && mux_wants(c));
    mux_leave(m, c);
    CHECK(next(&m->line).type == F_GONE);
    c = mux_join(m); /* the guest never heard of it */
    mux_leave(m, c);
    CHECK(m->line.used == 0);
    discard(m);
}

static void refuses_what_clients_may_not_send(void) {
    static const uint8_t types[] = {F_SYNC, F_SYNCED, F_GONE, F_LOG, F_BYE, F_OK, F_PONG, F_STARTED, F_EXITED, F_KEEPER_INFO, 0x99};
    struct mux *m = synced();
    for (size_t i = 0; i < sizeof types; i++) {
        struct mux_client *c = mux_join(m);
        from_client(m, c, types[i], 0, NULL, 0);
        CHECK(c->closing && m->line.used == 0);
        mux_leave(m, c);
    }
    struct mux_client *c = mux_join(m);
    from_client(m, c, F_PING, 0x10000, NULL, 0); /* another's slot */
    CHECK(c->closing && m->line.used == 0);
    c = mux_join(m);
    mux_client_feed(m, c, (const uint8_t *)"GET /", 5);
    CHECK(c->closing);
    c = mux_join(m);
    keeper_accepts = false;
    from_client(m, c, F_KEEPER_KILL, 0, NULL, 0);
    keeper_accepts = true;
    CHECK(c->closing && m->state == MUX_SYNCED);
    discard(m);
}

static void survives_a_malformed_guest(void) {
    static const uint8_t types[] = {F_SYNC, F_GONE, F_EXEC, F_STEPS, F_KEEPER_INFO, F_KEEPER, 0x77};
    for (size_t i = 0; i < sizeof types; i++) {
        struct mux *m = synced();
        struct mux_client *spoke = mux_join(m), *silent = mux_join(m);
        from_client(m, spoke, F_PING, 1, NULL, 0);
        from_guest(m, types[i], (uint32_t)spoke->slot << 16 | 1, NULL, 0);
        CHECK(m->state == MUX_BROKEN && spoke->closing && !silent->closing && m->line.used == 0);
        from_guest(m, F_PONG, (uint32_t)silent->slot << 16, NULL, 0);
        CHECK(silent->out.used == 0);
        mux_leave(m, spoke);
        CHECK(m->line.used == 0); /* SYNC will say it */
        mux_sync(m, nonce);
        answer_sync(m, PROTOCOL_VERSION);
        CHECK(m->state == MUX_SYNCED);
        discard(m);
    }
}

static void keeps_what_the_guest_says_to_it(void) {
    struct mux *m = synced();
    logged = 0;
    from_guest(m, F_LOG, 0, "hello\n", 6);
    from_guest(m, F_DATA, 0, "\1hello", 6);
    CHECK(logged == 6 && written == 5 && m->noise > 0 && m->traffic == 0);
    uint8_t status[4];
    put_u32(status, 3);
    from_guest(m, F_BYE, 0, status, 4);
    CHECK(m->bye && m->bye_status == 3 && m->state == MUX_SYNCED);
    from_guest(m, F_BYE, 0, status, 3);
    CHECK(m->state == MUX_BROKEN);
    discard(m);
}

static void is_bounded(void) {
    static uint8_t payload[FRAME_MAX];
    struct mux *m = synced();
    struct mux_client *c = mux_join(m), *other = mux_join(m);
    size_t sent = 0;
    while (mux_wants(c) && sent < 1000) { /* the line is not taken from */
        from_client(m, c, F_DATA, 1, payload, sizeof payload);
        sent++;
    }
    CHECK(sent < 20 && m->line.used <= MUX_LINE_HIGH + FRAME_HEADER + FRAME_MAX);
    from_client(m, other, F_PING, 1, NULL, 0);
    CHECK(!mux_wants(other));
    size_t line = m->line.used;
    bytes_take(&m->line, line);
    mux_pump(m);
    CHECK(mux_wants(c) && mux_wants(other) && m->line.used > 0);

    size_t fed = 0;
    while (mux_line_wants(m) && fed < 1000) { /* the client does not read */
        from_guest(m, F_DATA, (uint32_t)c->slot << 16 | 1, payload, sizeof payload);
        fed++;
    }
    CHECK(fed < 200 && m->queued == c->out.used);
    CHECK(!mux_wants(c)); /* nor may it fill its queue itself */
    mux_taken(m, c, c->out.used);
    CHECK(mux_line_wants(m) && m->queued == 0);
    size_t clients = m->client_count;
    while (mux_join(m))
        clients++;
    CHECK(clients == MUX_CLIENTS);
    discard(m);
}

static void loses_the_line(void) {
    struct mux *m = synced();
    struct mux_client *c = mux_join(m);
    mux_lose(m);
    CHECK(c->closing && !mux_line_wants(m));
    c = mux_join(m);
    from_client(m, c, F_KEEPER, 1, NULL, 0);
    CHECK(!c->closing && c->out.used > 0);
    from_client(m, c, F_PING, 1, NULL, 0);
    CHECK(c->closing);
    discard(m);
}

int main(void) {
    begins_with_zeros_and_sync();
    finds_synced();
    rewrites_streams();
    waits_until_synced();
    refuses_what_clients_may_not_send();
    survives_a_malformed_guest();
    keeps_what_the_guest_says_to_it();
    is_bounded();
    loses_the_line();
    return 0;
}
