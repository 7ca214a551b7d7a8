/* What the operations that make a new root share (mounts.c, layers.c). */
#ifndef TVINIT_MOUNTS_H
#define TVINIT_MOUNTS_H

#include <limits.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

enum bind_flag { BIND_IDMAP = 1, BIND_ALONE = 2, BIND_STRAIGHT = 4, BIND_OWNER = 8 };

/* What an overlay's writable layer may begin with, if it is not a folder's path. */
#define LAYER_RAM "ram:"
#define LAYER_DISK "disk:"

/* Mount the ext4 of a layer `disk:DEVICE:FOLDER`, detached. -1 with errno. */
int disk_tree(const char *layer);

/* Open path under root, whose links cannot lead out of it. */
int open_in(int root, const char *path, uint64_t flags);

/* Open the folder that holds the last component of path, making folders on the way; *name gets that component, within
 * copy. Returns -1 with errno. */
int open_parent(int root, const char *path, char copy[PATH_MAX], char **name);

/* Open the place to mount on, made if it is not there: a folder or an empty file. */
int open_target(int root, const char *path, bool folder);

/* An octal mode. False with EINVAL. */
bool parse_mode(const char *word, mode_t *mode);

/* Words of FLAGS as mount attributes, and those of a bind as bind_flags (NULL: not allowed). False with EINVAL. */
bool parse_flags(const char *words, uint64_t *attributes, unsigned *bind);

/* Attach a detached mount at path under root with these attributes; closes tree. */
int attach(int root, int tree, uint64_t attributes, const char *path, bool folder);

/* A new file system, detached. -1 with errno. */
int new_filesystem(const char *type, const char *source, const char *data);

#endif
