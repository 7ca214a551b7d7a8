#include "stream.h"

#include <errno.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "keys.h"
#include "line.h"
#include "power.h"
#include "request.h"

enum {
    /* With its header exactly what virtio_console copies at once. */
    CHUNK = 32768 - DATA_HEADER,
    /* Tell the client of consumed bytes in steps: a quarter of what may be in flight. */
    GRANT_STEP = WINDOW_SIZE / 4,
    /* More cannot wait in a terminal's buffers when its command ends. */
    PTY_LAST = 128 * 1024,
    CREDIT_MAX = 1 << 30,
    PUMP_TURNS = 64,
    LOG_RATE = 4096, /* bytes of the program's output a ms, so that the line is there for others */
    LOG_BURST = 256 * 1024,
    LOG_WAIT_MS = 20,
    CONTROL_D = 4,
};

static struct source *first, *last;
static int64_t log_left = LOG_BURST, log_at;
static bool log_waits;

static void enqueue(struct source *s) {
    if (s->queued)
        return;
    s->queued = true;
    s->next = NULL;
    *(first ? &last->next : &first) = s;
    last = s;
}

static struct source *dequeue(void) {
    struct source *s = first;
    first = s->next;
    s->queued = false;
    return s;
}

void source_wake(struct source *s) {
    if (s->watch.fd >= 0 && s->ready)
        enqueue(s);
}

static void source_news(struct watch *w, uint32_t events) {
    struct source *s = (struct source *)w;
    s->ready = true;
    if (events & (EPOLLHUP | EPOLLERR))
        s->hung_up = true;
    enqueue(s);
}

void source_open(struct source *s, struct command *of, int fd, uint8_t channel, bool pty) {
    *s = (struct source){.watch = {.fd = fd, .on = source_news}, .of = of, .channel = channel, .pty = pty, .credit = WINDOW_SIZE, .left = -1};
    if (fd >= 0)
        loop_add(&s->watch, EPOLLIN);
}

void source_grant(struct source *s, uint32_t more) {
    s->credit = more > CREDIT_MAX - s->credit ? CREDIT_MAX : s->credit + more;
    source_wake(s);
}

static void source_end(struct source *s) {
    loop_close(&s->watch);
    if (s->of->attached) {
        uint8_t channel = s->channel;
        line_send(F_DATA, s->of->stream, &channel, 1);
    }
}

void source_last(struct source *s) {
    if (s->watch.fd < 0)
        return;
    int waiting = 0;
    s->left = s->pty ? PTY_LAST : ioctl(s->watch.fd, FIONREAD, &waiting) == 0 ? waiting : 0;
    if (s->left == 0) {
        source_end(s);
        return;
    }
    s->ready = true;
    enqueue(s);
}

/* The machine's program is read by the keeper, for its log, and by nobody else. */
static bool is_logged(const struct source *s) { return s->of->flags & EXEC_PROGRAM; }

static bool is_sent(const struct source *s) { return s->of->attached || is_logged(s); }

static bool is_spent(const struct source *s) { return s->of->attached && !is_logged(s) && s->credit == 0; }

static bool has_room(const struct source *s) { return line_room() && (!is_logged(s) || line_heard()); }

/* A shutdown waits for nothing: what was written is sent. */
static bool must_wait(const struct source *s) {
    if (!is_logged(s) || power_wait() >= 0)
        return false;
    int64_t now = now_ms(), passed = now - log_at;
    log_at = now;
    if (passed > 0)
        log_left = passed > LOG_BURST / LOG_RATE ? LOG_BURST : log_left + passed * LOG_RATE;
    if (log_left > LOG_BURST)
        log_left = LOG_BURST;
    log_waits |= log_left <= 0;
    return log_left <= 0;
}

int source_wait(int other) { return log_waits && (other < 0 || other > LOG_WAIT_MS) ? LOG_WAIT_MS : other; }

/* One read. True if the source may have more. */
static bool source_read(struct source *s) {
    uint8_t thrown_away[4096];
    bool sent = is_sent(s);
    size_t want = sent ? CHUNK : sizeof thrown_away;
    if (sent && !is_logged(s) && want > s->credit)
        want = s->credit;
    if (s->left >= 0 && (int64_t)want > s->left)
        want = (size_t)s->left;
    uint8_t *at = sent ? line_reserve(want) : thrown_away;
    ssize_t n = at ? read(s->watch.fd, at, want) : -1;
    if (n < 0 && (!at || errno == EINTR))
        return true;
    if (n <= 0) {
        s->ready = false;
        /* A terminal whose last user has gone says EIO; one that nobody has opened yet says it too, but then the
         * command's own descriptors are still there. */
        if (n == 0 || errno != EAGAIN || s->left >= 0)
            source_end(s);
        return false;
    }
    if (sent) {
        line_commit(is_logged(s) ? 0 : s->of->stream, s->channel, (size_t)n);
        s->credit -= is_logged(s) ? 0 : (uint32_t)n;
        log_left -= is_logged(s) ? n : 0;
    }
    if (s->left >= 0 && (s->left -= n) == 0) {
        source_end(s);
        return false;
    }
    /* A pipe that gave less than was asked is empty, and the next write to it is news, unless there is no writer. */
    if ((size_t)n < want && !s->pty && !s->hung_up && s->left < 0)
        return s->ready = false;
    return true;
}

bool source_pump(void) {
    bool more = false;
    const struct source *blocked = NULL;
    log_waits = false;
    for (int turns = 0; first && first != blocked && turns < PUMP_TURNS;) {
        struct source *s = dequeue();
        if (s->watch.fd < 0 || !s->ready || is_spent(s))
            continue;
        if (is_sent(s) && !has_room(s))
            line_flush();
        if (must_wait(s) || (is_sent(s) && !has_room(s))) {
            /* Those without a client are still read: they must not stand still with the line. */
            blocked = blocked ? blocked : s;
            enqueue(s);
            continue;
        }
        turns++;
        if (source_read(s)) {
            enqueue(s);
            more = true;
        }
    }
    return more;
}

static void sink_news(struct watch *w, uint32_t events);

void sink_open(struct sink *s, struct command *of, int fd, bool pty) {
    *s = (struct sink){.watch = {.fd = fd, .on = sink_news}, .of = of, .pty = pty, .keys = -1, .granted = WINDOW_SIZE};
}

void sink_close(struct sink *s) {
    if (s->watched)
        loop_close(&s->watch);
    else if (s->watch.fd >= 0)
        close(s->watch.fd);
    s->watch.fd = -1;
    if (s->keys >= 0)
        close(s->keys);
    s->keys = -1;
    bytes_clear(&s->waiting);
}

static void sink_consumed(struct sink *s, size_t size) {
    s->consumed += (uint32_t)size;
    if (s->consumed < GRANT_STEP || !s->of->attached || s->of->ended)
        return;
    uint8_t payload[5] = {CH_STDIN};
    put_u32(payload + 1, s->consumed);
    line_send(F_WINDOW, s->of->stream, payload, sizeof payload);
    s->granted += s->consumed;
    s->consumed = 0;
}

static ssize_t sink_put(const struct sink *s, const uint8_t *data, size_t size) {
    return s->keys < 0 ? write(s->watch.fd, data, size) : keys_write(s->watch.fd, s->keys, data, size);
}

/* Write what the command takes now; the number of bytes done with, which is all once nobody reads them any more. */
static size_t sink_write(struct sink *s, const uint8_t *data, size_t size) {
    size_t done = 0;
    while (done < size) {
        ssize_t n = s->watch.fd < 0 ? (ssize_t)(size - done) : sink_put(s, data + done, size - done);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0 && errno == EAGAIN)
            break;
        if (n < 0)
            n = (ssize_t)(size - done);
        done += (size_t)n;
    }
    sink_consumed(s, done);
    return done;
}

static void sink_finish(struct sink *s) {
    /* A terminal has no end of file of its own: it is a character. */
    if (!s->pty) {
        sink_close(s);
        return;
    }
    uint8_t end = CONTROL_D;
    if (s->watch.fd >= 0 && write(s->watch.fd, &end, 1) < 0) {
        /* A terminal that takes no more input has nobody who waits for its end. */
    }
}

static void sink_news(struct watch *w, uint32_t events) {
    (void)events;
    struct sink *s = (struct sink *)w;
    if (s->waiting.used)
        bytes_take(&s->waiting, sink_write(s, bytes_head(&s->waiting), s->waiting.used));
    if (s->ended && s->waiting.used == 0)
        sink_finish(s);
}

bool sink_take(struct sink *s, const uint8_t *data, size_t size) {
    if (size > s->granted)
        return false;
    s->granted -= (uint32_t)size;
    if (s->ended || s->of->ended)
        return true;
    if (size == 0) {
        s->ended = true;
        if (s->waiting.used == 0)
            sink_finish(s);
        return true;
    }
    size_t done = s->waiting.used ? 0 : sink_write(s, data, size);
    if (done == size)
        return true;
    if (!bytes_append(&s->waiting, data + done, size - done)) {
        sink_close(s); /* out of memory: to the command it is the end of its input */
        return true;
    }
    if (!s->watched) {
        s->watched = true;
        loop_add(&s->watch, EPOLLOUT);
    }
    return true;
}
