#include "line.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/stat.h>
#include <unistd.h>

#include "bytes.h"
#include "log.h"
#include "loop.h"
#include "wire.h"

enum {
    /* virtio_console copies at most this much a write. A data frame with its header is made to fit it, so
     * that one frame is one descriptor and one notification. */
    WRITE_MAX = 32768,
    LOG_HIGH = 64 * 1024,
    READS_A_TURN = 32,
};

static struct {
    struct watch watch;
    bool readable, blocked, lost, synced, device, out_watched;
    uint8_t buffer[FRAME_MAX];
    const uint8_t *at;
    size_t left;
    int reads;
    struct intake intake;
    struct bytes out;
} line = {.watch.fd = -1};

static const uint8_t sync_header[FRAME_HEADER] = {FRAME_MAGIC, F_SYNC, 0, 0, SYNC_SIZE};

bool resync_feed(struct resync *r, const uint8_t **data, size_t *size) {
    while (*size > 0) {
        uint8_t b = *(*data)++;
        --*size;
        /* The header's first byte occurs nowhere else in it, so a mismatch needs no more than one step back. */
        if (r->used < FRAME_HEADER && b != sync_header[r->used])
            r->used = 0;
        if (r->used > 0 || b == FRAME_MAGIC)
            r->seen[r->used++] = b;
        if (r->used == sizeof r->seen) {
            r->used = 0;
            return true;
        }
    }
    return false;
}

bool intake_feed(struct intake *in, const uint8_t **data, size_t *size, struct frame *out) {
    if (!in->skipping) {
        switch (parser_feed(&in->parser, data, size, out)) {
        case PARSE_FRAME:
            return true;
        case PARSE_MORE:
            return false;
        case PARSE_BAD:
            in->skipping = true;
            in->parser.used = in->resync.used = 0;
        }
    }
    if (!resync_feed(&in->resync, data, size))
        return false;
    in->skipping = false;
    *out = (struct frame){.type = F_SYNC, .length = SYNC_SIZE, .payload = in->resync.seen + FRAME_HEADER};
    return true;
}

static void line_news(struct watch *w, uint32_t events) {
    (void)w;
    if (events & (EPOLLIN | EPOLLHUP | EPOLLERR))
        line.readable = true;
    if (events & EPOLLOUT)
        line.blocked = false;
}

/* Room to write is watched only while it is wanted: a virtio port tells of every buffer that the host took. */
static void line_block(void) {
    line.blocked = true;
    if (!line.out_watched && loop_change(&line.watch, EPOLLIN | EPOLLOUT) == 0)
        line.out_watched = true;
}

static void line_unblock(void) {
    if (line.out_watched && loop_change(&line.watch, EPOLLIN) == 0)
        line.out_watched = false;
}

int line_open(int fd) {
    struct stat st;
    if (fstat(fd, &st) < 0 || fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK) < 0 || fcntl(fd, F_SETFD, FD_CLOEXEC) < 0)
        return -1;
    if (line.watch.fd >= 0)
        loop_close(&line.watch);
    bytes_clear(&line.out);
    line.intake = (struct intake){0};
    line.left = 0;
    line.lost = line.blocked = line.synced = line.out_watched = false;
    line.device = S_ISCHR(st.st_mode);
    line.watch = (struct watch){.fd = fd, .on = line_news};
    line.readable = true;
    return loop_add(&line.watch, EPOLLIN);
}

static bool line_fill(void) {
    if (!line.readable || line.lost || line.reads >= READS_A_TURN)
        return false;
    line.reads++;
    ssize_t n = read(line.watch.fd, line.buffer, sizeof line.buffer);
    if (n > 0) {
        line.at = line.buffer;
        line.left = (size_t)n;
        return true;
    }
    if (n < 0 && errno == EINTR)
        return line_fill();
    line.readable = false;
    /* A virtio port reads as ended while no host is connected; the host's coming back wakes us. */
    if ((n == 0 || errno != EAGAIN) && !line.device)
        line.lost = true;
    return false;
}

bool line_next(struct frame *out) {
    for (;;) {
        if (line.out.used > LINE_HIGH || (line.left == 0 && !line_fill())) {
            line.reads = 0;
            return false;
        }
        bool skipped = line.intake.skipping;
        bool whole = intake_feed(&line.intake, &line.at, &line.left, out);
        if (!skipped && line.intake.skipping)
            log_line("malformed frame: skipping to the next SYNC");
        if (whole)
            return true;
    }
}

bool line_pending(void) {
    return line.out.used <= LINE_HIGH && (line.left > 0 || (line.readable && !line.lost));
}

void line_close(void) {
    loop_close(&line.watch);
    bytes_clear(&line.out);
    line.left = 0;
    line.lost = true;
}

bool line_lost(void) { return line.lost; }

void line_send(uint8_t type, uint32_t stream, const void *payload, size_t size) {
    uint8_t *at = size <= FRAME_MAX ? bytes_room(&line.out, FRAME_HEADER + size) : NULL;
    if (!at)
        return;
    frame_header(at, type, stream, (uint32_t)size);
    if (size)
        memcpy(at + FRAME_HEADER, payload, size);
    bytes_added(&line.out, FRAME_HEADER + size);
}

void line_error(uint32_t stream, int error, const char *text) {
    struct writer w = {0};
    write_u32(&w, (uint32_t)error);
    write_string(&w, text);
    if (!w.bad)
        line_send(F_ERROR, stream, w.data, w.used);
    writer_free(&w);
}

bool line_log(const char *text, size_t size) {
    if (!line.synced || line.lost || line.out.used > LOG_HIGH)
        return false;
    line_send(F_LOG, 0, text, size);
    return true;
}

void line_synced(const uint8_t nonce[NONCE_SIZE]) {
    uint8_t payload[SYNC_SIZE];
    memcpy(payload, nonce, NONCE_SIZE);
    put_u32(payload + NONCE_SIZE, PROTOCOL_VERSION);
    bytes_clear(&line.out);
    line_send(F_SYNCED, 0, payload, sizeof payload);
    line.synced = true;
}

bool line_heard(void) { return line.synced && !line.lost; }

bool line_room(void) { return !line.lost && line.out.used < WRITE_MAX; }

uint8_t *line_reserve(size_t size) {
    uint8_t *at = bytes_room(&line.out, DATA_HEADER + size);
    return at ? at + DATA_HEADER : NULL;
}

void line_commit(uint32_t stream, uint8_t channel, size_t size) {
    uint8_t *at = line.out.data + line.out.start + line.out.used;
    frame_header(at, F_DATA, stream, (uint32_t)size + 1);
    at[FRAME_HEADER] = channel;
    bytes_added(&line.out, DATA_HEADER + size);
}

void line_flush(void) {
    while (!line.blocked && !line.lost && line.out.used > 0) {
        size_t size = line.out.used;
        ssize_t n = write(line.watch.fd, bytes_head(&line.out), size < WRITE_MAX ? size : WRITE_MAX);
        if (n > 0)
            bytes_take(&line.out, (size_t)n);
        else if (n < 0 && (errno == EAGAIN || (errno != EINTR && line.device)))
            line_block();
        else if (n < 0 && errno != EINTR)
            line.lost = true;
    }
    if (line.out.used == 0)
        line_unblock();
}

void line_drain(int ms) {
    int64_t end = now_ms() + ms;
    for (;;) {
        line_flush();
        int64_t left = end - now_ms();
        if (line.out.used == 0 || line.lost || left <= 0)
            return;
        struct pollfd p = {.fd = line.watch.fd, .events = POLLOUT};
        if (poll(&p, 1, (int)left) < 0 || (p.revents & (POLLHUP | POLLERR)))
            return;
        line.blocked = false;
    }
}
