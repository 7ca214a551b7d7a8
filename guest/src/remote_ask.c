#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "answers.h"
#include "builtins.h"
#include "remote.h"
#include "target.h"

#ifndef SECCOMP_ADDFD_FLAG_SEND
#define SECCOMP_ADDFD_FLAG_SEND (1UL << 1)
#endif

enum { PUT_SEND = 1, PUT_SETFD = 2 };

static bool valid(const struct remote *m, uint64_t id) { return ioctl(m->listener, SECCOMP_IOCTL_NOTIF_ID_VALID, &id) == 0; }

static int replied(bool sent) { return sent ? 0 : EPIPE; }

static int failed(uint32_t request, int error) { return replied(remote_result(request, error, NULL, 0)); }

static int take_table(struct remote *m, struct reader *r) {
    uint32_t count = read_u32(r);
    if (m->table_given || count > REMOTE_TABLE)
        return EPROTO;
    for (uint32_t i = 0; i < count; i++) {
        struct ahead *a = &m->table[i];
        a->nr = read_u32(r);
        a->arg = read_u8(r);
        a->kind = read_u8(r);
        a->length = read_u32(r);
        if (a->arg > 5 || a->kind > 2 || (a->kind == 2 && a->length > 5))
            return EPROTO;
    }
    m->table_count = count;
    m->table_given = true;
    return reader_done(r) ? 0 : EPROTO;
}

static int read_memory(struct remote *m, struct reader *r) {
    static uint8_t buffer[REMOTE_READ];
    uint32_t request = read_u32(r);
    uint64_t id = read_u64(r);
    uint32_t pid = read_u32(r);
    uint64_t address = read_u64(r);
    uint32_t length = read_u32(r);
    if (!reader_done(r))
        return EPROTO;
    if (length > sizeof buffer)
        return failed(request, E2BIG);
    ssize_t n = target_read((pid_t)pid, address, buffer, length);
    int error = n < 0 ? errno : 0;
    /* That it still waits says that it was read, and not who got its number after it. */
    if (!valid(m, id))
        error = ENOENT;
    return replied(remote_result(request, error, buffer, error ? 0 : (size_t)n));
}

static int write_memory(struct remote *m, struct reader *r) {
    uint32_t request = read_u32(r);
    uint64_t id = read_u64(r);
    uint32_t pid = read_u32(r);
    uint64_t address = read_u64(r);
    if (r->bad)
        return EPROTO;
    /* Opened first: then it is this process's memory, or none, that is written, whoever gets its number. */
    int memory = target_memory((pid_t)pid);
    int error = memory < 0 ? errno : valid(m, id) ? 0 : ENOENT;
    if (!error && target_write(memory, address, r->at, r->left) < 0)
        error = errno;
    if (memory >= 0)
        close(memory);
    return failed(request, error);
}

static int answer(struct remote *m, struct reader *r) {
    struct seccomp_notif_resp a = {.id = read_u64(r)};
    a.val = (int64_t)read_u64(r);
    a.error = (int32_t)read_u32(r);
    a.flags = read_u32(r);
    if (!reader_done(r))
        return EPROTO;
    /* Too late is no fault; what the kernel cannot do with it must not leave the program waiting. */
    if (ioctl(m->listener, SECCOMP_IOCTL_NOTIF_SEND, &a) < 0 && errno != ENOENT && errno != EINPROGRESS) {
        a = (struct seccomp_notif_resp){.id = a.id, .error = -EPERM};
        ioctl(m->listener, SECCOMP_IOCTL_NOTIF_SEND, &a);
    }
    remote_answered(m, a.id);
    return 0;
}

/* Put `fd` into the program and say so. */
static int put(struct remote *m, uint32_t request, uint64_t id, int fd, uint8_t flags, uint32_t newfd, uint32_t newfd_flags) {
    struct seccomp_notif_addfd add = {.id = id, .srcfd = (uint32_t)fd, .newfd = flags & PUT_SETFD ? newfd : 0, .newfd_flags = newfd_flags & O_CLOEXEC};
    add.flags = (uint32_t)((flags & PUT_SETFD ? SECCOMP_ADDFD_FLAG_SETFD : 0) | (flags & PUT_SEND ? SECCOMP_ADDFD_FLAG_SEND : 0));
    int32_t number = ioctl(m->listener, SECCOMP_IOCTL_NOTIF_ADDFD, &add);
    if (number < 0)
        return failed(request, errno);
    if (flags & PUT_SEND)
        remote_answered(m, id);
    return replied(remote_result(request, 0, &number, sizeof number));
}

struct put_words {
    uint32_t request, newfd, newfd_flags;
    uint64_t id;
    uint8_t flags;
};

static struct put_words put_words(struct reader *r) {
    struct put_words w = {.request = read_u32(r)}; /* one read an expression: they are in no order within a list */
    w.id = read_u64(r);
    w.flags = read_u8(r);
    w.newfd = read_u32(r);
    w.newfd_flags = read_u32(r);
    return w;
}

/* A memfd that can be read only, and from its start. */
static int content(const void *data, size_t size) {
    char place[40];
    int fd = memfd_create("given", MFD_CLOEXEC);
    if (fd < 0)
        return -1;
    int error = write_all(fd, data, size);
    snprintf(place, sizeof place, "/proc/self/fd/%d", fd);
    int read_only = error ? -1 : open(place, O_RDONLY | O_CLOEXEC);
    if (!error)
        error = errno;
    close(fd);
    errno = error;
    return read_only;
}

static int give_bytes(struct remote *m, struct reader *r) {
    struct put_words w = put_words(r);
    if (r->bad)
        return EPROTO;
    int fd = content(r->at, r->left);
    if (fd < 0)
        return failed(w.request, errno);
    int error = put(m, w.request, w.id, fd, w.flags, w.newfd, w.newfd_flags);
    close(fd);
    return error;
}

static struct channel *channel_of(struct remote *m, uint32_t number, bool free) {
    for (int i = 0; i < REMOTE_CHANNELS; i++)
        if (free ? m->channels[i].fd < 0 : m->channels[i].fd >= 0 && m->channels[i].number == number)
            return &m->channels[i];
    return NULL;
}

static int give_channel(struct remote *m, struct reader *r) {
    struct put_words w = put_words(r);
    int pair[2];
    if (!reader_done(r) || channel_of(m, w.request, false))
        return EPROTO;
    struct channel *c = channel_of(m, 0, true);
    if (!c || socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) < 0)
        return failed(w.request, c ? errno : EMFILE);
    *c = (struct channel){.number = w.request, .fd = pair[0]};
    int error = put(m, w.request, w.id, pair[1], w.flags, w.newfd, w.newfd_flags);
    close(pair[1]); /* if it was not put, the channel is at its end */
    return error;
}

static int channel_bytes(struct remote *m, struct reader *r, bool end) {
    struct channel *c = channel_of(m, read_u32(r), false);
    if (r->bad || (end && r->left))
        return EPROTO;
    if (!c || c->ended)
        return 0; /* they crossed its end */
    if (end) {
        c->ended = true;
        if (!c->out.used)
            shutdown(c->fd, SHUT_WR);
        if (c->read_all && !c->out.used)
            remote_close(c);
    } else if (c->out.used + r->left > REMOTE_READ) {
        struct writer w;
        remote_begin(&w, 'e');
        write_u32(&w, c->number);
        remote_close(c);
        return replied(remote_send(&w));
    } else if (!bytes_append(&c->out, r->at, r->left)) {
        return ENOMEM;
    }
    return 0;
}

/* To the answerer, which had room when we looked. */
static int hand_over(struct remote *m, char type, const uint8_t *data, size_t size) {
    struct writer w = {0};
    write_u8(&w, (uint8_t)type);
    write_bytes(&w, data, size);
    bool sent = !w.bad && w.used <= ANSWER_MESSAGE && send(m->answerer, w.data, w.used, MSG_NOSIGNAL | MSG_DONTWAIT) == (ssize_t)w.used;
    writer_free(&w);
    return sent ? 0 : EPIPE;
}

static int hand_off(struct remote *m, struct reader *r) {
    struct reader whole = *r;
    uint8_t flags = read_u8(r);
    const uint8_t *bytes = read_bytes(r, sizeof(struct seccomp_notif));
    struct seccomp_notif call;
    if (!bytes || !reader_done(r))
        return EPROTO;
    memcpy(&call, bytes, sizeof call);
    if (!(flags & 1))
        remote_answered(m, call.id);
    return hand_over(m, 'H', whole.at, whole.left);
}

static int behalf(struct remote *m, struct reader *r, char type) {
    struct reader whole = *r;
    struct behalf b;
    if (!behalf_read(r, type, &b))
        return EPROTO;
    uint32_t request = b.request, flags = (uint32_t)b.flags;
    uint64_t id = b.id;
    behalf_free(&b);
    for (size_t i = 0; type == 'P' && i < REMOTE_OPENS; i++)
        if (!m->opens[i].used) {
            m->opens[i] = (struct opened){.request = request, .id = id, .newfd_flags = flags & O_CLOEXEC, .used = true};
            return hand_over(m, type, whole.at, whole.left);
        }
    return type == 'P' ? failed(request, EAGAIN) : hand_over(m, type, whole.at, whole.left);
}

int remote_told(struct remote *m, const uint8_t *data, size_t size, int fd) {
    struct reader r = reader_of(data + 1, size - 1);
    if ((data[0] == 'B' || data[0] == 'D') && size == 9) {
        struct writer w;
        if (data[0] == 'D')
            remote_answered(m, read_u64(&r));
        remote_begin(&w, data[0] == 'B' ? 'b' : 'a');
        write_bytes(&w, data + 1, 8);
        return replied(remote_send(&w));
    }
    uint32_t request = read_u32(&r), error = read_u32(&r);
    if (data[0] != 'R' || !reader_done(&r))
        return EPROTO;
    for (size_t i = 0; i < REMOTE_OPENS; i++)
        if (m->opens[i].used && m->opens[i].request == request) {
            m->opens[i].used = false;
            if (!error && fd >= 0)
                return put(m, request, m->opens[i].id, fd, PUT_SEND, 0, m->opens[i].newfd_flags);
        }
    return failed(request, (int)error);
}

int remote_ask(struct remote *m, const uint8_t *data, size_t size) {
    struct reader r = reader_of(data + 1, size - 1);
    switch (data[0]) {
    case 't': return take_table(m, &r);
    case 'r': return read_memory(m, &r);
    case 'w': return write_memory(m, &r);
    case 'd': return answer(m, &r);
    case 'f': return give_bytes(m, &r);
    case 'F': return give_channel(m, &r);
    case 's': return channel_bytes(m, &r, false);
    case 'e': return channel_bytes(m, &r, true);
    case 'h': return hand_off(m, &r);
    case 'p': return behalf(m, &r, 'P');
    case 'm': return behalf(m, &r, 'M');
    case 'N': return behalf(m, &r, 'N');
    case 'v': {
        uint32_t request = read_u32(&r);
        uint64_t id = read_u64(&r);
        return reader_done(&r) ? failed(request, valid(m, id) ? 0 : ENOENT) : EPROTO;
    }
    default: return EPROTO;
    }
}
