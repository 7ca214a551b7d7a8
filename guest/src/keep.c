#include "keep.h"

#include <errno.h>
#include <fcntl.h>
#include <malloc.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include "fds.h"
#include "launch.h"
#include "modes.h"

enum { REAP_MS = 5000, MAX_FD = 65535, DRAIN_READS = 256, TRIM_BYTES = 128 * 1024 };

static struct keeper keeper = {
    .line = {.fd = -1}, .listener = {.fd = -1}, .signals = {.fd = -1}, .owner = {.fd = -1}, .oom = {.fd = -1}, .ready = {.fd = -1},
    .dialled = {.fd = -1}, .intake = {.fd = -1}, .answer_listen = {.fd = -1}, .answer_log = -1,
    .folder = -1, .alive = -1, .init_log = {.file = -1}, .program_log = {.file = -1},
    .ttl = INT64_MAX, .idle = INT64_MAX, .grace = 10000, .kill_at = INT64_MAX, .sync_at = INT64_MAX, .lose_at = INT64_MAX,
};

pid_t keep_engine(const struct keeper *k) { return k->processes[k->process_count - 1].pid; }

void keep_report(struct keeper *k, const char *text, bool last) {
    if (k->ready.fd < 0)
        return;
    ssize_t ignored = write(k->ready.fd, text, strlen(text));
    (void)ignored; /* whoever waited is gone: its watch tells us */
    if (last)
        loop_close(&k->ready);
}

void keep_kill(struct keeper *k, const char *reason) {
    snprintf(k->reason, sizeof k->reason, "%s", reason);
    k->kill_at = 0;
    if (keep_engine(k) > 0)
        kill(keep_engine(k), SIGKILL);
}

void keep_stop(struct keeper *k, int64_t grace, const char *reason) {
    int64_t at = now_ms() + grace;
    if (k->kill_at == INT64_MAX) {
        snprintf(k->reason, sizeof k->reason, "%s", reason);
        k->tell_shutdown = true;
    }
    if (at < k->kill_at)
        k->kill_at = at;
}

/* One word of the plan that is a descriptor, which must be open. */
static bool take_fd(const char *word, int *fd) {
    long long n;
    if (!plan_number(word, 3, MAX_FD, &n) || fcntl((int)n, F_SETFD, FD_CLOEXEC) < 0)
        return false;
    *fd = (int)n;
    return true;
}

static bool take_ms(const char *word, int64_t *ms) {
    long long n;
    bool good = plan_number(word, 0, INT64_C(1) << 50, &n);
    if (good)
        *ms = n;
    return good;
}

static bool take_log(struct keeper *k, const struct op *op) {
    long long cap;
    int fd;
    if (k->log_count == KEEP_LOGS || op->count != 4 || !take_fd(op->words[2], &fd) || !plan_number(op->words[3], 1, INT64_MAX, &cap))
        return false;
    struct logfile *log = &k->logs[k->log_count++];
    if (!keepfiles_open_log(k, log, op->words[1], (uint64_t)cap))
        return false;
    log->watch.fd = fd;
    return true;
}

static bool take_init_log(struct keeper *k, const struct op *op) {
    long long cap;
    return op->count == 2 && plan_number(op->words[1], 1, INT64_MAX, &cap) && keepfiles_open_log(k, &k->init_log, "init", (uint64_t)cap);
}

/* A line for the keeper itself. */
static bool take(struct keeper *k, const struct op *op) {
    const struct { const char *name; int *fd; int64_t *ms; } PLACES[] = {
        {"folder", &k->folder, NULL},  {"alive", &k->alive, NULL},    {"listen", &k->listener.fd, NULL},
        {"line", &k->line.fd, NULL},   {"ready", &k->ready.fd, NULL}, {"owner", &k->owner.fd, NULL},
        {"ttl", NULL, &k->ttl},        {"idle", NULL, &k->idle},      {"grace", NULL, &k->grace},
        {"line-listen", &k->dialled.fd, NULL}, {"answer", &k->intake.fd, NULL}, {"answer-listen", &k->answer_listen.fd, NULL}, {"oom", &k->oom.fd, NULL},
    };
    if (!strcmp(op->words[0], "log"))
        return take_log(k, op);
    if (!strcmp(op->words[0], "init-log"))
        return take_init_log(k, op);
    for (size_t i = 0; i < sizeof PLACES / sizeof *PLACES; i++)
        if (!strcmp(op->words[0], PLACES[i].name))
            return op->count == 2 && (PLACES[i].fd ? take_fd(op->words[1], PLACES[i].fd) : take_ms(op->words[1], PLACES[i].ms));
    return false;
}

/* Fill the keeper from its plan. Returns NULL, or what is wrong. */
static const char *configure(struct keeper *k, const struct plan *plan) {
    static char why[256];
    size_t i = 0;
    for (; i < plan->count && strcmp(plan->ops[i].words[0], "process"); i++)
        if (!take(k, &plan->ops[i])) {
            snprintf(why, sizeof why, "operation %zu (%.40s) cannot be: %s", i + 1, plan->ops[i].words[0], strerror(errno));
            return why;
        }
    while (i < plan->count) {
        size_t first = ++i;
        while (i < plan->count && strcmp(plan->ops[i].words[0], "process"))
            i++;
        if (k->process_count == KEEP_PROCESSES)
            return "the plan has too many processes";
        k->processes[k->process_count++] = (struct process){.ops = plan->ops + first, .count = i - first};
        const char *fault = plan_check_launch(plan->ops + first, i - first);
        if (fault)
            return fault;
    }
    if (k->folder < 0 || k->alive < 0 || k->listener.fd < 0 || (k->line.fd < 0) == (k->dialled.fd < 0) || k->process_count == 0)
        return "the plan lacks folder, alive, listen, line (or line-listen, not both) or process";
    return NULL;
}

/* No terminal, and no parent that would have to reap us. Not the second fork that makes sure that no terminal comes
 * back: a leader of a session gets one only by opening one, and we open none. */
static void become_daemon(void) {
    pid_t pid = fork();
    if (pid != 0)
        _exit(pid < 0);
    setsid();
}

static void detach(void) {
    int null = open("/dev/null", O_RDWR | O_CLOEXEC);
    for (int fd = 0; fd < 3 && null >= 0; fd++)
        dup2(null, fd);
    if (null > 2)
        close(null);
    if (chdir("/") < 0)
        _exit(1);
    umask(077);
    prctl(PR_SET_NAME, "tvinit-keep");
    mallopt(M_TRIM_THRESHOLD, TRIM_BYTES); /* a burst is not to leave us big: we may run for months */
}

/* Close every descriptor that is not the keeper's: the engine's ends of pipes and of the line among them,
 * without which we would never see their end. */
static void close_others(const struct keeper *k) {
    int mine[KEEP_LOGS * 2 + 16], n = 0;
    const int fixed[] = {k->folder, k->alive, k->listener.fd, k->line.fd, k->ready.fd, k->owner.fd, k->dialled.fd,
                         k->init_log.file, k->intake.fd, k->answer_listen.fd, k->oom.fd};
    for (size_t i = 0; i < sizeof fixed / sizeof *fixed; i++)
        mine[n++] = fixed[i];
    for (size_t i = 0; i < k->log_count; i++) {
        mine[n++] = k->logs[i].file;
        mine[n++] = k->logs[i].watch.fd;
    }
    close_all_but(mine, (size_t)n);
}

static void end_process(struct process *p, int64_t until) {
    while (p->pid > 0 && waitpid(p->pid, NULL, WNOHANG) == 0 && now_ms() < until) {
        /* SIGCHLD is blocked and comes through here, or the time is up. */
        sigset_t child;
        sigemptyset(&child);
        sigaddset(&child, SIGCHLD);
        sigtimedwait(&child, NULL, &(struct timespec){.tv_nsec = 100000000});
    }
    p->pid = 0;
}

/* Kill and reap what still runs. Bounded: a process may hang in the kernel. */
static void end_processes(struct keeper *k) {
    int64_t until = now_ms() + REAP_MS;
    for (size_t i = k->process_count; i-- > 0;)
        if (k->processes[i].pid > 0)
            kill(k->processes[i].pid, SIGKILL);
    if (k->answerer.pid > 0)
        kill(k->answerer.pid, SIGKILL);
    for (size_t i = 0; i < k->process_count; i++)
        end_process(&k->processes[i], until);
    end_process(&k->answerer, until);
}

static bool start_processes(struct keeper *k) {
    char message[LAUNCH_MESSAGE], text[LAUNCH_MESSAGE + 16];
    for (size_t i = 0; i < k->process_count; i++) {
        struct process *p = &k->processes[i];
        p->pid = launch_start(p->ops, p->count, message);
        if (p->pid < 0) {
            snprintf(text, sizeof text, "failed %s\n", message);
            keep_report(k, text, true);
            end_processes(k);
            return false;
        }
    }
    snprintf(text, sizeof text, "started %d\n", (int)keep_engine(k));
    keep_report(k, text, false);
    return true;
}

static void reap(struct keeper *k) {
    int status;
    pid_t pid;
    while ((pid = waitpid(-1, &status, WNOHANG)) > 0) {
        keepanswer_ended(k, pid);
        for (size_t i = 0; i < k->process_count; i++)
            if (k->processes[i].pid == pid) {
                k->processes[i].pid = 0;
                if (i == k->process_count - 1) {
                    k->engine_ended = true;
                    k->engine_status = status;
                }
            }
    }
}

static void signal_event(struct watch *w, uint32_t events) {
    (void)events;
    struct signalfd_siginfo info;
    while (read(w->fd, &info, sizeof info) == sizeof info)
        if (info.ssi_signo != SIGCHLD)
            keep_kill(&keeper, "keeper-term");
    reap(&keeper);
}

/* What the machine does not outlive: its owner, or the end of its memory. */
static void gone_event(struct watch *w, uint32_t events) {
    (void)events;
    loop_close(w);
    keep_kill(&keeper, w == &keeper.oom ? "out of memory" : "owner");
}

/* Nobody reads what we report any more: whoever was starting the machine died before it was one. */
static void ready_event(struct watch *w, uint32_t events) {
    if (events & EPOLLERR) {
        loop_close(w);
        keep_kill(&keeper, "abandoned");
    }
}

static void set_nonblocking(int fd) { fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK); }

static bool open_loop(struct keeper *k) {
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGCHLD);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGINT);
    if (loop_open() < 0 || (k->signals.fd = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK)) < 0)
        return false;
    k->signals.on = signal_event;
    k->owner.on = k->oom.on = gone_event;
    k->ready.on = ready_event;
    set_nonblocking(k->line.fd >= 0 ? k->line.fd : k->dialled.fd);
    set_nonblocking(k->listener.fd);
    loop_add(&k->signals, EPOLLIN);
    if (k->owner.fd >= 0)
        loop_add(&k->owner, EPOLLIN);
    if (k->oom.fd >= 0)
        loop_add(&k->oom, EPOLLIN);
    if (k->ready.fd >= 0)
        loop_add(&k->ready, 0);
    for (size_t i = 0; i < k->log_count; i++) {
        set_nonblocking(k->logs[i].watch.fd);
        loop_add(&k->logs[i].watch, EPOLLIN);
    }
    return true;
}

/* Act on the limits that are due; returns when the next one is. */
static int64_t check_limits(struct keeper *k) {
    int64_t now = now_ms();
    if (k->kill_at == INT64_MAX && k->ttl != INT64_MAX && now - k->started >= k->ttl)
        keep_stop(k, k->grace, "ttl");
    if (k->kill_at == INT64_MAX && k->idle != INT64_MAX && now - k->active >= k->idle)
        keep_stop(k, k->grace, "idle");
    if (now >= k->kill_at && keep_engine(k) > 0) {
        kill(keep_engine(k), SIGKILL);
        return INT64_MAX; /* SIGCHLD comes */
    }
    if (k->kill_at != INT64_MAX)
        return k->kill_at;
    int64_t next = INT64_MAX;
    if (k->ttl != INT64_MAX)
        next = k->started + k->ttl;
    if (k->idle != INT64_MAX && k->active + k->idle < next)
        next = k->active + k->idle;
    return next;
}

static int wait_ms(int64_t until) {
    int64_t left = until - now_ms();
    return until == INT64_MAX ? -1 : left <= 0 ? 0 : left > 1 << 30 ? 1 << 30 : (int)left;
}

static void run(struct keeper *k) {
    while (!k->engine_ended) {
        check_limits(k); /* before serving: what is due may be a word to the guest */
        bool more = keepline_serve(k);
        more |= keepfiles_serve(k);
        int64_t next = check_limits(k), line = keepline_deadline(k), answer = keepanswer_serve(k);
        if (line < next)
            next = line;
        loop_wait(more ? 0 : wait_ms(answer < next ? answer : next));
    }
}

static void remove_socket(const struct keeper *k, int fd) {
    struct sockaddr_un address;
    socklen_t size = sizeof address;
    memset(&address, 0, sizeof address);
    if (fd < 0 || getsockname(fd, (struct sockaddr *)&address, &size) < 0 || address.sun_path[0] == 0)
        return;
    address.sun_path[sizeof address.sun_path - 1] = 0;
    /* It may have been bound by another way to the folder; only its name counts. */
    const char *slash = strrchr(address.sun_path, '/');
    unlinkat(k->folder, slash ? slash + 1 : address.sun_path, 0);
}

static void finish(struct keeper *k) {
    keepline_drain(k);
    keepfiles_write_exit(k);
    end_processes(k);
    for (size_t i = 0; i < k->log_count; i++)
        k->logs[i].readable = true;
    for (int i = 0; i < DRAIN_READS; i++)
        if (!keepfiles_serve(k))
            break;
    keep_report(k, "failed the engine ended before the guest answered\n", true);
    remove_socket(k, k->listener.fd);
    remove_socket(k, k->answer_listen.fd);
    close(k->alive);
    keepline_close(k);
}

int keep_main(int argc, char **argv) {
    struct keeper *k = &keeper;
    struct plan plan;
    long long fd;
    if (argc != 1 || !plan_number(argv[0], 0, MAX_FD, &fd)) {
        fprintf(stderr, "usage: tvinit keep FD\n");
        return 2;
    }
    umask(077);
    const char *why = plan_read((int)fd, &plan) ? configure(k, &plan) : strerror(errno);
    if (!why && (listen(k->listener.fd, SOMAXCONN) < 0 || (k->dialled.fd >= 0 && listen(k->dialled.fd, 1) < 0) ||
                 !keepanswer_listen(k)))
        why = strerror(errno);
    if (why) {
        fprintf(stderr, "tvinit keep: %s\n", why);
        return 1;
    }
    close((int)fd);
    become_daemon();
    detach();
    k->started = k->active = now_ms();
    if (!keepfiles_write_pid(k)) { /* unknown, it could not be killed */
        keep_report(k, "failed the folder cannot be written\n", true);
        return 1;
    }
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGCHLD);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGINT);
    sigprocmask(SIG_BLOCK, &set, NULL);
    signal(SIGPIPE, SIG_IGN);
    signal(SIGHUP, SIG_IGN);
    if (!start_processes(k))
        return 1;
    close_others(k);
    plan_free(&plan);
    if (!open_loop(k)) {
        end_processes(k);
        return 1;
    }
    keepline_open(k);
    keepanswer_open(k);
    run(k);
    finish(k);
    return 0;
}
