/* The line of a machine that calls its keeper: behind gVisor neither a virtio port nor an inherited descriptor
 * outlives a checkpoint, so tvinit dials a unix socket of the host, again whenever the line has ended. */
#ifndef TVINIT_DIAL_H
#define TVINIT_DIAL_H

#include <stdbool.h>

/* Call the socket at `path`, and remember it for later calls. Returns the descriptor, or -1 with errno. */
int dial(const char *path);

/* The line has ended: call again if it is time to. False if there is nobody to call, or nobody has answered for a minute. */
bool dial_again(void);

/* Hang up once what is queued has been sent, and then call again as after any other end. 0, or ENOTCONN: nobody was called. */
int dial_away(void);

/* Hang up now if that was asked for. */
void dial_leave(void);

/* ms until dial_again is due; -1: it is not. */
int dial_wait(void);

#endif
