/* Starting the answerer (answer.h): of a container by its keeper, of a virtual machine by its PID 1. */
#ifndef TVINIT_ANSWERER_H
#define TVINIT_ANSWERER_H

#include <sys/types.h>

/* Fork it. What else this process has open it does not keep, and it ends with us. Its stderr is `said`, or ours for -1. Its
 * pid, or -1 and errno. */
pid_t answerer_fork(int intake, int listen, int said);

/* PID 1: the end by which a keeper's answerer is reached; from then on no other is started. */
void answerer_given(int fd);

/* PID 1: the end to hand listeners over to, of an answerer that lives: one of our own is started where none was given. -1 with
 * errno. */
int answerer_end(void);

/* PID 1: nothing more is handed over. An answerer of our own goes on until the last program that it answers has ended, and
 * then ends itself. */
void answerer_release(void);

#endif
