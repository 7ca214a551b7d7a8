/* Landlock (landlock(7)): rulesets of paths, for what we launch and for commands with a policy. */
#ifndef TVINIT_LANDLOCK_H
#define TVINIT_LANDLOCK_H

#include <stdbool.h>
#include <stdint.h>

enum {
    LL_EXECUTE = 1 << 0, LL_WRITE_FILE = 1 << 1, LL_READ_FILE = 1 << 2, LL_READ_DIR = 1 << 3, LL_REMOVE_DIR = 1 << 4,
    LL_REMOVE_FILE = 1 << 5, LL_MAKE_CHAR = 1 << 6, LL_MAKE_DIR = 1 << 7, LL_MAKE_REG = 1 << 8, LL_MAKE_SOCK = 1 << 9,
    LL_MAKE_FIFO = 1 << 10, LL_MAKE_BLOCK = 1 << 11, LL_MAKE_SYM = 1 << 12, LL_REFER = 1 << 13, LL_TRUNCATE = 1 << 14,
    LL_IOCTL_DEV = 1 << 15,
    LL_NET_TCP = 3, /* bind, connect */
    LL_SCOPES = 3,  /* abstract unix sockets, signals */
};

/* What a ruleset of linux/landlock.h handles: that of newer kernels than the one we may be built on. */
struct ll_ruleset { uint64_t fs, net, scoped; };

/* The ABI of this kernel, or -1 with errno (ENOSYS, EOPNOTSUPP: it has none). */
int landlock_abi(void);

/* All that this ABI can forbid of files. */
uint64_t landlock_files(int abi);

/* A ruleset, close-on-exec; -1 with errno. */
int landlock_make(int abi, const struct ll_ruleset *handled);

/* Allow below an open file or folder. 0, or -1 with errno. */
int landlock_allow(int ruleset, int fd, uint64_t allowed);

/* Allow below a path what `flags` say: r, w (write, create, remove), x. 0, or -1 with errno. */
int landlock_allow_path(int ruleset, const char *path, const char *flags, uint64_t handled);

/* Put ourselves under it. 0, or -1 with errno; `ruleset` stays open. */
int landlock_enter(int ruleset);

#endif
