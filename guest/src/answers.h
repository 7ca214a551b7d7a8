/* The answerer's insides. answer.c: the loop, listeners coming and going; answer_calls.c: calls, delays, what an owner left;
 * answer_clients.c: connections and what they ask for; answer_jail.c: what it gives up. */
#ifndef TVINIT_ANSWERS_H
#define TVINIT_ANSWERS_H

#include <linux/seccomp.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "answer.h"
#include "behalf.h"
#include "rules.h"

#ifndef SECCOMP_IOCTL_NOTIF_SET_FLAGS
#define SECCOMP_IOCTL_NOTIF_SET_FLAGS SECCOMP_IOW(4, uint64_t)
#define SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP 1
#endif

enum {
    LISTENERS_MAX = 512,
    CLIENTS_MAX = 64,
    ENDED_MAX = 256,
    JOBS_MAX = 64,
    HELD_MAX = 16384,         /* delayed answers ... */
    HELD_OF_ONE = 4096,       /* ... and of one listener */
    RULES_BYTES = 64 << 20,   /* memory of all listeners' rules */
    WALK_BACK = 65536, WALK_ON = 4096,
    JOB_MS = 10000,           /* a mount or mknod */
};

enum source_kind { SOURCE_INTAKE, SOURCE_LISTEN, SOURCE_SIGNALS, SOURCE_LISTENER, SOURCE_CLIENT };

/* First in whatever epoll points at. */
struct source {
    enum source_kind kind;
    int fd;
};

struct client;

struct listener {
    struct source source;
    struct rules rules;
    size_t bytes;            /* of rules */
    int ruleset;             /* the command's Landlock ruleset, or -1 */
    bool denied;             /* its operations were malformed */
    bool shared;             /* a client has, or had, the listener too */
    bool waits;              /* for the owner of its handlers: calls are left in the kernel */
    int64_t waits_until;     /* ns; 0: no call waits yet */
    bool heard;              /* epoll tells us of its calls */
    bool gone;
    bool seen;               /* last_id is one */
    uint64_t last_id;        /* the latest that we received, or were told of */
    bool walk_next;          /* an owner left that never said which ids it had: look when the next comes */
    size_t held;
    struct client *client;
    struct listener *next;
};

struct client {
    struct source source;
    struct listener *listener; /* NULL: not attached (yet) */
    bool asked, writing, gone;
    uint8_t token[ANSWER_TOKEN];
    int64_t until;             /* ns: attached by then */
    int page;                  /* memfd of the ids that it holds, or -1 */
    struct client *next;
};

struct held {
    int64_t due;
    struct listener *listener;
    struct seccomp_notif_resp answer;
};

struct job {
    pid_t pid;
    uint32_t request;
    uint64_t id;
    int64_t until; /* ns; INT64_MAX: as long as the program waits */
    struct client *client;
};

struct answerer {
    int epoll;
    struct source intake, listen, signals;
    struct listener *listeners;
    size_t listener_count, rules_bytes;
    struct client *clients;
    size_t client_count;
    struct held held[HELD_MAX]; /* a heap, the next due first */
    size_t held_count;
    struct job jobs[JOBS_MAX];
    size_t job_count;
    uint8_t ended[ENDED_MAX][ANSWER_TOKEN]; /* tokens of listeners that are gone, the oldest overwritten: nobody need wait for them */
    size_t ended_count;
    bool intake_ended;
    int64_t now; /* CLOCK_MONOTONIC, ns, of this turn */
};

/* answer.c */
int64_t answer_now(void);
bool answer_watch(struct answerer *a, struct source *s, uint32_t events, bool first);
/* Look again at whether to take this listener's calls. */
void answer_interest(struct answerer *a, struct listener *l);
/* A line to whoever started us. */
void answer_say(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* answer_calls.c */
void calls_receive(struct answerer *a, struct listener *l);
/* Answer now or later. False: no rule matches and `give_back`. */
bool calls_decide(struct answerer *a, struct listener *l, const struct seccomp_notif *call, bool give_back);
bool calls_valid(const struct listener *l, uint64_t id);
/* Its last task has ended. */
bool calls_over(const struct listener *l);
/* Send what is due; returns when the next is (INT64_MAX: none). */
int64_t calls_due(struct answerer *a);
/* This id is one of the listener's. */
void calls_seen(struct listener *l, uint64_t id);
/* Forget what is held of a listener that is gone. */
void calls_forget(struct answerer *a, struct listener *l);
/* Fail what an owner received and did not answer. page: its ids, or -1. */
void calls_fail(struct answerer *a, struct listener *l, int page);
/* There is no room for delayed answers: drop those that nobody waits for any more. */
void calls_prune(struct answerer *a, struct listener *l);

/* answer_clients.c */
void clients_accept(struct answerer *a);
/* A connection that came on the intake; token NULL: it will say itself. */
void clients_add(struct answerer *a, int fd, const uint8_t *token);
void clients_event(struct answerer *a, struct client *c, uint32_t events);
/* Attach those whose listener is there now, let those go whose time is up; when to look again. */
int64_t clients_due(struct answerer *a);
void clients_drop(struct answerer *a, struct client *c);
/* Children that ended, or that nobody waits for any more; when to look again. */
int64_t clients_jobs(struct answerer *a);
/* Receive one message, with up to two descriptors. -1: nothing; 0: the end. fds that are not there are -1. */
ssize_t clients_message(int fd, uint8_t *buffer, int fds[2]);

/* answer_jail.c */
bool answer_jail(pid_t parent);

#endif
