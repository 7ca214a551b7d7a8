/* The tracer of one command (PROTOCOL.md, "Trace").
 *
 * PID 1 forks it before the command. It seizes the command, follows whatever that starts, stops at the calls that were
 * asked for, and writes records into a pipe that PID 1 carries to the client as channel TRACE. The command stays PID 1's
 * own child: its status and what it used come as ever.
 *
 *   PID 1                     tracer                      command
 *   trace_open -> fork ------>
 *   fork -----------------------------------------------> trace_child; user, folder, Landlock, filter
 *   trace_parent -- its pid -> waits                       trace_ready: waits, without a call
 *                             PTRACE_SEIZE, interrupt ---> execve, and all that follows
 *
 * The command is seized when nothing more parts it from any other: a copy of a container's PID 1 that could be looked into
 * before its filter stands would be a way around the filter. And it waits without a call, since the filter already says
 * SECCOMP_RET_TRACE. The tracer lives as long as anything that it traces, for the same reason; if it dies, so do they. */
#ifndef TVINIT_TRACE_H
#define TVINIT_TRACE_H

#include <stdbool.h>
#include <sys/types.h>

#include "users.h"

struct trace_meeting;

struct tracing {
    pid_t tracer;
    int records; /* where PID 1 reads records, non-blocking; -1: nothing is recorded. The caller closes it */
    struct trace_meeting *meeting;
};

/* Fork a tracer. `words` are those of the operation `trace` without its name, NULL: no call is traced; `no_vdso`: have
 * programs find no vDSO, so that they ask the kernel for the time. `user`: who the command becomes, NULL: it stays.
 * 0 or errno; EINVAL for words that are none. */
int trace_open(struct tracing *t, char *const *words, bool no_vdso, const struct user *user);

/* In PID 1, once the command is forked (-1: it could not be). */
void trace_parent(struct tracing *t, pid_t command);

/* In the command, before it has a filter or another user. */
void trace_child(struct tracing *t);

/* In the command, directly before execve and after all else: return when it is traced. 0 or errno. It calls nothing but
 * prctl, in a container. */
int trace_ready(struct tracing *t);

#endif
