/* The keeper: one small process that each running machine has (PROTOCOL.md, "Plans").
 *
 * keep.c reads the plan, becomes a daemon, starts the processes and runs the loop; keepline.c moves bytes between
 * the line, the clients and the mux; keepanswer.c starts the answerer; keepfiles.c writes logs and records. The loop is edge-triggered: watches only note
 * what is ready, keepline_serve then does what flow control lets it do. */
#ifndef TVINIT_KEEP_H
#define TVINIT_KEEP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "loop.h"
#include "mux.h"
#include "plan.h"

enum { KEEP_LOGS = 8, KEEP_PROCESSES = 8, KEEP_REASON = 128 };

struct logfile {
    struct watch watch; /* the pipe it is read from; fd -1: ended, or LOG frames */
    bool readable;
    char name[32];
    int file;
    uint64_t size, cap;
};

/* A host client's socket. */
struct connection {
    struct watch watch;
    struct mux_client *client;
    bool readable, writable, hangup;
    int64_t progress; /* when its queue last got shorter or was empty */
};

struct process {
    const struct op *ops;
    size_t count;
    pid_t pid; /* 0 once reaped */
};

struct keeper {
    struct mux mux;
    struct watch line, listener, signals, owner, ready;
    struct watch oom;     /* an eventfd: the machine's memory has run out; fd -1: nobody wants to know */
    struct watch dialled; /* the socket that the guest calls to make the line, again when it has ended; fd -1: the line was given */
    bool line_readable, line_writable, listener_ready, dialled_ready;
    int folder, alive;
    struct logfile logs[KEEP_LOGS], init_log, program_log; /* the last: cap 0 until its program writes */
    size_t log_count;
    struct process processes[KEEP_PROCESSES]; /* the last is the engine */
    size_t process_count;
    struct watch intake, answer_listen; /* what the answerer is given; fd -1: it is not to be */
    struct process answerer;
    int answer_log;        /* the end of a pipe that its stderr is, -1: not made yet */
    bool answer_wanted;    /* there is something for it to do */
    int64_t answer_after;  /* it is not started before this */
    int64_t started, ttl, idle, grace; /* ms; INT64_MAX: none */
    int64_t active;                    /* when there last was traffic ... */
    uint64_t traffic;                  /* ... and the mux's count at that time */
    int64_t kill_at;                   /* INT64_MAX: not stopping */
    bool tell_shutdown;                /* SHUTDOWN is still to be sent */
    int64_t sync_at;                   /* when the line is to be begun again, INT64_MAX: not broken */
    int64_t lose_at;                   /* when the clients are told that the line ended, INT64_MAX: it has not */
    int64_t backoff, synced_at;
    int64_t throttled;                 /* the line is not read before this */
    int64_t budget;                    /* bytes of noise until it is throttled */
    int64_t output_left, output_at;    /* bytes of its program's output that are none, as of that time */
    uint64_t noise;                    /* the mux's count as of the last look */
    bool engine_ended;
    int engine_status;
    char reason[KEEP_REASON];
};

pid_t keep_engine(const struct keeper *k);

/* Kill the engine now; the reason is recorded. */
void keep_kill(struct keeper *k, const char *reason);

/* Ask the guest to shut down, and kill after `grace` ms. A stop under way is only ever made shorter. */
void keep_stop(struct keeper *k, int64_t grace, const char *reason);

/* Tell who started us, and forget that pipe at the last word. */
void keep_report(struct keeper *k, const char *text, bool last);

/* keepline.c */
void keepline_open(struct keeper *k);
/* Move what can be moved. True if more could be moved at once. */
bool keepline_serve(struct keeper *k);
/* The engine has ended: read what it left in the line, hand on what clients can take. */
void keepline_drain(struct keeper *k);
void keepline_close(struct keeper *k);
/* When the line's own timers are due next. */
int64_t keepline_deadline(const struct keeper *k);

/* keepanswer.c */
bool keepanswer_listen(struct keeper *k);
void keepanswer_open(struct keeper *k);
/* Start the answerer if it is wanted. When to call this again at the latest. */
int64_t keepanswer_serve(struct keeper *k);
/* A child was reaped. */
void keepanswer_ended(struct keeper *k, pid_t pid);

/* keepfiles.c */
bool keepfiles_open_log(struct keeper *k, struct logfile *log, const char *name, uint64_t cap);
void keepfiles_log(struct keeper *k, struct logfile *log, const void *data, size_t size);
/* Read the pipes of all logs that are ready; true if one may have more. */
bool keepfiles_serve(struct keeper *k);
bool keepfiles_write_pid(const struct keeper *k);
void keepfiles_write_exit(struct keeper *k);

#endif
