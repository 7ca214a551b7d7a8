/* Opening, mounting and making nodes, as who we already have become. */
#ifndef TVINIT_BEHALF_MAKE_H
#define TVINIT_BEHALF_MAKE_H

#include <stdint.h>
#include <sys/types.h>

struct opening {
    int base; /* of a path that is not absolute */
    int self; /* /proc/self/fd of us, opened outside */
    const char *path;
    uint64_t flags, mode, resolve;
    long process, thread; /* who /proc/self and /proc/thread-self are */
};

/* openat2(2). The descriptor, or -1 and errno. May wait for ever, as for a FIFO's other end. */
int make_open(const struct opening *o);

/* 0, or an errno. */
int make_mount(const char *source, const char *target, const char *type, uint64_t flags, const char *data);
int make_node(int base, const char *path, mode_t mode, dev_t dev);

/* A path of /proc/self, /proc/thread-self, /dev/fd, /dev/stdin and so on in terms of those numbers, into out[4096 + 64]. Others as
 * they are. *own: it names a descriptor of the program, a link that may be followed. */
void make_words(const char *path, long process, long thread, char *out, int *own);

enum { MAKE_WORDS = 4096 + 64 };

#endif
