#include "mux.h"

#include <stdlib.h>
#include <string.h>

static bool from_client(uint8_t type) {
    switch (type) {
    case F_SHUTDOWN:
    case F_STEPS:
    case F_PING:
    case F_EXEC:
    case F_DATA:
    case F_WINDOW:
    case F_SIGNAL:
    case F_RESIZE:
        return true;
    default:
        return false;
    }
}

static bool for_keeper(uint8_t type) { return type == F_KEEPER || type == F_KEEPER_KILL || type == F_KEEPER_STOP; }

static bool from_guest(uint8_t type) {
    switch (type) {
    case F_OK:
    case F_ERROR:
    case F_PONG:
    case F_STARTED:
    case F_EXITED:
    case F_DATA:
    case F_WINDOW:
        return true;
    default:
        return false;
    }
}

static bool queue_frame(struct bytes *queue, uint8_t type, uint32_t stream, const void *payload, size_t size) {
    uint8_t *at = bytes_room(queue, FRAME_HEADER + size);
    if (!at)
        return false;
    frame_header(at, type, stream, (uint32_t)size);
    if (size)
        memcpy(at + FRAME_HEADER, payload, size);
    bytes_added(queue, FRAME_HEADER + size);
    return true;
}

bool mux_tell_guest(struct mux *m, uint8_t type, uint32_t stream, const void *payload, size_t size) {
    return queue_frame(&m->line, type, stream, payload, size);
}

bool mux_answer(struct mux *m, struct mux_client *c, uint8_t type, uint32_t stream, const void *payload, size_t size) {
    bool good = queue_frame(&c->out, type, stream, payload, size);
    if (good)
        m->queued += FRAME_HEADER + size;
    else
        c->closing = true;
    return good;
}

void mux_taken(struct mux *m, struct mux_client *c, size_t n) {
    bytes_take(&c->out, n);
    m->queued -= n;
}

/* What clients had with the guest is gone: their streams cannot be told from new ones. */
static void drop_clients(struct mux *m) {
    for (size_t i = 0; i < m->client_count; i++)
        if (m->clients[i]->spoke || m->state == MUX_LOST)
            m->clients[i]->closing = true;
}

void mux_break(struct mux *m) {
    m->state = MUX_BROKEN;
    bytes_clear(&m->line);
    drop_clients(m);
}

void mux_lose(struct mux *m) {
    m->state = MUX_LOST;
    bytes_clear(&m->line);
    drop_clients(m);
}

void mux_sync(struct mux *m, const uint8_t nonce[NONCE_SIZE]) {
    uint8_t payload[NONCE_SIZE + 4];
    memcpy(payload, nonce, NONCE_SIZE);
    put_u32(payload + NONCE_SIZE, PROTOCOL_VERSION);
    m->state = MUX_SYNCING;
    m->matched = m->guest.used = 0;
    frame_header(m->expected, F_SYNCED, 0, sizeof payload);
    memcpy(m->expected + FRAME_HEADER, nonce, NONCE_SIZE);
    m->failure[0] = 0;
    for (size_t i = 1, k = 0; i < MUX_SYNCED_SIZE; i++) {
        while (k && m->expected[i] != m->expected[k])
            k = m->failure[k - 1];
        k += m->expected[i] == m->expected[k];
        m->failure[i] = (uint8_t)k;
    }
    bytes_clear(&m->line);
    uint8_t *zeros = bytes_room(&m->line, FRAME_RESYNC);
    if (zeros) {
        memset(zeros, 0, FRAME_RESYNC);
        bytes_added(&m->line, FRAME_RESYNC);
    }
    if (!zeros || !mux_tell_guest(m, F_SYNC, 0, payload, sizeof payload))
        mux_break(m);
}

/* Look for SYNCED with our nonce in whatever comes; returns how many bytes that took. */
static size_t scan(struct mux *m, const uint8_t *data, size_t size) {
    size_t i = 0;
    while (i < size && m->matched < MUX_SYNCED_SIZE) {
        while (m->matched && data[i] != m->expected[m->matched])
            m->matched = m->failure[m->matched - 1];
        m->matched += data[i++] == m->expected[m->matched];
    }
    for (; i < size && m->matched < MUX_SYNCED_SIZE + 4; i++)
        m->version[m->matched++ - MUX_SYNCED_SIZE] = data[i];
    if (m->matched == MUX_SYNCED_SIZE + 4) {
        m->guest_version = get_u32(m->version);
        m->state = MUX_SYNCED;
        if (m->guest_version != PROTOCOL_VERSION)
            mux_break(m);
    }
    m->noise += i;
    return i;
}

static struct mux_client *by_slot(struct mux *m, uint32_t slot) {
    for (size_t i = 0; i < m->client_count; i++)
        if (m->clients[i]->slot == slot)
            return m->clients[i];
    return NULL;
}

/* One frame of the guest to the keeper itself. False if it is not one that a guest may send. */
static bool frame_for_us(struct mux *m, const struct frame *f) {
    if (f->type == F_DATA && f->stream == 0 && f->length > 0 && m->on_output) {
        m->on_output(m->context, f->payload + 1, f->length - 1);
        return true;
    }
    m->noise += FRAME_HEADER + f->length;
    if (f->type == F_LOG)
        m->on_log(m->context, f->payload, f->length);
    else if (f->type == F_BYE && f->length == 4 && f->stream == 0) {
        m->bye = true;
        m->bye_status = get_u32(f->payload);
    } else {
        return from_guest(f->type) || f->type == F_SYNCED;
    }
    return f->stream == 0;
}

static bool guest_frame(struct mux *m, const struct frame *f) {
    uint32_t slot = f->stream >> 16;
    if (slot == 0)
        return frame_for_us(m, f);
    if (!from_guest(f->type))
        return false;
    struct mux_client *c = by_slot(m, slot);
    if (!c || c->closing) { /* it left while this was under way */
        m->noise += FRAME_HEADER + f->length;
        return true;
    }
    m->traffic++;
    mux_answer(m, c, f->type, f->stream & 0xffff, f->payload, f->length);
    return true;
}

void mux_guest_feed(struct mux *m, const uint8_t *data, size_t size) {
    while (size > 0) {
        if (m->state == MUX_SYNCING) {
            size_t n = scan(m, data, size);
            data += n;
            size -= n;
            continue;
        }
        if (m->state != MUX_SYNCED) {
            m->noise += size;
            return;
        }
        struct frame f;
        enum parse p = parser_feed(&m->guest, &data, &size, &f);
        if (p == PARSE_BAD || (p == PARSE_FRAME && !guest_frame(m, &f)))
            mux_break(m);
    }
}

bool mux_line_wants(const struct mux *m) {
    if (m->queued > MUX_TOTAL_HIGH)
        return false;
    for (size_t i = 0; i < m->client_count; i++)
        if (m->clients[i]->out.used > MUX_CLIENT_HIGH && !m->clients[i]->closing)
            return false;
    return m->state != MUX_LOST;
}

struct mux_client *mux_join(struct mux *m) {
    struct mux_client *c = m->client_count < MUX_CLIENTS ? calloc(1, sizeof *c) : NULL;
    if (!c)
        return NULL;
    do
        m->last_slot = m->last_slot == 65535 ? 1 : (uint16_t)(m->last_slot + 1);
    while (by_slot(m, m->last_slot));
    c->slot = m->last_slot;
    m->clients[m->client_count++] = c;
    return c;
}

void mux_leave(struct mux *m, struct mux_client *c) {
    if (c->spoke && m->state == MUX_SYNCED && !mux_tell_guest(m, F_GONE, (uint32_t)c->slot << 16, NULL, 0))
        mux_break(m); /* rather all clients than one whose commands never end */
    for (size_t i = 0; i < m->client_count; i++)
        if (m->clients[i] == c) {
            m->clients[i] = m->clients[--m->client_count];
            break;
        }
    m->queued -= c->out.used;
    bytes_clear(&c->in);
    bytes_clear(&c->out);
    free(c);
}

bool mux_wants(const struct mux_client *c) {
    return !c->closing && !c->held && c->in.used == 0 && c->out.used <= MUX_CLIENT_HIGH;
}

/* Send the frame that the client holds, if the line can take it now. */
static bool release(struct mux *m, struct mux_client *c) {
    if (m->state == MUX_LOST)
        c->closing = true;
    if (m->state != MUX_SYNCED || m->line.used > MUX_LINE_HIGH)
        return false;
    c->held = false;
    c->spoke = true;
    m->traffic++;
    if (!mux_tell_guest(m, c->frame.type, (uint32_t)c->slot << 16 | c->frame.stream, c->frame.payload, c->frame.length))
        c->closing = true;
    return true;
}

static void advance(struct mux *m, struct mux_client *c) {
    while (!c->closing && (!c->held || release(m, c)) && c->in.used > 0) {
        const uint8_t *data = bytes_head(&c->in);
        size_t left = c->in.used;
        enum parse p = parser_feed(&c->parser, &data, &left, &c->frame);
        bytes_take(&c->in, c->in.used - left);
        if (p == PARSE_MORE)
            continue;
        if (p == PARSE_FRAME && c->frame.stream <= 0xffff && from_client(c->frame.type))
            c->held = true;
        else if (p == PARSE_BAD || c->frame.stream > 0xffff || !for_keeper(c->frame.type) ||
                 !m->on_keeper(m->context, c, &c->frame))
            c->closing = true;
    }
    if (!c->closing && c->held)
        release(m, c);
}

void mux_client_feed(struct mux *m, struct mux_client *c, const uint8_t *data, size_t size) {
    if (c->closing)
        return;
    if (!bytes_append(&c->in, data, size))
        c->closing = true;
    advance(m, c);
}

void mux_pump(struct mux *m) {
    /* Each turn begins with another client, so that none is always last. */
    for (size_t i = 0; i < m->client_count; i++) {
        struct mux_client *c = m->clients[(m->turn + i) % m->client_count];
        if (c->held)
            advance(m, c);
    }
    m->turn++;
}
