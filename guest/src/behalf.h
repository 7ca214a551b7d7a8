/* Calls made on a held program's behalf, each in a forked child that has become like it: a file that blocks, a folder that
 * hangs, holds up nobody else, and what the kernel refuses the program it refuses the child.
 *
 * Like the program: its user namespace (and for mounts its mount namespace), root, folder, user, groups, capabilities, umask,
 * and Landlock ruleset. Not like it: the pid namespace (/proc/self is put into words before), cgroup. */
#ifndef TVINIT_BEHALF_H
#define TVINIT_BEHALF_H

#include <stdint.h>
#include <sys/types.h>

#include "wire.h"

struct behalf {
    char what; /* 'P' open, 'M' mount, 'N' mknod */
    uint32_t request, pid;
    uint64_t id, flags, mode, resolve, dev;
    int32_t dirfd;
    char *path, *source, *type, *data; /* path: what is opened or made, where is mounted */
};

/* Take the rest of a message of kind `what`. False if malformed, with nothing to free. */
bool behalf_read(struct reader *r, char what, struct behalf *out);
void behalf_free(struct behalf *b);

/* In a child: do it, under the program's Landlock ruleset if it has one (else -1), and send 'R' to `sock`. Never returns; 0 is
 * exited with once the reply is sent. */
void behalf_child(const struct behalf *b, int listener, int ruleset, int sock) __attribute__((noreturn));

/* 'R' with a descriptor, or -1 for none. False if it was not sent. */
bool behalf_reply(int sock, uint32_t request, int error, int fd);

#endif
