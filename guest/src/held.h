/* What no checkpoint can carry: files of the host that are removed and still held, since the Sentry finds a file again by its path;
   and programs that are traced. */
#ifndef TVINIT_HELD_H
#define TVINIT_HELD_H

#include <stddef.h>

/* Look at every process: what it has open, mapped, or stands in, and who traces it. 0, or EBUSY with one of them in `text`, in words. */
int held_unsavable(char *text, size_t size);

#endif
