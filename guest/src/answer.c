#include "answers.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { EVENTS = 64, PRUNE_NS = 1000000000 };

static struct answerer answerer;

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

int64_t answer_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* Not log_line: in a virtual machine that would write to a copy of PID 1's line. */
void answer_say(const char *format, ...) {
    char text[512];
    va_list args;
    va_start(args, format);
    int n = vsnprintf(text, sizeof text - 1, format, args);
    va_end(args);
    if (n < 0)
        return;
    size_t size = (size_t)n < sizeof text - 2 ? (size_t)n : sizeof text - 2;
    for (size_t i = 0; i < size; i++)
        if ((unsigned char)text[i] < ' ' || text[i] == 127)
            text[i] = '?'; /* a path is a program's own words: it is to make no lines, nor terminals do things */
    text[size++] = '\n';
    if (write(STDERR_FILENO, text, size) < 0) {
        /* Nobody listens. */
    }
}

bool answer_watch(struct answerer *a, struct source *s, uint32_t events, bool first) {
    struct epoll_event e = {.events = events, .data.ptr = s};
    return epoll_ctl(a->epoll, first ? EPOLL_CTL_ADD : EPOLL_CTL_MOD, s->fd, &e) == 0;
}

void answer_interest(struct answerer *a, struct listener *l) {
    /* Where we do not receive we still hear that its last task is gone. While its calls wait for an owner, the first of them
     * starts the clock. */
    bool ours = !l->client && (!l->waits || !l->waits_until) && l->held < HELD_OF_ONE && a->held_count < HELD_MAX;
    if (ours != l->heard && answer_watch(a, &l->source, ours ? EPOLLIN : 0, false))
        l->heard = ours;
}

static void listener_drop(struct answerer *a, struct listener *l) {
    struct client *owner = l->client;
    l->client = NULL;
    if (owner) {
        owner->listener = NULL;
        clients_drop(a, owner);
    }
    calls_forget(a, l);
    epoll_ctl(a->epoll, EPOLL_CTL_DEL, l->source.fd, NULL);
    close(l->source.fd);
    if (l->ruleset >= 0)
        close(l->ruleset);
    l->source.fd = l->ruleset = -1;
    if (l->rules.has_token)
        memcpy(a->ended[a->ended_count++ % ENDED_MAX], l->rules.token, ANSWER_TOKEN);
    a->rules_bytes -= l->bytes;
    rules_free(&l->rules);
    l->gone = true; /* freed at the end of the turn: an event of it may still be in hand */
}

/* Only the kernel names a descriptor so. Others are a lie of whoever got hold of PID 1's end. */
static bool is_listener(int fd) {
    char place[40], name[40];
    snprintf(place, sizeof place, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(place, name, sizeof name);
    return n == 25 && !memcmp(name, "anon_inode:seccomp notify", 25);
}

static void listener_add(struct answerer *a, const int fds[2], const uint8_t *data, size_t size) {
    int fd = fds[0];
    struct listener *l = is_listener(fd) && a->listener_count < LISTENERS_MAX ? calloc(1, sizeof *l) : NULL;
    if (!l) {
        close(fd); /* its calls fail with ENOSYS */
        if (fds[1] >= 0)
            close(fds[1]);
        answer_say("answerer: what was handed over is no listener, or one too many");
        return;
    }
    l->source = (struct source){.kind = SOURCE_LISTENER, .fd = fd};
    l->ruleset = fds[1];
    l->denied = !rules_decode(data, size, &l->rules);
    l->bytes = l->rules.count * sizeof *l->rules.list;
    if (a->rules_bytes + l->bytes > RULES_BYTES) {
        rules_free(&l->rules);
        l->bytes = 0;
        l->denied = true;
    }
    if (l->denied)
        answer_say("answerer: a listener's rules are malformed or too many: its calls are refused");
    a->rules_bytes += l->bytes;
    l->waits = l->rules.handler_count > 0;
    fcntl(fd, F_SETFD, FD_CLOEXEC);
    ioctl(fd, SECCOMP_IOCTL_NOTIF_SET_FLAGS, SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP); /* Linux 6.6; without it is slower */
    l->next = a->listeners;
    a->listeners = l;
    a->listener_count++;
    l->heard = answer_watch(a, &l->source, EPOLLIN, true);
    if (!l->heard)
        listener_drop(a, l);
}

static void intake_event(struct answerer *a) {
    static uint8_t buffer[ANSWER_MESSAGE];
    int fds[2];
    ssize_t n = clients_message(a->intake.fd, buffer, fds);
    if (n == 0) {
        epoll_ctl(a->epoll, EPOLL_CTL_DEL, a->intake.fd, NULL);
        a->intake_ended = true;
    }
    if (n > 0 && buffer[0] == 'L' && fds[0] >= 0) {
        listener_add(a, fds, buffer + 1, (size_t)n - 1);
        fds[0] = fds[1] = -1;
    } else if (n == 1 + ANSWER_TOKEN && buffer[0] == 'A' && fds[0] >= 0 && a->listen.fd < 0) {
        /* Behind a wall of containers an owner comes from the host: PID 1 inside has no say. */
        clients_add(a, fds[0], buffer + 1);
        fds[0] = -1;
    }
    for (int i = 0; i < 2; i++)
        if (fds[i] >= 0)
            close(fds[i]);
}

static void listener_event(struct answerer *a, struct listener *l, uint32_t events) {
    if (l->gone)
        return;
    if (events & (EPOLLHUP | EPOLLERR)) {
        listener_drop(a, l);
    } else if (l->client) {
        return;
    } else if (l->waits && !l->waits_until) {
        l->waits_until = a->now + (int64_t)ANSWER_ATTACH_MS * 1000000;
        answer_interest(a, l);
    } else if (!l->waits) {
        calls_receive(a, l);
        answer_interest(a, l);
    }
}

/* Nobody came for a listener's handlers: its calls are refused from here on. Returns when to look again. */
static int64_t listeners_due(struct answerer *a) {
    int64_t next = INT64_MAX;
    for (struct listener *l = a->listeners; l; l = l->next) {
        if (!l->gone && l->held && (l->held >= HELD_OF_ONE || a->held_count >= HELD_MAX)) {
            calls_prune(a, l);
            answer_interest(a, l);
            next = least(next, a->now + PRUNE_NS);
        }
        if (l->gone || !l->waits || !l->waits_until || l->client)
            continue;
        if (l->waits_until <= a->now) {
            l->waits = false;
            answer_interest(a, l);
        } else {
            next = least(next, l->waits_until);
        }
    }
    return next;
}

static void bury(struct answerer *a) {
    for (struct listener **at = &a->listeners; *at;) {
        struct listener *l = *at;
        if (l->gone) {
            *at = l->next;
            a->listener_count--;
            free(l);
        } else {
            at = &l->next;
        }
    }
    for (struct client **at = &a->clients; *at;) {
        struct client *c = *at;
        if (c->gone) {
            *at = c->next;
            a->client_count--;
            free(c);
        } else {
            at = &c->next;
        }
    }
}

static int wait_for(struct answerer *a, struct epoll_event *events, int64_t until) {
    int64_t left = until == INT64_MAX ? -1 : until > answer_now() ? until - answer_now() : 0;
    if (left < 0 && until != INT64_MAX)
        left = 0;
    struct timespec t = {left / 1000000000, left % 1000000000};
    long n = syscall(SYS_epoll_pwait2, a->epoll, events, EVENTS, left < 0 ? NULL : &t, NULL, 0);
    if (n < 0 && errno == ENOSYS) /* before Linux 5.11: to the millisecond */
        n = epoll_wait(a->epoll, events, EVENTS, left < 0 ? -1 : left > INT64_C(1000000000000) ? 1000000 : (int)((left + 999999) / 1000000));
    return (int)n;
}

static void event(struct answerer *a, const struct epoll_event *e) {
    struct source *s = e->data.ptr;
    struct signalfd_siginfo info;
    switch (s->kind) {
    case SOURCE_INTAKE:
        intake_event(a);
        break;
    case SOURCE_LISTEN:
        clients_accept(a);
        break;
    case SOURCE_SIGNALS:
        while (read(s->fd, &info, sizeof info) == sizeof info) {
        }
        break;
    case SOURCE_LISTENER:
        listener_event(a, (struct listener *)s, e->events);
        break;
    case SOURCE_CLIENT:
        clients_event(a, (struct client *)s, e->events);
    }
}

static int serve(struct answerer *a) {
    struct epoll_event events[EVENTS];
    /* Once PID 1 is gone nothing new comes; what is there ends with its last task. */
    while (!a->intake_ended || a->listeners) {
        a->now = answer_now();
        int64_t until = calls_due(a);
        until = least(until, listeners_due(a));
        until = least(until, clients_due(a));
        until = least(until, clients_jobs(a));
        int n = wait_for(a, events, until);
        if (n < 0 && errno != EINTR)
            return errno;
        a->now = answer_now();
        for (int i = 0; i < n; i++)
            event(a, &events[i]);
        bury(a);
    }
    return 0;
}

static void interrupt(int number) { (void)number; }

int answer_main(int intake, int listen) {
    struct answerer *a = &answerer;
    sigset_t child, others;
    sigemptyset(&child);
    sigaddset(&child, SIGCHLD);
    sigfillset(&others);
    sigdelset(&others, SIGALRM);
    /* Ctrl-C and the like are for whoever started us; SIGALRM interrupts a receive that another holder of a listener made futile. */
    struct sigaction alarm = {.sa_handler = interrupt};
    if (sigaction(SIGALRM, &alarm, NULL) < 0 || sigprocmask(SIG_SETMASK, &others, NULL) < 0 || !answer_jail(getppid()))
        return 1;
    signal(SIGPIPE, SIG_IGN);
    signal(SIGXFSZ, SIG_IGN);
    signal(SIGCHLD, SIG_DFL);
    a->intake = (struct source){.kind = SOURCE_INTAKE, .fd = intake};
    a->listen = (struct source){.kind = SOURCE_LISTEN, .fd = listen};
    a->signals = (struct source){.kind = SOURCE_SIGNALS, .fd = signalfd(-1, &child, SFD_NONBLOCK | SFD_CLOEXEC)};
    a->epoll = epoll_create1(EPOLL_CLOEXEC);
    if (a->epoll < 0 || a->signals.fd < 0 || !answer_watch(a, &a->intake, EPOLLIN, true) || !answer_watch(a, &a->signals, EPOLLIN, true))
        return 1;
    if (listen >= 0 && (fcntl(listen, F_SETFL, O_NONBLOCK) < 0 || !answer_watch(a, &a->listen, EPOLLIN, true)))
        return 1;
    return serve(a);
}
