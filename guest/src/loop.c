#include "loop.h"

#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <time.h>
#include <unistd.h>

enum { BATCH = 64 };

static int epoll_fd = -1;

/* The kernel is given a number instead of a pointer, and no number means two watches: a sandbox that runsc of 2022 has restored
 * tells once more of descriptors that were taken out of epoll before. */
static struct place {
    struct watch *watch;
    uint32_t turn;
} *places;
static uint32_t place_count;

static bool take_place(struct watch *w) {
    for (w->place = 0; w->place < place_count && places[w->place].watch; w->place++) {
    }
    if (w->place == place_count) {
        uint32_t more = place_count ? place_count * 2 : 16;
        struct place *grown = realloc(places, more * sizeof *grown);
        if (!grown)
            return false;
        memset(grown + place_count, 0, (more - place_count) * sizeof *grown);
        places = grown;
        place_count = more;
    }
    places[w->place].watch = w;
    places[w->place].turn++;
    return true;
}

static struct epoll_event event_of(const struct watch *w, uint32_t events) {
    uint64_t turn = w->place < place_count ? places[w->place].turn : 0;
    return (struct epoll_event){.events = events | EPOLLET, .data.u64 = turn << 32 | w->place};
}

static struct watch *watch_of(uint64_t number) {
    uint32_t place = (uint32_t)number;
    return place < place_count && places[place].turn == number >> 32 ? places[place].watch : NULL;
}

int loop_open(void) {
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    return epoll_fd < 0 ? -1 : 0;
}

int loop_add(struct watch *w, uint32_t events) {
    if (!take_place(w)) {
        errno = ENOMEM;
        return -1;
    }
    struct epoll_event e = event_of(w, events);
    int failed = epoll_ctl(epoll_fd, EPOLL_CTL_ADD, w->fd, &e);
    if (failed)
        places[w->place].watch = NULL;
    return failed;
}

int loop_change(struct watch *w, uint32_t events) {
    struct epoll_event e = event_of(w, events);
    return epoll_ctl(epoll_fd, EPOLL_CTL_MOD, w->fd, &e);
}

void loop_close(struct watch *w) {
    if (w->fd < 0)
        return;
    epoll_ctl(epoll_fd, EPOLL_CTL_DEL, w->fd, NULL);
    if (w->place < place_count && places[w->place].watch == w)
        places[w->place].watch = NULL;
    close(w->fd);
    w->fd = -1;
}

void loop_wait(int timeout) {
    struct epoll_event events[BATCH];
    int n = epoll_wait(epoll_fd, events, BATCH, timeout);
    for (int i = 0; i < n; i++) {
        /* An earlier watch of this batch may have closed this one. */
        struct watch *w = watch_of(events[i].data.u64);
        if (w && w->fd >= 0)
            w->on(w, events[i].events);
    }
}

int64_t now_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}
