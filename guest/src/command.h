/* The commands that run here: their streams, their ends.
 *
 * A command is attached to the stream of the client that started it until that client goes or the line is synchronised
 * anew; from then on what it writes is read and thrown away, so that it does not block, and its stdin stays open and silent.
 * It leaves the table when its first process has been reaped and what that wrote has been sent. */
#ifndef TVINIT_COMMAND_H
#define TVINIT_COMMAND_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/resource.h>
#include <sys/types.h>

#include "bytes.h"
#include "frame.h"
#include "loop.h"

enum { COMMANDS_MAX = 512 };

struct command;

/* The command's stdout or stderr, its terminal, or the records of its trace. */
struct source {
    struct watch watch;
    struct command *of;
    struct source *next; /* in the queue of those that may have bytes */
    bool queued, ready, hung_up, pty;
    uint8_t channel;
    uint32_t credit;
    int64_t left; /* bytes that are still sent after the command's end; -1 while it runs */
};

/* The command's stdin. */
struct sink {
    struct watch watch;
    struct command *of;
    bool watched, ended, pty;
    int keys;          /* where its keys that signal go, -1: to the terminal (keys.h) */
    struct bytes waiting; /* until the command reads it */
    uint32_t granted;  /* what the client may still send */
    uint32_t consumed; /* what it has not been told of yet */
};

struct command {
    struct command *next;
    uint32_t stream, flags;
    bool attached, ended;
    pid_t pid;
    int status;
    struct rusage usage;
    struct sink in;
    struct source out, err, trace;
};

/* Our ends of a new command's descriptors; -1 for none. They are watched and closed from here on. */
struct command *command_add(uint32_t stream, uint32_t flags, pid_t pid, int in, int out, int err);

/* Records of its tracer come from `fd`, until its end of file: the tracer closes it when the command has ended. */
void command_trace(struct command *c, int fd);

size_t command_count(void);
struct command *command_of(uint32_t stream);

void command_data(const struct frame *f);
void command_window(const struct frame *f);
void command_signal(const struct frame *f);
void command_resize(const struct frame *f);

/* The client in this slot left: its commands die, but those that were told to outlive it. */
void command_gone(uint32_t slot);

/* The line starts anew: every command is detached; builtins, which serve a client alone, die. */
void command_detach_all(void);

/* Reap whatever has ended. False once there is no child left at all. */
bool command_reap(void);

/* Signal every command's group. */
void command_kill_all(int signal);

/* Send what sources have while the line has room. True if more is left to send at once. */
bool command_pump(void);

/* Free what has ended. Between two turns of the loop only. */
void command_bury(void);

#endif
