/* What no checkpoint can carry: files of the host that are removed and still held. The Sentry finds a file again by its path. */
#ifndef TVINIT_HELD_H
#define TVINIT_HELD_H

#include <stddef.h>

/* Look at what every process has open, mapped, or stands in. 0, or EBUSY with one of them in `text`, in words. */
int held_removed(char *text, size_t size);

#endif
