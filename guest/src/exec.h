/* EXEC: collect the request, resolve its user, make pipes or a terminal, start the program or builtin. */
#ifndef TVINIT_EXEC_H
#define TVINIT_EXEC_H

#include <stdint.h>

#include "frame.h"

/* /dev/null kept open, so that a command costs no open and the root may change under us. */
int exec_open(void);

/* Take an EXEC frame; when it is the request's last, start it: STARTED or ERROR is queued. */
void exec_frame(const struct frame *f);

/* Forget half-made requests: of one slot, or of all (slot 0). */
void exec_forget(uint32_t slot);

/* No more commands: SHUTDOWN has begun. */
void exec_close(void);

/* Run argv as root without input or output; wait up to `ms`, then kill its group. Its wait status, or -1 and errno
 * (ETIMEDOUT if it was killed). */
int exec_wait(char **argv, int ms);

#endif
