#include "remote.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "answers.h"
#include "builtins.h"
#include "target.h"

enum { STDIN, CONNECTION, LISTENER, FIXED, READ = 65536, PAGE = 4096 };

static struct remote remote = {.intake = ANSWER_BUILTIN_FD, .listener = -1, .answerer = -1};

void remote_begin(struct writer *w, char type) {
    *w = (struct writer){0};
    write_u32(w, 0);
    write_u8(w, (uint8_t)type);
}

bool remote_send(struct writer *w) {
    bool sent = false;
    if (!w->bad) {
        uint32_t length = (uint32_t)w->used - 4;
        memcpy(w->data, &length, sizeof length);
        sent = write_all(STDOUT_FILENO, w->data, w->used) == 0;
    }
    writer_free(w);
    return sent;
}

bool remote_result(uint32_t request, int error, const void *data, size_t size) {
    struct writer w;
    remote_begin(&w, 'R');
    write_u32(&w, request);
    write_u32(&w, (uint32_t)error);
    write_bytes(&w, data, size);
    return remote_send(&w);
}

static void note_lowest(struct remote *m) {
    uint64_t lowest = m->page[0] + 1;
    for (size_t i = 0; i < m->call_count; i++)
        if ((int64_t)(m->calls[i] - lowest) < 0)
            lowest = m->calls[i];
    m->page[1] = lowest;
}

void remote_received(struct remote *m, uint64_t id) {
    if (!m->call_count)
        m->page[1] = id;
    m->page[0] = id;
    m->calls[m->call_count++] = id;
}

void remote_answered(struct remote *m, uint64_t id) {
    for (size_t i = 0; i < m->call_count; i++)
        if (m->calls[i] == id) {
            m->calls[i] = m->calls[--m->call_count];
            if (id == m->page[1])
                note_lowest(m);
            return;
        }
}

/* Those whose programs died are answered, too. */
static void prune(struct remote *m) {
    for (size_t i = m->call_count; i-- > 0;)
        if (ioctl(m->listener, SECCOMP_IOCTL_NOTIF_ID_VALID, &m->calls[i]) < 0)
            remote_answered(m, m->calls[i]);
}

static bool token_of(const char *hex, uint8_t *out) {
    if (strlen(hex) != 2 * ANSWER_TOKEN || strspn(hex, "0123456789abcdef") != 2 * ANSWER_TOKEN)
        return false;
    for (int i = 0; i < ANSWER_TOKEN; i++) {
        char pair[3] = {hex[2 * i], hex[2 * i + 1], 0};
        out[i] = (uint8_t)strtoul(pair, NULL, 16);
    }
    return true;
}

static bool send_with(int sock, const void *data, size_t size, int fd) {
    union { struct cmsghdr head; char bytes[CMSG_SPACE(sizeof(int))]; } control = {{0}};
    struct iovec io = {(void *)(uintptr_t)data, size};
    struct msghdr m = {.msg_iov = &io, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
    control.head = (struct cmsghdr){.cmsg_len = CMSG_LEN(sizeof fd), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS};
    memcpy(CMSG_DATA(&control.head), &fd, sizeof fd);
    return sendmsg(sock, &m, MSG_NOSIGNAL) == (ssize_t)size;
}

/* 0, or an errno; then it is said. `refused`: the answerer's, who is there. */
static int attach(struct remote *m, const uint8_t *token, uint32_t *refused) {
    uint8_t hello[1 + ANSWER_TOKEN] = {'A'};
    static uint8_t buffer[ANSWER_MESSAGE];
    int pair[2], fds[2], page = memfd_create("ids", MFD_CLOEXEC);
    memcpy(hello + 1, token, ANSWER_TOKEN);
    if (page < 0 || ftruncate(page, PAGE) < 0 || socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) < 0)
        return complain("answer");
    m->page = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, page, 0);
    /* Our page first, so that it is there before anything can be received. */
    if (m->page == MAP_FAILED || !send_with(pair[0], hello, sizeof hello, page) || !send_with(m->intake, hello, sizeof hello, pair[1]))
        return complain("answer");
    close(pair[1]);
    close(page);
    struct pollfd p = {.fd = pair[0], .events = POLLIN};
    if (poll(&p, 1, 2 * ANSWER_ATTACH_MS) <= 0)
        return errno = ETIMEDOUT, complain("answer");
    ssize_t n = clients_message(pair[0], buffer, fds);
    m->answerer = pair[0];
    m->listener = fds[0];
    if (n == 5 && buffer[0] == 'E')
        memcpy(refused, buffer + 1, sizeof *refused);
    return *refused || (n == 1 && buffer[0] == 'O' && fds[0] >= 0) ? 0 : (errno = EPROTO, complain("answer"));
}

static void read_ahead(struct writer *w, const struct seccomp_notif *call, const struct ahead *a) {
    static uint8_t text[REMOTE_AHEAD];
    uint64_t address = call->data.args[a->arg];
    uint64_t length = a->kind == 2 ? call->data.args[a->length] : a->length;
    ssize_t n = -1;
    if (a->kind == 0)
        n = target_string((pid_t)call->pid, address, (char *)text, sizeof text);
    else if (address)
        n = target_read((pid_t)call->pid, address, text, length < sizeof text ? (size_t)length : sizeof text);
    if (n < 0)
        return;
    w->data[w->bad ? 0 : 5 + sizeof *call]++; /* the count */
    write_u8(w, a->arg);
    write_u32(w, (uint32_t)n);
    write_bytes(w, text, (size_t)n);
}

static int receive(struct remote *m) {
    struct seccomp_notif call = {0};
    struct writer w;
    if (ioctl(m->listener, SECCOMP_IOCTL_NOTIF_RECV, &call) < 0)
        return errno == ENOENT || errno == EINTR ? 0 : errno;
    remote_received(m, call.id);
    remote_begin(&w, 'n');
    write_bytes(&w, &call, sizeof call);
    write_u8(&w, 0);
    int read = 0;
    for (size_t i = 0; i < m->table_count && read < 6 && !w.bad; i++)
        if (m->table[i].nr == (uint32_t)call.data.nr) {
            read_ahead(&w, &call, &m->table[i]);
            read++;
        }
    return remote_send(&w) ? 0 : EPIPE;
}

/* What a program wrote to its end of a channel. */
static bool from_program(struct channel *c) {
    static uint8_t buffer[READ];
    struct writer w;
    ssize_t n = recv(c->fd, buffer, sizeof buffer, MSG_DONTWAIT);
    if (n < 0 && (errno == EAGAIN || errno == EINTR))
        return true;
    remote_begin(&w, n > 0 ? 's' : 'e');
    write_u32(&w, c->number);
    if (n > 0)
        write_bytes(&w, buffer, (size_t)n);
    else
        c->read_all = true;
    return remote_send(&w);
}

/* What the host sent goes on as the program reads; the host is told how much went, and may send as much more. */
static bool to_program(struct channel *c) {
    struct writer w;
    ssize_t n = c->out.used ? send(c->fd, bytes_head(&c->out), c->out.used, MSG_DONTWAIT | MSG_NOSIGNAL) : 0;
    if (n < 0 && errno != EAGAIN && errno != EINTR)
        n = (ssize_t)c->out.used; /* it does not read any more */
    if (n > 0)
        bytes_take(&c->out, (size_t)n);
    if (c->ended && !c->out.used)
        shutdown(c->fd, SHUT_WR);
    if (n <= 0)
        return true;
    remote_begin(&w, 'k');
    write_u32(&w, c->number);
    write_u32(&w, (uint32_t)n);
    return remote_send(&w);
}

/* What programs wrote before they ended, and no more: whoever else has the other end may write on. */
static void last_words(struct channel *c) {
    int waiting = 0;
    if (ioctl(c->fd, FIONREAD, &waiting) < 0)
        return;
    for (int turns = waiting / READ + 1; turns > 0 && !c->read_all && from_program(c); turns--) {
    }
}

void remote_close(struct channel *c) {
    close(c->fd);
    bytes_clear(&c->out);
    *c = (struct channel){.fd = -1};
}

static bool serve_channel(struct channel *c, short events) {
    if (events & POLLOUT && !to_program(c))
        return false;
    bool good = c->read_all || !(events & (POLLIN | POLLHUP | POLLERR)) || from_program(c);
    if (c->read_all && (c->ended || events & (POLLHUP | POLLERR)) && !c->out.used) {
        if (!c->ended) { /* the host, which may have more to send, hears that nobody reads it */
            struct writer w;
            remote_begin(&w, 'e');
            write_u32(&w, c->number);
            good = remote_send(&w) && good;
        }
        remote_close(c);
    }
    return good;
}

/* The next whole message, or 0. -1: it is malformed. */
static ssize_t next_message(const struct remote *m) {
    uint32_t length;
    if (m->in.used < sizeof length)
        return 0;
    memcpy(&length, bytes_head(&m->in), sizeof length);
    if (length == 0 || length > REMOTE_MESSAGE)
        return -1;
    return m->in.used - sizeof length >= length ? (ssize_t)length : 0;
}

static int from_host(struct remote *m, bool *ended) {
    uint8_t *room = bytes_room(&m->in, READ);
    ssize_t n = room ? read(STDIN_FILENO, room, READ) : -1;
    if (n > 0)
        bytes_added(&m->in, (size_t)n);
    *ended = n == 0;
    return n < 0 && errno != EAGAIN && errno != EINTR ? errno : 0;
}

static int from_answerer(struct remote *m) {
    static uint8_t buffer[ANSWER_MESSAGE];
    int fds[2];
    ssize_t n = clients_message(m->answerer, buffer, fds);
    int error = n < 0 ? 0 : n == 0 ? EPIPE : remote_told(m, buffer, (size_t)n, fds[0]);
    for (int i = 0; i < 2; i++)
        if (fds[i] >= 0)
            close(fds[i]);
    return error;
}

static int turn(struct remote *m, bool *ended) {
    struct pollfd p[FIXED + REMOTE_CHANNELS];
    ssize_t size = next_message(m);
    if (size < 0)
        return EPROTO;
    bool receives = m->table_given && m->call_count < REMOTE_CALLS;
    p[STDIN] = (struct pollfd){.fd = size ? -1 : STDIN_FILENO, .events = POLLIN};
    /* A message from the host is at most one to the answerer, which must have room. */
    p[CONNECTION] = (struct pollfd){.fd = m->answerer, .events = POLLIN | (size ? POLLOUT : 0)};
    p[LISTENER] = (struct pollfd){.fd = m->listener, .events = receives ? POLLIN : 0};
    for (int i = 0; i < REMOTE_CHANNELS; i++) {
        const struct channel *c = &m->channels[i];
        p[FIXED + i] = (struct pollfd){.fd = c->fd, .events = (short)((c->read_all ? 0 : POLLIN) | (c->out.used ? POLLOUT : 0))};
    }
    if (poll(p, FIXED + REMOTE_CHANNELS, m->call_count < REMOTE_CALLS ? -1 : 1000) < 0)
        return errno == EINTR ? 0 : errno;
    if (m->call_count == REMOTE_CALLS)
        prune(m);
    /* The answerer ends the connection, too, then. */
    m->over = !(p[LISTENER].revents & POLLIN) && p[LISTENER].revents & (POLLHUP | POLLERR);
    int error = 0;
    if (!m->over && p[CONNECTION].revents & (POLLIN | POLLHUP | POLLERR))
        error = from_answerer(m);
    if (!error && !m->over && size && p[CONNECTION].revents & POLLOUT) {
        error = remote_ask(m, bytes_head(&m->in) + 4, (size_t)size);
        bytes_take(&m->in, (size_t)size + 4);
    }
    if (!error && p[STDIN].revents)
        error = from_host(m, ended);
    for (int i = 0; i < REMOTE_CHANNELS && !error; i++)
        if (p[FIXED + i].revents && m->channels[i].fd == p[FIXED + i].fd && !serve_channel(&m->channels[i], p[FIXED + i].revents))
            error = EPIPE;
    if (!error && p[LISTENER].revents & POLLIN)
        error = receive(m);
    return error;
}

/* Let go of the listener. */
static void let_go(struct remote *m) {
    for (int i = 0; i < REMOTE_CHANNELS; i++)
        if (m->channels[i].fd >= 0) {
            last_words(&m->channels[i]);
            remote_close(&m->channels[i]);
        }
    for (size_t i = 0; i < REMOTE_OPENS; i++)
        m->opens[i].used = false;
    if (m->listener >= 0)
        close(m->listener);
    close(m->answerer);
    munmap(m->page, PAGE);
    m->listener = m->answerer = -1;
    m->call_count = m->table_count = 0;
    m->table_given = m->over = false;
}

/* Say that it is over, or why it never began, and wait for the next token. What the host said meanwhile was about the last one.
 * 0, or an errno; `ended`: there will be none. */
static int rest(struct remote *m, uint32_t why, uint8_t *token, bool *ended) {
    struct writer w;
    struct pollfd p = {.fd = STDIN_FILENO, .events = POLLIN};
    let_go(m);
    remote_begin(&w, 'x');
    write_u32(&w, why);
    *ended = !remote_send(&w);
    while (!*ended) {
        ssize_t size = next_message(m);
        if (size < 0)
            return EPROTO;
        bool found = size == 1 + ANSWER_TOKEN && bytes_head(&m->in)[4] == 'a';
        if (found)
            memcpy(token, bytes_head(&m->in) + 5, ANSWER_TOKEN);
        if (size)
            bytes_take(&m->in, (size_t)size + 4);
        if (found)
            return 0;
        int error = size ? 0 : poll(&p, 1, -1) < 0 ? (errno == EINTR ? 0 : errno) : from_host(m, ended);
        if (error)
            return error;
    }
    return 0;
}

static int serve(struct remote *m, bool *ended) {
    struct writer hello;
    remote_begin(&hello, 'o');
    *ended = !remote_send(&hello);
    int error = 0;
    while (!error && !*ended && !m->over)
        error = turn(m, ended);
    return error;
}

int remote_main(char **argv) {
    struct remote *m = &remote;
    uint8_t token[ANSWER_TOKEN];
    bool ended = false;
    for (int i = 0; i < REMOTE_CHANNELS; i++)
        m->channels[i].fd = -1;
    if (!token_of(argv[1], token))
        return errno = EINVAL, complain("answer");
    while (!ended) {
        uint32_t refused = 0;
        int error = attach(m, token, &refused);
        if (error)
            return error;
        error = refused ? 0 : serve(m, &ended);
        if (!error && !ended)
            error = rest(m, refused, token, &ended);
        if (error)
            return errno = error, complain("answer");
    }
    return 0;
}
