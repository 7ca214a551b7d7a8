/* Builtins: commands that tvinit itself carries out in a forked child, with the command's descriptors,
 * user and folder (PROTOCOL.md, "Builtins"). Each returns 0 or an errno, which becomes the exit status. */
#ifndef TVINIT_BUILTINS_H
#define TVINIT_BUILTINS_H

#include <stddef.h>
#include <sys/stat.h>

#include "wire.h"

/* Run argv[0]. An unknown name or a wrong number of words is EINVAL. */
int builtin_main(char **argv);

/* The pieces, one file a noun. */
int tree_put(char **argv);
int tree_get(char **argv);
int stats_main(char **argv);
int connect_main(char **argv);
int remote_main(char **argv);
int device_main(char **argv);
int upper_main(char **argv);
int program_main(char **argv);

/* Say what failed on stderr, return errno. */
int complain(const char *what);

/* All of it, or an errno. A short read is EPIPE. */
int write_all(int fd, const void *data, size_t size);
int read_all(int fd, void *data, size_t size);

/* Copy `size` bytes (UINT64_MAX: to the end of `from`); *copied says how many came. */
int copy_bytes(int from, int to, uint64_t size, uint64_t *copied);

/* True for a relative path without empty, "." or ".." components; "" is the tree's own root. */
int tree_name_ok(const char *path);

enum { COPY_SIZE = 128 * 1024 };

#endif
