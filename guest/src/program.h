/* The machine's program: the one command that it is there for (PROTOCOL.md, EXEC, "program").
 *
 * It outlives whoever started it, what it writes goes to the keeper's log, and a shutdown begins with its stop signal. One at a
 * time: after its end there may be another. */
#ifndef TVINIT_PROGRAM_H
#define TVINIT_PROGRAM_H

#include <stdbool.h>
#include <sys/types.h>

#include "request.h"

enum { PROGRAM_MS = 7000 /* from its stop signal until all others are told, where nobody said how long */ };

/* What was asked for has started; passed over unless it is to be the program. */
void program_begin(const struct request *r, pid_t pid);

bool program_runs(void);

/* A child was reaped. */
void program_ended(pid_t pid, int status);

/* Send it its stop signal. False if there is none that runs. */
bool program_stop(void);

/* Its time is over. */
void program_kill(void);

/* The builtin that says how it is, as lines "key value": pid, and once it has ended exited or signaled. Nothing if none was started. */
int program_main(char **argv);

#endif
