/* The end of the machine: the stop signal to its program (program.h), until that has ended; SIGTERM to all, up to two seconds, SIGKILL, sync, unmount, BYE, reboot(2). The phases pass in
 * the ordinary loop, so what dying commands write is still sent. */
#ifndef TVINIT_POWER_H
#define TVINIT_POWER_H

#include <stdbool.h>
#include <stdint.h>

/* PID 1 of a container: the end of the machine is its own exit, and what is mounted is not its affair. */
extern bool power_contained;

enum power { POWER_OFF = 0, POWER_REBOOT = 1 };

/* Begin; a second call changes nothing. The machine's program has so many ms of its own before all others are told. */
void power_begin(enum power how, int64_t program_ms);

/* ms until power_turn must be called again; -1: nothing has begun. */
int power_wait(void);

/* One turn, after reaping; `children` says whether there are any left. Does not return from the last one as PID 1; else
 * true when all is done and said. */
bool power_turn(bool children);

#endif
