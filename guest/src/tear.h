/* A write that is torn, as by a disk that fails in the middle of it: its first bytes reach the file, and no more. */
#ifndef TVINIT_TEAR_H
#define TVINIT_TEAR_H

#include <linux/seccomp.h>
#include <stdint.h>

/* The regular file that a held write or pwrite64 is to, with the offset that the program has; -1 for any other call or kind of file, and
 * for those of the kernel and of memory that has no bound. */
int tear_open(const struct seccomp_notif *call);

/* Write the first `keep` bytes of the call's buffer, or what there is of them. */
void tear_write(int file, const struct seccomp_notif *call, uint32_t keep);

#endif
