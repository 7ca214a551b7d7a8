/* Entry points of the modes; each gets the arguments after the mode's name and returns an exit status. */
#ifndef TVINIT_MODES_H
#define TVINIT_MODES_H

#include <stdbool.h>

int guest_main(int argc, char **argv);
int launch_main(int argc, char **argv);
int keep_main(int argc, char **argv);
int copy_main(int argc, char **argv);
int relay_main(int argc, char **argv);
int fence_main(int argc, char **argv);

struct sock_fprog;

/* The guest as the end of a launch plan: PID 1 of a container, in the process that carried the plan out. `answer`: where
 * listeners are handed over, -1: nowhere; `filter`: of every command. */
int guest_contained(int line, int answer, const struct sock_fprog *filter, bool hooks);

#endif
