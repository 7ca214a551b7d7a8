#include "loop.h"

#include <sys/epoll.h>
#include <time.h>
#include <unistd.h>

enum { BATCH = 64 };

static int epoll_fd = -1;

int loop_open(void) {
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    return epoll_fd < 0 ? -1 : 0;
}

int loop_add(struct watch *w, uint32_t events) {
    struct epoll_event e = {.events = events | EPOLLET, .data.ptr = w};
    return epoll_ctl(epoll_fd, EPOLL_CTL_ADD, w->fd, &e);
}

int loop_change(struct watch *w, uint32_t events) {
    struct epoll_event e = {.events = events | EPOLLET, .data.ptr = w};
    return epoll_ctl(epoll_fd, EPOLL_CTL_MOD, w->fd, &e);
}

void loop_close(struct watch *w) {
    if (w->fd < 0)
        return;
    epoll_ctl(epoll_fd, EPOLL_CTL_DEL, w->fd, NULL);
    close(w->fd);
    w->fd = -1;
}

void loop_wait(int timeout) {
    struct epoll_event events[BATCH];
    int n = epoll_wait(epoll_fd, events, BATCH, timeout);
    for (int i = 0; i < n; i++) {
        struct watch *w = events[i].data.ptr;
        /* An earlier watch of this batch may have closed this one; its memory lives to the batch's end. */
        if (w->fd >= 0)
            w->on(w, events[i].events);
    }
}

int64_t now_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}
