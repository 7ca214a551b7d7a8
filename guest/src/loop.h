/* epoll, edge-triggered: a watch is told once of each change and remembers for itself that its
 * descriptor is ready. So a source that may not be read now (no credit, no room on the line) costs no
 * epoll_ctl, and a virtio port whose host side hung up does not wake us for ever. */
#ifndef TVINIT_LOOP_H
#define TVINIT_LOOP_H

#include <stdint.h>

struct watch {
    int fd;
    void (*on)(struct watch *w, uint32_t events);
    uint32_t place; /* the loop's own: where it is in its table */
};

int loop_open(void);
int loop_add(struct watch *w, uint32_t events);
int loop_change(struct watch *w, uint32_t events);

/* Stop watching and close. Taking the descriptor out first matters: a builtin that was just forked may
 * still hold a copy, and epoll follows the open file, not the number. */
void loop_close(struct watch *w);

/* Wait up to `timeout` ms (-1: for ever) and call the watches that have news. */
void loop_wait(int timeout);

/* CLOCK_MONOTONIC in ms. */
int64_t now_ms(void);

#endif
