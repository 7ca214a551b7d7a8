#include "policy.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "answer.h"
#include "answerer.h"
#include "fds.h"
#include "filter.h"
#include "frame.h"
#include "landlock.h"
#include "loop.h"
#include "trace.h"

#ifndef SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV
#define SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV (1UL << 5) /* Linux 5.19 */
#endif

enum {
    READY_MS = 10000, /* until the child is the user in its folder, and until its listener is handed over */
    LOOKS = 100,      /* at a page, before the sibling sleeps between them: the filter is there in some 100 us */
    REFUSED = 126,
};

/* What the child and its sibling both see. The number is -1 until there is a listener, -2 if there will be none. */
struct page { atomic_int listener; };

/* What the child has open until its execve. */
struct open { int report, answer, ruleset; };

/* What the child tells us; its pointers are into what it has of ours. */
struct report {
    int error;
    const char *failed;
};

static const struct known {
    const char *name;
    unsigned char least, most; /* words after the name; most 255: any number */
    bool handed;
} KNOWN[] = {
    {"seccomp", 1, 1, false}, {"landlock", 1, 2, false}, {"landlock-net", 1, 1, false}, {"token", 1, 1, true},
    {"rule", 3, 255, true},   {"handler", 1, 255, true},   {"trace", 0, 255, false},      {"no-vdso", 0, 0, false},
};

static const struct known *known(const struct op *op) {
    for (size_t i = 0; i < sizeof KNOWN / sizeof *KNOWN; i++)
        if (!strcmp(KNOWN[i].name, op->words[0]))
            return op->count - 1 >= KNOWN[i].least && (KNOWN[i].most == 255 || op->count - 1 <= KNOWN[i].most) ? &KNOWN[i] : NULL;
    return NULL;
}

static bool path_op(const struct op *op) { return !strcmp(op->words[0], "landlock") && op->count == 3; }

static bool well_formed(const struct op *op) {
    if (path_op(op))
        return op->words[1][0] == '/' && op->words[2][0] && strspn(op->words[2], "rwx") == strlen(op->words[2]);
    if (!strcmp(op->words[0], "token"))
        return strlen(op->words[1]) == 2 * (size_t)ANSWER_TOKEN && strspn(op->words[1], "0123456789abcdef") == 2 * (size_t)ANSWER_TOKEN;
    return strncmp(op->words[0], "landlock", 8) || !strcmp(op->words[1], "none");
}

static int take(struct policy *p, const struct op *op, uint32_t *handed, bool *token) {
    const struct known *k = known(op);
    const char *name = op->words[0];
    p->failed = name;
    if (!k || !well_formed(op))
        return EINVAL;
    if (!strcmp(name, "seccomp") && (p->filter.len || filter_parse(op->words[1], &p->filter) < 0))
        return p->filter.len ? EINVAL : errno;
    p->landlock |= !strcmp(name, "landlock");
    p->no_network |= !strcmp(name, "landlock-net");
    p->traced |= !strcmp(name, "trace") || !strcmp(name, "no-vdso");
    p->no_vdso |= !strcmp(name, "no-vdso");
    if (!strcmp(name, "trace"))
        p->trace = op->words + 1;
    *token |= !strcmp(name, "token");
    p->answered |= !strcmp(name, "rule") || !strcmp(name, "handler");
    if (k->handed) {
        ++*handed;
        write_u32(&p->handing, (uint32_t)op->count);
        for (size_t i = 0; i < op->count; i++)
            write_string(&p->handing, op->words[i]);
    }
    return 0;
}

/* Before the child is made: a policy that this kernel cannot hold is refused as a request. */
static int able(struct policy *p) {
    struct seccomp_notif_sizes sizes;
    p->failed = "Landlock";
    int abi = p->landlock || p->no_network ? landlock_abi() : 0;
    if (abi < 0 || (p->no_network && abi < 4))
        return EOPNOTSUPP;
    p->failed = "seccomp listener";
    if (p->answered && syscall(SYS_seccomp, SECCOMP_GET_NOTIF_SIZES, 0, &sizes) < 0)
        return EOPNOTSUPP;
    return 0;
}

int policy_take(const struct plan *ops, struct policy *out) {
    uint32_t handed = 0;
    bool token = false;
    *out = (struct policy){.ops = ops};
    if (ops->count == 0)
        return 0;
    write_u8(&out->handing, 'L');
    write_u32(&out->handing, 0);
    for (size_t i = 0; i < ops->count; i++) {
        int error = take(out, &ops->ops[i], &handed, &token);
        if (error)
            return error;
    }
    out->failed = "rules";
    if (out->handing.bad)
        return ENOMEM;
    put_u32(out->handing.data + 1, handed);
    if (out->answered && (!out->filter.len || !token))
        return EINVAL;
    if (out->answered && out->handing.used > ANSWER_MESSAGE)
        return E2BIG;
    return able(out);
}

void policy_free(struct policy *p) {
    free(p->filter.filter);
    writer_free(&p->handing);
    *p = (struct policy){0};
}

/* -- in the child ------------------------------------------------------------------------------ */

/* Made while we still are root: the user need not be able to look the paths up. -1 with errno, `failed` set. */
static int make_ruleset(const struct policy *p, const char **failed) {
    int abi = landlock_abi();
    struct ll_ruleset handled = {.fs = p->landlock ? landlock_files(abi) : 0, .net = p->no_network ? LL_NET_TCP : 0};
    *failed = "Landlock";
    int ruleset = landlock_make(abi, &handled);
    for (size_t i = 0; i < p->ops->count && ruleset >= 0; i++) {
        const struct op *op = &p->ops->ops[i];
        *failed = path_op(op) ? op->words[1] : *failed;
        if (path_op(op) && landlock_allow_path(ruleset, op->words[1], op->words[2], handled.fs) < 0)
            return -1;
    }
    return ruleset;
}

/* All but the filter. errno, with s->failed set. */
static int settle(struct spawn *s, const struct policy *p, struct open *o) {
    if ((p->landlock || p->no_network) && (o->ruleset = make_ruleset(p, &s->failed)) < 0)
        return errno;
    int error = spawn_enter(s);
    if (error)
        return error;
    /* What belongs to other commands it must not hold: they would never see the end of a pipe that it does. */
    int kept[] = {o->ruleset, o->report, o->answer};
    close_all_but(kept, sizeof kept / sizeof *kept);
    s->failed = "no-new-privs";
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0)
        return errno;
    s->failed = "Landlock";
    if (o->ruleset >= 0 && landlock_enter(o->ruleset) < 0)
        return errno;
    s->failed = NULL;
    return 0;
}

/* The listener's number, or -1: the child has given up, or is no more. */
static int await_listener(struct page *page, pid_t child) {
    int64_t until = now_ms() + READY_MS;
    for (int looks = 0; now_ms() < until; looks++) {
        int fd = atomic_load(&page->listener);
        if (fd != -1)
            return fd;
        /* The child cannot wake us: a filter may forbid or hold any call that would. */
        if (looks < LOOKS)
            sched_yield();
        else if (kill(child, 0) < 0)
            return -1;
        else
            nanosleep(&(struct timespec){.tv_nsec = 50000}, NULL);
    }
    return -1;
}

/* With the ruleset, which holds for what is done on the program's behalf, too. -1 with errno, EAGAIN if there is no room now. */
IN_CHILD static ssize_t send_once(const struct open *o, const struct writer *handing, int listener) {
    int fds[2] = {listener, o->ruleset};
    size_t size = (o->ruleset < 0 ? 1 : 2) * sizeof *fds;
    union { struct cmsghdr head; char bytes[CMSG_SPACE(sizeof fds)]; } control;
    struct iovec part = {.iov_base = handing->data, .iov_len = handing->used};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = CMSG_SPACE(size)};
    memset(&control, 0, sizeof control);
    control.head = (struct cmsghdr){.cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS, .cmsg_len = CMSG_LEN(size)};
    memcpy(CMSG_DATA(&control.head), fds, size);
    return sendmsg(o->answer, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
}

static bool send_listener(const struct open *o, const struct writer *handing, int listener) {
    struct pollfd room = {.fd = o->answer, .events = POLLOUT};
    int64_t until = now_ms() + READY_MS;
    do {
        if (send_once(o, handing, listener) >= 0)
            return true;
        if (errno != EAGAIN)
            return false;
        poll(&room, 1, 100);
    } while (now_ms() < until);
    return false;
}

/* The sibling. */
static _Noreturn void hand_over(const struct policy *p, struct page *page, pid_t child, const struct open *o) {
    prctl(PR_SET_DUMPABLE, 0); /* it runs as the program's user, unfiltered: the program must not get into it */
    int listener = await_listener(page, child);
    if (listener >= 0 && !send_listener(o, &p->handing, listener)) {
        dprintf(2, "policy: its listener cannot be handed over: %s\n", strerror(errno));
        kill(child, SIGKILL);
    }
    _exit(0);
}

/* -1 with errno. */
IN_CHILD static int filter_with_listener(const struct policy *p) {
    unsigned long flags = SECCOMP_FILTER_FLAG_NEW_LISTENER | SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV;
    int fd = (int)syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, &p->filter);
    if (fd < 0 && errno == EINVAL)
        fd = (int)syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_NEW_LISTENER, &p->filter);
    return fd;
}

/* Install the filter; the sibling takes its listener away. -1 with errno. */
static int answered_filter(const struct policy *p, const struct open *o) {
    struct page *page = mmap(NULL, sizeof *page, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (page == MAP_FAILED)
        return -1;
    atomic_init(&page->listener, -1);
    pid_t child = getpid();
    /* Our parent's child, not ours: whoever waits for its children here would not know it. */
    long sibling = syscall(SYS_clone, CLONE_FILES | CLONE_PARENT | SIGCHLD, 0, 0, 0, 0);
    if (sibling < 0)
        return -1;
    if (sibling == 0)
        hand_over(p, page, child, o);
    int fd = filter_with_listener(p);
    atomic_store(&page->listener, fd < 0 ? -2 : fd);
    return fd < 0 ? -1 : 0;
}

static int install(const struct policy *p, const struct open *o) {
    if (p->answered)
        return answered_filter(p, o);
    if (!p->filter.len)
        return spawn_filter();
    return (int)syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &p->filter);
}

static _Noreturn void child(struct spawn *s, const struct policy *p, struct open o, struct tracing *t) {
    if (p->traced)
        trace_child(t);
    struct report r = {.error = settle(s, p, &o)};
    r.failed = s->failed;
    if (write(o.report, &r, sizeof r) != sizeof r || r.error)
        _exit(REFUSED);
    if (install(p, &o) < 0) {
        dprintf(2, "policy: its filter cannot be installed: %s\n", strerror(errno));
        _exit(REFUSED);
    }
    int error = p->traced ? trace_ready(t) : 0;
    if (error) {
        dprintf(2, "policy: it cannot be traced: %s\n", strerror(error));
        _exit(REFUSED);
    }
    spawn_execute(s);
}

/* -- in a child that shares PID 1's memory ----------------------------------------------------- */

struct shared {
    const struct policy *policy;
    int answer;
};

IN_CHILD static int under(struct spawn *s) {
    const struct shared *shared = s->what;
    const struct policy *p = shared->policy;
    struct open o = {-1, shared->answer, -1};
    s->failed = "seccomp";
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0)
        return errno;
    int listener = p->answered ? filter_with_listener(p) : install(p, &o);
    if (listener < 0)
        return errno;
    s->failed = "seccomp listener";
    if (p->answered && send_once(&o, &p->handing, listener) < 0)
        return errno;
    s->failed = NULL;
    return 0;
}

/* Whether PID 1 may wait for the child's execve: nobody holds what the child does until then, and nothing is looked up that
 * may hang. */
static bool is_free(const struct policy *p, int answer) {
    struct pollfd room = {.fd = answer, .events = POLLOUT};
    if (p->traced || p->landlock || p->no_network)
        return false;
    return !p->answered || (filter_lets(&p->filter, SYS_sendmsg) && filter_lets(&p->filter, SYS_execve) &&
                            filter_lets(&p->filter, SYS_exit_group) && poll(&room, 1, 0) > 0);
}

static pid_t spawn_shared(struct spawn *s, const struct policy *p, int answer) {
    struct shared shared = {p, answer};
    s->under = under;
    s->what = &shared;
    s->quiet = true; /* a rule may hold the write */
    pid_t pid = spawn(s);
    if (pid > 0 && s->error && !s->failed)
        spawn_say(s, s->fd[2]);
    return pid;
}

/* -- in PID 1 ---------------------------------------------------------------------------------- */

/* Wait until the child is all that it shall be but filtered, or knows why it cannot be. */
static struct report await_report(int fd) {
    struct report r;
    struct pollfd news = {.fd = fd, .events = POLLIN};
    int n = poll(&news, 1, READY_MS);
    if (n > 0 && read(fd, &r, sizeof r) == sizeof r)
        return r;
    return (struct report){.error = n == 0 ? ETIMEDOUT : ECHILD, .failed = "policy"};
}

pid_t policy_spawn(struct spawn *s, const struct policy *p) {
    int ends[2], answer = -1; /* of a pipe for the child's report */
    s->error = 0;
    s->failed = NULL;
    if (p->answered && (answer = answerer_end()) < 0)
        return -1;
    if (is_free(p, answer))
        return spawn_shared(s, p, answer);
    if (pipe2(ends, O_CLOEXEC) < 0)
        return -1;
    struct tracing t = {.records = -1};
    int error = p->traced ? trace_open(&t, p->trace, p->no_vdso, s->user) : 0;
    pid_t pid = error ? -1 : fork();
    if (pid == 0) {
        close(ends[0]);
        child(s, p, (struct open){ends[1], answer, -1}, &t);
    }
    int saved = error ? error : errno;
    trace_parent(&t, pid);
    s->records = t.records > 0 ? t.records : 0;
    close(ends[1]);
    if (pid > 0) {
        struct report r = await_report(ends[0]);
        if (r.error)
            kill(pid, SIGKILL); /* it is reaped as any other child */
        s->error = r.error;
        s->failed = r.failed;
    }
    close(ends[0]);
    errno = saved;
    return pid;
}
