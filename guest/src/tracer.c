/* The tracer's loop: wait for a stop, look, write down, let go on. */
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/signalfd.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "status.h"
#include "tracer.h"
#include "users.h"

enum {
    THREAD = 0x00010000,
    SYSCALL_STOP = SIGTRAP | 0x80,
    OPTIONS = PTRACE_O_TRACESYSGOOD | PTRACE_O_EXITKILL | PTRACE_O_TRACEFORK | PTRACE_O_TRACEVFORK | PTRACE_O_TRACECLONE |
              PTRACE_O_TRACEEXEC | PTRACE_O_TRACESECCOMP,
};

static const struct asked *asked;
static pid_t command;
static int children = -1; /* signalfd: a tracee has news */

static bool each_call(void) { return asked->mode == TRACE_STOPS || asked->mode == TRACE_ALL; }

static void resume(const struct tracee *t, int signal_to) {
    bool stop = t->in_call || each_call();
    if (each_call() && records_closed()) {
        if (!asked->no_vdso) {
            ptrace(PTRACE_DETACH, t->tid, NULL, (void *)(intptr_t)signal_to);
            tracee_drop(t->tid);
            return;
        }
        stop = false;
    }
    ptrace(stop ? PTRACE_SYSCALL : PTRACE_CONT, t->tid, NULL, (void *)(intptr_t)signal_to);
}

static void enter(struct tracee *t, const struct stopped *s) {
    t->in_call = true;
    t->nr = (uint32_t)s->nr;
    t->sp = s->sp;
    memcpy(t->args, s->args, sizeof t->args);
    bool wanted = s->nr < TRACE_CALLS && asked->mode != TRACE_NONE && (asked->mode == TRACE_ALL || asked->calls[s->nr].wanted);
    t->recorded = wanted && !records_closed();
    if (!t->recorded)
        return;
    t->start = now_ns();
    capture_in(t, asked);
}

static void leave(struct tracee *t, int64_t result) {
    if (t->recorded) {
        uint64_t now = now_ns();
        capture_out(t, asked, result);
        records_call(t, true, result, now);
    }
    t->in_call = t->recorded = false;
}

/* Where nothing says which of the two it is: they take turns, but a call that the filter refuses has no entry in gVisor. At an
 * entry the result is preset, to ENOSYS. */
static void take_turns(struct tracee *t, const struct stopped *s) {
#ifdef __x86_64__
    bool preset = s->result == -ENOSYS;
    if (t->in_call && preset && (s->nr != t->nr || s->sp != t->sp))
        leave(t, -ENOSYS); /* and this is the next one's entry */
    else if (!t->in_call && !preset)
        enter(t, s);
#endif
    if (t->in_call)
        leave(t, s->result);
    else
        enter(t, s);
}

static void on_syscall(struct tracee *t) {
    struct stopped s;
    if (t->skip_entry)
        t->skip_entry = false;
    else if (stopped_read(t->tid, &s) && s.at == STOP_UNKNOWN)
        take_turns(t, &s);
    else if (s.at == STOP_EXIT)
        leave(t, s.result);
    else if (s.at == STOP_ENTRY)
        enter(t, &s);
    resume(t, 0);
}

/* The filter's data, if not 0, is the errno that the call would get without us. */
static void on_filter(struct tracee *t) {
    struct stopped s;
    bool read = stopped_read(t->tid, &s);
    if (read && s.data)
        stopped_refuse(t->tid, (int)s.data);
    if (read && asked->mode == TRACE_FILTER && !records_closed()) {
        enter(t, &s);
        t->skip_entry = stopped_filter_first();
    }
    resume(t, 0);
}

static bool makes_thread(pid_t tid) {
    struct stopped s;
    uint64_t flags = 0;
    if (!stopped_read(tid, &s))
        return false;
    if (s.nr == SYS_clone3)
        tracee_read(tid, s.args[0], &flags, sizeof flags);
    else if (s.nr == SYS_clone)
        flags = s.args[0];
    return flags & THREAD;
}

static void on_new(struct tracee *t, int event) {
    unsigned long tid = 0;
    if (ptrace(PTRACE_GETEVENTMSG, t->tid, NULL, &tid) == 0 && tid > 0) {
        pid_t tgid = event == PTRACE_EVENT_CLONE && makes_thread(t->tid) ? t->tgid : (pid_t)tid;
        if (!tracee_of((pid_t)tid))
            tracee_add((pid_t)tid, tgid);
        records_new(t, tgid, (pid_t)tid, now_ns());
    }
    resume(t, 0);
}

static void read_name(pid_t tid, char *to, size_t size) {
    char path[32];
    snprintf(path, sizeof path, "/proc/%d/comm", tid);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t n = fd < 0 ? -1 : read(fd, to, size - 1);
    if (fd >= 0)
        close(fd);
    to[n > 0 ? n : 0] = 0;
    to[strcspn(to, "\n")] = 0;
}

static void on_exec(struct tracee *t) {
    unsigned long former = 0;
    struct stopped s;
    char name[64];
    pid_t tid = t->tid;
    if (ptrace(PTRACE_GETEVENTMSG, tid, NULL, &former) == 0 && former > 0 && (pid_t)former != tid && !(t = tracee_moves((pid_t)former, tid)))
        return;
    if (asked->no_vdso && stopped_read(tid, &s))
        tracee_hide_vdso(tid, s.sp);
    if (!records_closed()) {
        read_name(tid, name, sizeof name);
        records_exec(t, former ? (pid_t)former : tid, name, now_ns());
    }
    resume(t, 0);
}

static void on_signal(struct tracee *t, int number) {
    siginfo_t info;
    memset(&info, 0, sizeof info);
    ptrace(PTRACE_GETSIGINFO, t->tid, NULL, &info);
    records_signal(t, number, info.si_code, info.si_code <= 0 || number == SIGCHLD ? (uint32_t)info.si_pid : 0, now_ns());
    resume(t, number);
}

static void on_stop(struct tracee *t, int number) {
    if (number != SIGSTOP && number != SIGTSTP && number != SIGTTIN && number != SIGTTOU) {
        resume(t, 0); /* a new tracee's first stop, or SIGCONT after a stop of its group */
        return;
    }
    records_stop(t, number, now_ns());
    ptrace(PTRACE_LISTEN, t->tid, NULL, NULL);
}

static pid_t group_of(pid_t tid) {
    int group = status_number(tid, "Tgid");
    return group > 0 ? group : tid;
}

/* Stops that came while nobody may go on. A tracee that is stopped has no second one. */
static struct {
    struct stop { pid_t tid; int status; } *list;
    size_t count, size;
} later;

static void put_off(pid_t tid, int status) {
    if (later.count == later.size) {
        size_t want = later.size ? later.size * 2 : 64;
        struct stop *grown = realloc(later.list, want * sizeof *grown);
        if (!grown) {
            kill(tid, SIGKILL); /* memory is out, and it may not stand still for ever */
            return;
        }
        later.list = grown;
        later.size = want;
    }
    later.list[later.count++] = (struct stop){tid, status};
}

static void forget_stop(pid_t tid) {
    for (size_t i = 0; i < later.count; i++)
        if (later.list[i].tid == tid)
            later.list[i--] = later.list[--later.count];
}

static void ended(pid_t tid, int status) {
    struct tracee *t = tracee_of(tid);
    if (t && t->recorded)
        records_call(t, false, 0, now_ns());
    if (t)
        records_exit(t, status, now_ns());
    tracee_drop(tid);
    forget_stop(tid);
    if (tid == command)
        records_end();
}

static void handle(pid_t tid, int status) {
    if (!WIFSTOPPED(status)) {
        ended(tid, status);
        return;
    }
    struct tracee *t = tracee_of(tid);
    if (!t && !(t = tracee_add(tid, group_of(tid)))) {
        kill(tid, SIGKILL); /* memory is out, and it may not run unseen */
        return;
    }
    int number = WSTOPSIG(status), event = status >> 16;
    if (number == SYSCALL_STOP)
        on_syscall(t);
    else if (event == PTRACE_EVENT_SECCOMP)
        on_filter(t);
    else if (event == PTRACE_EVENT_FORK || event == PTRACE_EVENT_VFORK || event == PTRACE_EVENT_CLONE)
        on_new(t, event);
    else if (event == PTRACE_EVENT_EXEC)
        on_exec(t);
    else if (event == PTRACE_EVENT_STOP)
        on_stop(t, number);
    else if (event)
        resume(t, 0);
    else
        on_signal(t, number);
}

/* Take the dead off, whatever else stands still: the command's end must be heard of. (There is no waiting for ends alone: a
 * tracer is told of stops whether it asks or not.) */
static void bury(void) {
    int status;
    for (pid_t tid; (tid = waitpid(-1, &status, __WALL | WNOHANG)) > 0;) {
        if (WIFSTOPPED(status))
            put_off(tid, status);
        else
            ended(tid, status);
    }
}

/* Until the pipe takes more or a tracee has news; false after `ms`. */
static bool wait_for_either(int ms) {
    struct signalfd_siginfo news;
    struct pollfd p[2] = {{.fd = children, .events = POLLIN}, {.fd = records_fd(), .events = POLLOUT}};
    if (poll(p, 2, ms) == 0)
        return false;
    while (read(children, &news, sizeof news) > 0) {
    }
    return true;
}

static void wait_for_room(void) {
    uint64_t until = now_ns() + asked->stall * 1000000ull, now;
    for (bury(); records_flush() && records_full(); bury()) {
        if ((now = now_ns()) >= until) {
            records_give_up();
            return;
        }
        wait_for_either((int)((until - now) / 1000000) + 1);
    }
}

static void follow(void) {
    for (;;) {
        int status;
        if (later.count) {
            struct stop s = later.list[--later.count];
            handle(s.tid, s.status);
            if (records_full())
                wait_for_room();
            continue;
        }
        pid_t tid = waitpid(-1, &status, __WALL | WNOHANG);
        if (tid == 0) {
            if (records_flush()) {
                wait_for_either(-1);
                continue;
            }
            tid = waitpid(-1, &status, __WALL);
        }
        if (tid > 0)
            handle(tid, status);
        else if (errno != EINTR)
            break;
        if (records_full())
            wait_for_room();
    }
    /* None is left but what is not sent yet. */
    records_end();
    while (records_flush())
        wait_for_either(-1);
}

static void doze(void) { nanosleep(&(struct timespec){.tv_nsec = 50000}, NULL); }

/* Until PID 1 has said who it is and it waits for us; false if it has ended before. There is nothing to sleep on: the command
 * may make no call, and this is over in a fraction of a millisecond unless its folder is slow. */
static bool meet(struct trace_meeting *m) {
    while ((command = atomic_load(&m->command)) == 0)
        doze();
    while (command > 0 && atomic_load(&m->state) != TRACE_MEETING_WAITS) {
        if (kill(command, 0) < 0 && errno == ESRCH)
            return false;
        doze();
    }
    return command > 0;
}

static int seize(const struct user *user) {
    void *options = (void *)(intptr_t)OPTIONS;
    if (ptrace(PTRACE_SEIZE, command, NULL, options) == 0)
        return 0;
    /* Root without CAP_SYS_PTRACE traces its own alone. */
    if (errno != EPERM || !user || setgroups(user->group_count, user->groups) < 0 || setresgid(user->gid, user->gid, user->gid) < 0 ||
        setresuid(user->uid, user->uid, user->uid) < 0)
        return errno;
    return ptrace(PTRACE_SEIZE, command, NULL, options) == 0 ? 0 : errno;
}

/* Stop it where it waits, so that its next call is the first that is seen. */
static int interrupt(void) {
    int status;
    if (ptrace(PTRACE_INTERRUPT, command, NULL, NULL) < 0)
        return errno;
    for (;;) {
        if (waitpid(command, &status, __WALL) < 0 || !WIFSTOPPED(status))
            return ESRCH;
        if (status >> 16 == PTRACE_EVENT_STOP)
            return 0;
        ptrace(PTRACE_CONT, command, NULL, (void *)(intptr_t)WSTOPSIG(status));
    }
}

_Noreturn void tracer_main(const struct asked *a, struct trace_meeting *m, int fd, const struct user *user) {
    sigset_t child;
    asked = a;
    sigemptyset(&child);
    sigaddset(&child, SIGCHLD);
    sigprocmask(SIG_BLOCK, &child, NULL);
    signal(SIGPIPE, SIG_IGN);
    children = signalfd(-1, &child, SFD_NONBLOCK | SFD_CLOEXEC);
    if (!meet(m))
        _exit(0);
    int error = seize(user);
    if (!error)
        error = interrupt();
    struct tracee *t = error ? NULL : tracee_add(command, command);
    if (!t && !error)
        error = ENOMEM;
    if (!error)
        records_open(fd);
    m->error = error;
    atomic_store(&m->state, TRACE_MEETING_GO);
    if (error)
        _exit(error);
    resume(t, 0);
    follow();
    _exit(0);
}
