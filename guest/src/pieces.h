/* The disk of the machine's root, which may hold several squashfs, one behind another. */
#ifndef TVINIT_PIECES_H
#define TVINIT_PIECES_H

#include <stddef.h>

enum { PIECES_MOST = 16 };

/* Mount the squashfs on `device` at /lower, or with `offsets` (decimal, in bytes, NULL at the end: where all but the first begin) each at a
 * folder of its own. `lowers` gets their names as overlayfs takes them, the last one uppermost. 0, or -1 with errno. */
int pieces_mount(const char *device, char **offsets, char *lowers, size_t size);

#endif
