/* Inside the tracer: what is asked for, the tracees, the records. */
#ifndef TVINIT_TRACER_H
#define TVINIT_TRACER_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "wire.h"

struct user; /* users.h: not included here, <sys/user.h> has one of its own */

enum {
    TRACE_CALLS = 1024,     /* call numbers are below */
    TRACE_STRING = 4096,    /* bytes copied of a path ... */
    TRACE_STRUCT = 512,     /* ... of a structure or socket address ... */
    TRACE_VECTOR = 32,      /* ... and strings of a vector ... */
    TRACE_VECTOR_TEXT = 256 /* ... with at most so many bytes each */
};

/* How calls are stopped at. */
enum trace_mode {
    TRACE_NONE,   /* not at all: only execs are followed */
    TRACE_FILTER, /* the command's filter says SECCOMP_RET_TRACE for them */
    TRACE_STOPS,  /* at every call, those that were not asked for are passed over */
    TRACE_ALL,
};

/* One argument that is copied. */
struct capture {
    uint8_t arg, kind;
    uint16_t size; /* bytes, or the argument that says how many */
};

struct call {
    bool wanted;
    uint8_t count;
    struct capture captures[6];
};

struct asked {
    enum trace_mode mode;
    bool no_vdso;
    uint32_t bytes; /* at most so many are copied of a buffer */
    uint32_t stall; /* milliseconds that tracees stand still because nobody reads records; then these are lost */
    struct call calls[TRACE_CALLS];
};

/* Words of the operation. False: they are none. */
bool asked_parse(struct asked *a, char *const *words);

/* ---- tracees (tracee.c) ---- */

struct tracee {
    struct tracee *next;
    pid_t tid, tgid;
    bool in_call;    /* between the entry and the exit of a call ... */
    bool recorded;   /* ... that is recorded */
    bool skip_entry; /* an entry stop comes after the filter's, as before Linux 4.8 and in gVisor */
    uint32_t nr;
    uint64_t args[6], sp;
    uint64_t start;
    uint8_t captured;
    struct writer data; /* what was copied at the entry */
};

struct tracee *tracee_of(pid_t tid);
struct tracee *tracee_add(pid_t tid, pid_t tgid); /* NULL: memory is out */
void tracee_drop(pid_t tid);
/* A thread that executes takes its process's number: its state goes there. NULL: memory is out. */
struct tracee *tracee_moves(pid_t from, pid_t to);

/* Where a stopped tracee is in a call. */
enum stop_at { STOP_UNKNOWN, STOP_ENTRY, STOP_EXIT, STOP_FILTER };
struct stopped {
    enum stop_at at;
    uint64_t nr, args[6], sp;
    int64_t result;
    uint32_t data; /* of SECCOMP_RET_TRACE */
};
bool stopped_read(pid_t tid, struct stopped *s);
/* True if the filter comes before the entry stop: it does where stopped_read cannot tell. */
bool stopped_filter_first(void);
/* Have the call that is about to begin fail with `error` instead. */
bool stopped_refuse(pid_t tid, int error);

/* Copy memory of a stopped tracee; the number of bytes that could be had. */
size_t tracee_read(pid_t tid, uint64_t from, void *to, size_t size);
bool tracee_write_word(pid_t tid, uint64_t to, uint64_t word);
/* Hide the vDSO of a tracee that has just executed. */
void tracee_hide_vdso(pid_t tid, uint64_t sp);

/* ---- records (tracerec.c) ---- */

enum { REC_HELLO, REC_CALL, REC_SIGNAL, REC_EXIT, REC_NEW, REC_EXEC, REC_STOP, REC_LOST };
enum { CALL_UNFINISHED = 1 };
enum { COPY_CUT = 1, COPY_FAULT = 2 };

void records_open(int fd); /* -1: none */
void records_call(const struct tracee *t, bool finished, int64_t result, uint64_t now);
void records_signal(const struct tracee *t, int number, int code, uint32_t sender, uint64_t now);
void records_stop(const struct tracee *t, int number, uint64_t now);
void records_exit(const struct tracee *t, int status, uint64_t now);
void records_new(const struct tracee *t, pid_t tgid, pid_t tid, uint64_t now);
void records_exec(const struct tracee *t, pid_t former, const char *name, uint64_t now);

/* The command has ended: what is written goes out, then the pipe is closed. */
void records_end(void);
/* Nobody gets records (any more). */
bool records_closed(void);
/* Write what the pipe takes; true if something is left. */
bool records_flush(void);
/* So many wait that no tracee may go on until they are fewer. */
bool records_full(void);
/* They waited too long: from here on records are counted, not kept, until there is room. */
void records_give_up(void);
int records_fd(void);

/* Copy the arguments of a call: at its entry those that go in, at its exit those that come out. */
void capture_in(struct tracee *t, const struct asked *a);
void capture_out(struct tracee *t, const struct asked *a, int64_t result);

uint64_t now_ns(void);

/* A page that PID 1, the tracer and the command share until the command executes. */
enum { TRACE_MEETING_BEGINS, TRACE_MEETING_WAITS, TRACE_MEETING_GO };
struct trace_meeting {
    _Atomic pid_t command; /* by PID 1: 0 not yet, -1 there is none */
    _Atomic int state;     /* by the command: it waits; by the tracer: it may go */
    int error;             /* by the tracer, before that */
};

/* The tracer's life: seize the command, follow it to the end of all that it starts. `records` -1: write none. */
_Noreturn void tracer_main(const struct asked *a, struct trace_meeting *m, int records, const struct user *user);

#endif
