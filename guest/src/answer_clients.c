#include "answers.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

enum { GIVE_BACK = 1, LOOK_NS = 200000000 };

ssize_t clients_message(int fd, uint8_t *buffer, int fds[2]) {
    union {
        char bytes[CMSG_SPACE(2 * sizeof(int))];
        struct cmsghdr align;
    } control;
    struct iovec io = {buffer, ANSWER_MESSAGE};
    struct msghdr m = {.msg_iov = &io, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
    fds[0] = fds[1] = -1;
    ssize_t n = recvmsg(fd, &m, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    if (n < 0 && errno == ECONNRESET) /* the peer closed without reading all; what it said before that comes next */
        n = recvmsg(fd, &m, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    for (struct cmsghdr *c = n < 0 ? NULL : CMSG_FIRSTHDR(&m); c; c = CMSG_NXTHDR(&m, c))
        if (c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS)
            memcpy(fds, CMSG_DATA(c), c->cmsg_len - CMSG_LEN(0) < sizeof(int) * 2 ? sizeof(int) : sizeof(int) * 2);
    if (n > 0 && m.msg_flags & MSG_TRUNC)
        buffer[0] = 0; /* longer than any message is */
    if (n < 0)
        return errno == EAGAIN || errno == EINTR ? -1 : 0;
    return n;
}

/* To a client that does not read: it is let go, which fails what it holds. */
static bool send_message(int sock, const void *data, size_t size, int fd) {
    union {
        char bytes[CMSG_SPACE(sizeof(int))];
        struct cmsghdr align;
    } control = {{0}};
    struct iovec io = {(void *)(uintptr_t)data, size};
    struct msghdr m = {.msg_iov = &io, .msg_iovlen = 1};
    if (fd >= 0) {
        m.msg_control = &control;
        m.msg_controllen = sizeof control;
        *CMSG_FIRSTHDR(&m) = (struct cmsghdr){.cmsg_len = CMSG_LEN(sizeof fd), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS};
        memcpy(CMSG_DATA(CMSG_FIRSTHDR(&m)), &fd, sizeof fd);
    }
    return sendmsg(sock, &m, MSG_DONTWAIT | MSG_NOSIGNAL) == (ssize_t)size;
}

bool behalf_reply(int sock, uint32_t request, int error, int fd) {
    struct writer w = {0};
    write_u8(&w, 'R');
    write_u32(&w, request);
    write_u32(&w, (uint32_t)error);
    bool sent = !w.bad && send_message(sock, w.data, w.used, fd);
    writer_free(&w);
    return sent;
}

static void refuse(struct answerer *a, struct client *c, int error) {
    struct writer w = {0};
    write_u8(&w, 'E');
    write_u32(&w, (uint32_t)error);
    if (!w.bad)
        send_message(c->source.fd, w.data, w.used, -1);
    writer_free(&w);
    clients_drop(a, c);
}

void clients_add(struct answerer *a, int fd, const uint8_t *token) {
    struct client *c = a->client_count < CLIENTS_MAX ? calloc(1, sizeof *c) : NULL;
    if (!c) {
        close(fd);
        return;
    }
    c->source = (struct source){.kind = SOURCE_CLIENT, .fd = fd};
    c->page = -1;
    c->until = answer_now() + (int64_t)ANSWER_ATTACH_MS * 1000000;
    c->asked = token;
    if (token)
        memcpy(c->token, token, sizeof c->token);
    c->next = a->clients;
    a->clients = c;
    a->client_count++;
    if (!answer_watch(a, &c->source, EPOLLIN | EPOLLRDHUP, true))
        clients_drop(a, c);
}

/* The socket's mode says who may come; that it is so is looked at, too. */
void clients_accept(struct answerer *a) {
    int fd = accept4(a->listen.fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    struct ucred who = {0};
    socklen_t size = sizeof who;
    if (fd < 0)
        return;
    if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &who, &size) < 0 || (who.uid != geteuid() && who.uid != 0))
        close(fd);
    else
        clients_add(a, fd, NULL);
}

static void end_jobs(struct answerer *a, const struct client *c) {
    for (size_t i = 0; i < a->job_count; i++)
        if (a->jobs[i].client == c) {
            kill(a->jobs[i].pid, SIGKILL);
            a->jobs[i].client = NULL; /* it is reaped as all are */
        }
}

void clients_drop(struct answerer *a, struct client *c) {
    struct listener *l = c->listener;
    if (c->gone)
        return;
    end_jobs(a, c);
    epoll_ctl(a->epoll, EPOLL_CTL_DEL, c->source.fd, NULL);
    close(c->source.fd);
    c->gone = true;
    c->listener = NULL;
    if (l) {
        l->client = NULL;
        if (!calls_over(l))
            calls_fail(a, l, c->page);
        answer_interest(a, l);
    }
    if (c->page >= 0)
        close(c->page);
    c->page = -1;
}

static struct listener *listener_of(struct answerer *a, const uint8_t *token) {
    struct listener *l = a->listeners;
    while (l && (l->gone || !l->rules.has_token || memcmp(l->rules.token, token, ANSWER_TOKEN)))
        l = l->next;
    return l;
}

/* Whether all that was under that listener has ended, before anybody asked for it. */
static bool has_ended(const struct answerer *a, const uint8_t *token) {
    for (size_t i = 0; i < a->ended_count && i < ENDED_MAX; i++)
        if (!memcmp(a->ended[i], token, ANSWER_TOKEN))
            return true;
    return false;
}

/* Attach if the listener is there. A client whose time is up without it is refused. */
static void attach(struct answerer *a, struct client *c) {
    struct listener *l = c->asked ? listener_of(a, c->token) : NULL;
    if (!l) {
        if (c->asked && has_ended(a, c->token))
            refuse(a, c, ESRCH);
        else if (c->until <= a->now)
            refuse(a, c, c->asked ? ENOENT : EPROTO);
        return;
    }
    if (calls_over(l)) {
        refuse(a, c, ESRCH);
        return;
    }
    if (l->client) {
        refuse(a, c, EBUSY);
        return;
    }
    l->client = c;
    l->shared = true;
    l->waits = false;
    c->listener = l;
    answer_interest(a, l); /* before the client can receive */
    if (!send_message(c->source.fd, "O", 1, l->source.fd))
        clients_drop(a, c);
}

int64_t clients_due(struct answerer *a) {
    int64_t next = INT64_MAX;
    for (struct client *c = a->clients; c; c = c->next) {
        if (!c->gone && !c->listener)
            attach(a, c);
        if (!c->gone && !c->listener && c->until < next)
            next = c->until;
    }
    return next;
}

static void start(struct answerer *a, struct client *c, struct reader *r, char what) {
    struct behalf b;
    if (!behalf_read(r, what, &b)) {
        clients_drop(a, c);
        return;
    }
    if (calls_valid(c->listener, b.id))
        calls_seen(c->listener, b.id);
    pid_t self = getpid(), pid = -1;
    errno = EAGAIN;
    if (a->job_count < JOBS_MAX && (pid = fork()) == 0) {
        if (prctl(PR_SET_PDEATHSIG, SIGKILL) < 0 || getppid() != self)
            _exit(1);
        behalf_child(&b, c->listener->source.fd, c->listener->ruleset, c->source.fd);
    }
    if (pid > 0)
        a->jobs[a->job_count++] = (struct job){.pid = pid, .request = b.request, .id = b.id, .client = c,
                                              .until = what == 'P' ? INT64_MAX : a->now + (int64_t)JOB_MS * 1000000};
    else if (!behalf_reply(c->source.fd, b.request, errno, -1))
        clients_drop(a, c);
    behalf_free(&b);
}

static void finish(struct answerer *a, size_t i, bool replied) {
    struct job j = a->jobs[i];
    a->jobs[i] = a->jobs[--a->job_count];
    if (!j.client || replied)
        return;
    bool waits = calls_valid(j.client->listener, j.id);
    if (!behalf_reply(j.client->source.fd, j.request, waits ? EIO : EINTR, -1))
        clients_drop(a, j.client);
}

/* A child that hangs in an open goes on as long as its program waits for it; the kernel tells nobody when that ends, so it is
 * looked at now and then. */
int64_t clients_jobs(struct answerer *a) {
    int status;
    pid_t pid;
    while (a->job_count && (pid = waitpid(-1, &status, WNOHANG)) > 0)
        for (size_t i = 0; i < a->job_count; i++)
            if (a->jobs[i].pid == pid) {
                finish(a, i, WIFEXITED(status) && WEXITSTATUS(status) == 0);
                break;
            }
    for (size_t i = 0; i < a->job_count; i++) {
        const struct job *j = &a->jobs[i];
        if (j->until <= a->now || (j->client && !calls_valid(j->client->listener, j->id)))
            kill(j->pid, SIGKILL);
    }
    return a->job_count ? a->now + LOOK_NS : INT64_MAX;
}

static void hand_off(struct answerer *a, struct client *c, struct reader *r) {
    uint8_t flags = read_u8(r);
    const uint8_t *bytes = read_bytes(r, sizeof(struct seccomp_notif));
    struct seccomp_notif call;
    if (!bytes || !reader_done(r)) {
        clients_drop(a, c);
        return;
    }
    memcpy(&call, bytes, sizeof call);
    if (calls_valid(c->listener, call.id))
        calls_seen(c->listener, call.id);
    bool decided = calls_decide(a, c->listener, &call, flags & GIVE_BACK);
    if (!(flags & GIVE_BACK))
        return;
    uint8_t told[9] = {decided ? 'D' : 'B'}; /* or the client would keep it in mind for ever */
    memcpy(told + 1, &call.id, sizeof call.id);
    if (!send_message(c->source.fd, told, sizeof told, -1))
        clients_drop(a, c);
}

static void message(struct answerer *a, struct client *c, const uint8_t *data, size_t size, int fds[2]) {
    struct reader r = reader_of(data + 1, size - 1);
    const uint8_t *token;
    /* What came on the intake says its token there, and its page here, attached meanwhile or not. */
    if (data[0] == 'A' && (!c->listener || c->asked) && c->page < 0 && (token = read_bytes(&r, ANSWER_TOKEN)) && reader_done(&r) && fds[0] >= 0) {
        if (c->asked && memcmp(token, c->token, ANSWER_TOKEN)) {
            clients_drop(a, c);
            return;
        }
        memcpy(c->token, token, ANSWER_TOKEN);
        c->page = fds[0];
        fds[0] = -1;
        c->asked = true;
        if (!c->listener)
            c->until = a->now + (int64_t)ANSWER_ATTACH_MS * 1000000;
    } else if (data[0] == 'H' && c->listener) {
        hand_off(a, c, &r);
    } else if (c->listener && strchr("PMN", data[0]) && data[0]) {
        start(a, c, &r, (char)data[0]);
    } else if (!c->listener) {
        refuse(a, c, EPROTO);
    } else {
        clients_drop(a, c);
    }
}

void clients_event(struct answerer *a, struct client *c, uint32_t events) {
    static uint8_t buffer[ANSWER_MESSAGE];
    struct pollfd p = {.fd = c->source.fd, .events = POLLOUT};
    int fds[2];
    if (c->gone)
        return;
    if (!(events & (EPOLLHUP | EPOLLERR | EPOLLRDHUP)) && poll(&p, 1, 0) == 0) {
        /* It does not read what it is told: it gets to say more when it has. */
        answer_watch(a, &c->source, EPOLLOUT | EPOLLRDHUP, false);
        c->writing = true;
        return;
    }
    if (c->writing)
        answer_watch(a, &c->source, EPOLLIN | EPOLLRDHUP, false);
    c->writing = false;
    ssize_t n = clients_message(c->source.fd, buffer, fds);
    if (n == 0)
        clients_drop(a, c);
    else if (n > 0)
        message(a, c, buffer, (size_t)n, fds);
    for (int i = 0; i < 2; i++)
        if (fds[i] >= 0)
            close(fds[i]);
}
