/* What the kernel says of a process in numbers. */
#ifndef TVINIT_STATUS_H
#define TVINIT_STATUS_H

#include <sys/types.h>

/* The number after `field`, such as "Tgid", in /proc/PID/status (proc_pid_status(5)), among the first fields; -1 if there is none. */
int status_number(pid_t pid, const char *field);

#endif
