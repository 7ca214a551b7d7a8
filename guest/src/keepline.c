#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <unistd.h>

#include "keep.h"
#include "wire.h"

enum {
    STALL_MS = 5000,             /* a client that holds up the line and takes nothing for this long is closed */
    BUDGET_FIRST = 1024 * 1024,  /* noise that is read at full speed ... */
    BUDGET = 64 * 1024,          /* ... and then every PAUSE_MS, so that a guest's garbage costs little */
    PAUSE_MS = 10,
    OUTPUT_RATE = 8192,          /* bytes of its program's output a ms that are no noise: twice what an honest guest sends (stream.c) */
    OUTPUT_BURST = 1024 * 1024,
    BACKOFF_MS = 10,             /* the first new SYNC after a malformed frame; doubles up to ... */
    BACKOFF_MOST_MS = 1000,
    SETTLED_MS = 10000,          /* ... and is forgotten after this long without one */
    DRAIN_CHUNKS = 64,
    OTHERS_MS = 3000,            /* for the SIGTERM and SIGKILL that end what is left when the program has (power.h) */
    LINGER_MS = 1000,            /* from the line's end until the engine's, which is to come first for the clients */
};

static uint8_t chunk[MUX_CHUNK];

static void begin(struct keeper *k) {
    uint8_t nonce[NONCE_SIZE];
    if (getrandom(nonce, sizeof nonce, 0) != sizeof nonce)
        abort(); /* cannot happen: the call never gives less for so few */
    k->sync_at = INT64_MAX;
    mux_sync(&k->mux, nonce);
}

/* The line was lost in a malformed frame: begin again, less soon each time that it happens. */
static void plan_sync(struct keeper *k) {
    int64_t now = now_ms();
    if (k->synced_at && now - k->synced_at > SETTLED_MS)
        k->backoff = BACKOFF_MS;
    k->sync_at = now + k->backoff;
    k->backoff = k->backoff * 2 < BACKOFF_MOST_MS ? k->backoff * 2 : BACKOFF_MOST_MS;
}

static void note_synced(struct keeper *k) {
    uint32_t version = k->mux.guest_version;
    if (version != PROTOCOL_VERSION) {
        char text[96];
        snprintf(text, sizeof text, "failed the guest speaks version %u of the protocol, not %d\n", version, PROTOCOL_VERSION);
        keep_report(k, text, true);
        keep_kill(k, "version");
        return;
    }
    k->synced_at = k->active = now_ms();
    keep_report(k, "synced\n", true);
}

/* The line ended. Most often its engine has, and the clients learn that when the machine is no longer alive. What they send
 * meanwhile waits for a new call. */
static void lose_line(struct keeper *k) {
    loop_close(&k->line);
    bytes_clear(&k->mux.line);
    k->mux.state = MUX_BROKEN;
    k->sync_at = INT64_MAX;
    k->lose_at = now_ms() + LINGER_MS;
}

/* Take the guest's call once the line before has ended. What clients had on that one is gone. */
static void accept_line(struct keeper *k) {
    while (k->dialled_ready && k->line.fd < 0) {
        int fd = accept4(k->dialled.fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
        if (fd < 0) {
            k->dialled_ready = errno == EINTR || errno == ECONNABORTED;
            continue;
        }
        k->line.fd = fd;
        k->line_readable = k->line_writable = false;
        k->lose_at = INT64_MAX;
        if (loop_add(&k->line, EPOLLIN | EPOLLOUT) < 0) {
            lose_line(k);
            return;
        }
        mux_break(&k->mux);
        begin(k);
    }
}

static void throttle(struct keeper *k) {
    k->budget -= (int64_t)(k->mux.noise - k->noise);
    k->noise = k->mux.noise;
    if (k->budget > 0)
        return;
    k->budget = BUDGET;
    k->throttled = now_ms() + PAUSE_MS;
}

/* Read the line once. True if it gave something. */
static bool read_line(struct keeper *k) {
    if (k->line.fd < 0 || !k->line_readable)
        return false;
    ssize_t n = read(k->line.fd, chunk, sizeof chunk);
    if (n > 0) {
        enum mux_state before = k->mux.state;
        mux_guest_feed(&k->mux, chunk, (size_t)n);
        if (before == MUX_SYNCING && k->mux.state != MUX_SYNCING)
            note_synced(k);
        throttle(k);
        return true;
    }
    if (n == 0 || (errno != EAGAIN && errno != EINTR))
        lose_line(k);
    else
        k->line_readable = errno == EINTR;
    return false;
}

static void write_line(struct keeper *k) {
    struct bytes *q = &k->mux.line;
    while (k->line.fd >= 0 && k->line_writable && q->used > 0) {
        ssize_t n = write(k->line.fd, bytes_head(q), q->used);
        if (n > 0)
            bytes_take(q, (size_t)n);
        else if (n < 0 && errno == EAGAIN)
            k->line_writable = false;
        else if (n < 0 && errno != EINTR)
            lose_line(k);
    }
}

static void drop(struct keeper *k, struct connection *c) {
    loop_close(&c->watch);
    mux_leave(&k->mux, c->client);
    free(c);
}

static void read_client(struct keeper *k, struct connection *c) {
    if (!c->readable || !mux_wants(c->client))
        return;
    ssize_t n = read(c->watch.fd, chunk, sizeof chunk);
    if (n > 0)
        mux_client_feed(&k->mux, c->client, chunk, (size_t)n);
    else if (n == 0 || (errno != EAGAIN && errno != EINTR))
        c->client->closing = true;
    else
        c->readable = errno == EINTR;
}

static void write_client(struct keeper *k, struct connection *c) {
    struct bytes *q = &c->client->out;
    if (q->used == 0)
        c->progress = now_ms();
    while (c->writable && q->used > 0) {
        ssize_t n = send(c->watch.fd, bytes_head(q), q->used, MSG_NOSIGNAL);
        if (n > 0) {
            mux_taken(&k->mux, c->client, (size_t)n);
            c->progress = now_ms();
        } else if (n < 0 && errno == EAGAIN) {
            c->writable = false;
        } else if (n < 0 && errno != EINTR) {
            c->client->closing = true;
            return;
        }
    }
}

static void client_event(struct watch *w, uint32_t events) {
    struct connection *c = (struct connection *)w;
    c->readable |= (events & (EPOLLIN | EPOLLHUP | EPOLLERR | EPOLLRDHUP)) != 0;
    c->writable |= (events & EPOLLOUT) != 0;
    c->hangup |= (events & (EPOLLHUP | EPOLLERR)) != 0;
}

static void accept_clients(struct keeper *k) {
    while (k->listener_ready && k->listener.fd >= 0) {
        int fd = accept4(k->listener.fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
        if (fd < 0) {
            /* Out of descriptors or memory: whoever waits is taken when the next one comes. */
            k->listener_ready = errno == EINTR || errno == ECONNABORTED;
            continue;
        }
        struct connection *c = calloc(1, sizeof *c);
        if (c)
            *c = (struct connection){.watch = {.fd = fd, .on = client_event}, .progress = now_ms()};
        if (!c || !(c->client = mux_join(&k->mux))) {
            close(fd);
            free(c);
            continue;
        }
        c->client->driver = c;
        if (loop_add(&c->watch, EPOLLIN | EPOLLOUT | EPOLLRDHUP) < 0)
            drop(k, c);
    }
}

static void serve_clients(struct keeper *k, bool line_waits) {
    struct mux *m = &k->mux;
    for (size_t i = 0; i < m->client_count;) {
        struct connection *c = m->clients[i]->driver;
        read_client(k, c);
        write_client(k, c);
        bool stuck = line_waits && c->client->out.used > 0 && now_ms() - c->progress >= STALL_MS;
        if (c->client->closing || stuck || (c->hangup && !mux_wants(c->client)))
            drop(k, c); /* the last client takes its place */
        else
            i++;
    }
}

/* Whether another pass would find something to do: edges that came are not told again. */
static bool unfinished(const struct keeper *k) {
    const struct mux *m = &k->mux;
    if (k->line.fd >= 0 && m->state == MUX_BROKEN && k->sync_at == INT64_MAX)
        return true;
    if (k->line.fd >= 0 && k->line_readable && mux_line_wants(m) && now_ms() >= k->throttled)
        return true;
    if (k->line.fd < 0 && k->dialled_ready)
        return true;
    for (size_t i = 0; i < m->client_count; i++) {
        const struct connection *c = m->clients[i]->driver;
        if (c->client->closing || (c->readable && mux_wants(c->client)) || (c->writable && c->client->out.used > 0))
            return true;
        if (c->client->held && m->state == MUX_SYNCED && m->line.used <= MUX_LINE_HIGH)
            return true;
    }
    return false;
}

/* Of what is left until it is killed the machine's program gets all but what those that are left then need to end in order. */
static bool tell_shutdown(struct keeper *k, int64_t now) {
    uint8_t payload[5] = {0};
    int64_t left = k->kill_at > now ? k->kill_at - now : 0, others = left / 3 < OTHERS_MS ? left / 3 : OTHERS_MS;
    put_u32(payload + 1, left - others < UINT32_MAX ? (uint32_t)(left - others) : UINT32_MAX);
    return mux_tell_guest(&k->mux, F_SHUTDOWN, 0, payload, sizeof payload);
}

bool keepline_serve(struct keeper *k) {
    int64_t now = now_ms();
    struct mux *m = &k->mux;
    if (k->line.fd >= 0 && m->state == MUX_BROKEN && k->sync_at == INT64_MAX)
        plan_sync(k);
    if (now >= k->sync_at)
        begin(k);
    if (now >= k->lose_at) {
        k->lose_at = INT64_MAX;
        mux_lose(m);
    }
    accept_line(k);
    accept_clients(k);
    bool wants = mux_line_wants(m);
    if (wants && now >= k->throttled)
        read_line(k);
    if (k->tell_shutdown && m->state == MUX_SYNCED) {
        k->tell_shutdown = !tell_shutdown(k, now);
    }
    serve_clients(k, !wants);
    write_line(k);
    if (m->line.used <= MUX_LINE_HIGH) {
        mux_pump(m);
        write_line(k);
    }
    if (m->traffic != k->traffic) {
        k->traffic = m->traffic;
        k->active = now;
    }
    return unfinished(k);
}

int64_t keepline_deadline(const struct keeper *k) {
    int64_t at = k->sync_at < k->lose_at ? k->sync_at : k->lose_at;
    if (k->line.fd >= 0 && k->line_readable && mux_line_wants(&k->mux) && k->throttled < at)
        at = k->throttled;
    if (!mux_line_wants(&k->mux))
        for (size_t i = 0; i < k->mux.client_count; i++) {
            const struct connection *c = k->mux.clients[i]->driver;
            if (c->client->out.used > 0 && c->progress + STALL_MS < at)
                at = c->progress + STALL_MS;
        }
    return at;
}

static void line_event(struct watch *w, uint32_t events) {
    struct keeper *k = (struct keeper *)((char *)w - offsetof(struct keeper, line));
    k->line_readable |= (events & (EPOLLIN | EPOLLHUP | EPOLLERR)) != 0;
    k->line_writable |= (events & EPOLLOUT) != 0;
}

static void listener_event(struct watch *w, uint32_t events) {
    (void)events;
    ((struct keeper *)((char *)w - offsetof(struct keeper, listener)))->listener_ready = true;
}

static void dialled_event(struct watch *w, uint32_t events) {
    (void)events;
    ((struct keeper *)((char *)w - offsetof(struct keeper, dialled)))->dialled_ready = true;
}

static void on_log(void *context, const uint8_t *data, size_t size) {
    struct keeper *k = context;
    if (k->init_log.cap)
        keepfiles_log(k, &k->init_log, data, size);
}

static void on_output(void *context, const uint8_t *data, size_t size) {
    struct keeper *k = context;
    struct logfile *log = &k->program_log;
    int64_t now = now_ms(), left = k->output_left + (now - k->output_at) * OUTPUT_RATE;
    k->output_left = left < OUTPUT_BURST ? left : OUTPUT_BURST;
    k->output_at = now;
    if (k->output_left > 0)
        k->output_left -= (int64_t)size;
    else
        k->mux.noise += size;
    if (k->init_log.cap && (log->cap || keepfiles_open_log(k, log, "program", k->init_log.cap)))
        keepfiles_log(k, log, data, size);
}

/* Answer a KEEPER* frame; false if it is malformed. */
static bool on_keeper(void *context, struct mux_client *c, const struct frame *f) {
    struct keeper *k = context;
    char text[256];
    if (f->type == F_KEEPER) {
        int n = snprintf(text, sizeof text, "keeper=%d\nengine=%d\nsynced=%d\nclients=%zu\nuptime_ms=%lld\n", (int)getpid(), (int)keep_engine(k),
                         k->mux.state == MUX_SYNCED, k->mux.client_count, (long long)(now_ms() - k->started));
        mux_answer(&k->mux, c, F_KEEPER_INFO, f->stream, text, (size_t)n);
        return f->length == 0;
    }
    struct reader r = reader_of(f->payload, f->length);
    uint32_t grace = f->type == F_KEEPER_STOP ? read_u32(&r) : 0;
    char *reason = read_string(&r);
    bool good = reason && reader_done(&r) && strlen(reason) < KEEP_REASON && !strchr(reason, '\n');
    if (good && f->type == F_KEEPER_STOP)
        keep_stop(k, grace, reason);
    else if (good)
        keep_kill(k, reason);
    free(reason);
    return good;
}

void keepline_open(struct keeper *k) {
    k->mux.context = k;
    k->mux.on_log = on_log;
    k->mux.on_output = on_output;
    k->mux.on_keeper = on_keeper;
    k->line.on = line_event;
    k->listener.on = listener_event;
    k->budget = BUDGET_FIRST;
    k->backoff = BACKOFF_MS;
    k->dialled.on = dialled_event;
    loop_add(&k->listener, EPOLLIN);
    if (k->line.fd < 0) {
        loop_add(&k->dialled, EPOLLIN);
        return; /* the line begins with the guest's call */
    }
    loop_add(&k->line, EPOLLIN | EPOLLOUT);
    begin(k);
}

void keepline_drain(struct keeper *k) {
    k->line_readable = true;
    for (int i = 0; i < DRAIN_CHUNKS && read_line(k); i++)
        ;
    for (size_t i = 0; i < k->mux.client_count; i++)
        write_client(k, k->mux.clients[i]->driver);
}

void keepline_close(struct keeper *k) {
    loop_close(&k->listener);
    loop_close(&k->dialled);
    while (k->mux.client_count) {
        struct connection *c = k->mux.clients[0]->driver;
        write_client(k, c);
        /* What is unread here would reach the client as a reset instead of an end. */
        for (int i = 0; i < DRAIN_CHUNKS && read(c->watch.fd, chunk, sizeof chunk) > 0; i++)
            ;
        drop(k, c);
    }
}
