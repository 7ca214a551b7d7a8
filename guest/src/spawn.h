/* Start a program without copying this process: clone with shared memory, the parent suspended until exec. */
#ifndef TVINIT_SPAWN_H
#define TVINIT_SPAWN_H

#include <linux/filter.h>
#include <stdbool.h>
#include <sys/types.h>

#include "users.h"

/* The child runs on a stack of its own while the parent waits; AddressSanitizer does not know it. */
#define IN_CHILD __attribute__((no_sanitize("address", "undefined")))

struct spawn {
    char *const *argv, *const *env;
    const char *path;        /* where argv[0] is looked up */
    const char *cwd;         /* NULL: stay */
    const struct user *user; /* NULL: stay */
    int fd[3];
    bool pty; /* fd[0] becomes the controlling terminal */
    bool quiet;  /* the child says nothing of an exec that failed */
    int keys;    /* what is said of its keys (keys.h), 0: nothing */
    int records; /* set by policy_spawn: what its tracer writes (trace.h), 0: nothing */
    int (*under)(struct spawn *s); /* the child's last act before its program, instead of spawn_filter: 0, or errno with s->failed set */
    const void *what;              /* for that */
    /* Set by the child, which shares our memory. */
    int error;
    const char *failed; /* what failed before exec; NULL if exec did, or nothing */
};

/* The child's pid, or -1 and errno. If s->failed is set the child has ended without a word; if exec failed it has said
 * so on its stderr, unless it is quiet, and ends with 127 or 126. Every signal must be blocked: the child unblocks them. */
pid_t spawn(struct spawn *s);

/* What a child does between its birth and its work, forked ones too: session, terminal, descriptors, user, folder. 0, or
 * errno with s->failed set. */
int spawn_enter(struct spawn *s);

/* The seccomp program of every command that has no policy; and of every builtin. Kept, not copied. */
void spawn_filter_set(const struct sock_fprog *filter);

/* Install it here, where one was set. 0, or -1 and errno. */
int spawn_filter(void);

/* Say on `fd` why exec failed: of a child that was quiet. */
void spawn_say(const struct spawn *s, int fd);

/* Run the program, or say on stderr why that cannot be and end. */
_Noreturn void spawn_execute(struct spawn *s);

#endif
