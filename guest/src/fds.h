/* Descriptors of a process that was forked from one that holds others' too. */
#ifndef TVINIT_FDS_H
#define TVINIT_FDS_H

#include <stddef.h>

/* Close every descriptor but 0, 1, 2 and those in `kept`, which is put in order; -1 there stands for none. */
void close_all_but(int *kept, size_t count);

#endif
