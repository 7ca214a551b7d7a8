/* One command's descriptors and the flow control of its channels. */
#ifndef TVINIT_STREAM_H
#define TVINIT_STREAM_H

#include "command.h"

/* fd -1: there is none. */
void source_open(struct source *s, struct command *of, int fd, uint8_t channel, bool pty);
void source_grant(struct source *s, uint32_t more);

/* Look at it again: its credit or its client changed. */
void source_wake(struct source *s);

/* The command has ended: only what it has already written is still sent. */
void source_last(struct source *s);

/* Read sources in turn, whole frames, while the line has room. True if it stopped although more may be read. */
bool source_pump(void);

/* ms until it is to be called again though nothing is new, `other` (-1: never) if that is sooner. */
int source_wait(int other);

void sink_open(struct sink *s, struct command *of, int fd, bool pty);

/* Data for the command; none is the end of file. False if it is more than was granted. */
bool sink_take(struct sink *s, const uint8_t *data, size_t size);
void sink_close(struct sink *s);

#endif
