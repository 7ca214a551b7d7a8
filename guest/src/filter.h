/* seccomp programs as plans and policies write them: struct sock_filter, little-endian, in hexadecimal. */
#ifndef TVINIT_FILTER_H
#define TVINIT_FILTER_H

#include <linux/filter.h>
#include <stdbool.h>

/* 0, or -1 with errno: EINVAL, ENOMEM. Free `filter` of what it made with free(3). */
int filter_parse(const char *hex, struct sock_fprog *out);

/* Whether it surely lets our architecture's call `nr` be made, whatever its arguments are. */
bool filter_lets(const struct sock_fprog *f, int nr);

#endif
