#include "launch.h"

#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "modes.h"

enum { LAUNCH_FAILED = 125, LAUNCH_TIMEOUT_MS = 20000 };

/* Tell on error_fd which operation failed, and end. */
static _Noreturn void fail(const struct launch *l, size_t index, int error) {
    char text[LAUNCH_MESSAGE];
    int used = snprintf(text, sizeof text, "operation %zu (", index + 1);
    const struct op *op = &l->ops[index];
    /* A seccomp program says nothing to a reader. */
    size_t shown = !strcmp(op->words[0], "seccomp") ? 1 : op->count;
    for (size_t i = 0; i < shown && used < 300; i++)
        used += snprintf(text + used, sizeof text - (size_t)used, "%s%.80s", i ? " " : "", op->words[i]);
    used += snprintf(text + used, sizeof text - (size_t)used, "): %s\n", strerror(error));
    ssize_t ignored = write(l->error_fd, text, (size_t)used);
    (void)ignored; /* nobody is left to tell */
    _exit(LAUNCH_FAILED);
}

static int op_hostname(struct launch *l, const struct op *op) {
    (void)l;
    return sethostname(op->words[1], strlen(op->words[1]));
}

static int op_loopback(struct launch *l, const struct op *op) {
    (void)l, (void)op;
    struct ifreq request = {.ifr_name = "lo"};
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    int r = fd < 0 ? -1 : ioctl(fd, SIOCGIFFLAGS, &request);
    request.ifr_flags |= IFF_UP;
    if (r == 0)
        r = ioctl(fd, SIOCSIFFLAGS, &request);
    if (fd >= 0)
        close(fd);
    return r;
}

static int op_oom(struct launch *l, const struct op *op) {
    size_t size = strlen(op->words[1]);
    return write(l->oom, op->words[1], size) == (ssize_t)size ? 0 : -1;
}

static int op_no_new_privs(struct launch *l, const struct op *op) {
    (void)l, (void)op;
    return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
}

static int op_chdir(struct launch *l, const struct op *op) {
    (void)l;
    return chdir(op->words[1]);
}

static int op_env(struct launch *l, const struct op *op) {
    size_t have = 0;
    while (l->env && l->env[have])
        have++;
    char **env = realloc(l->env, (have + op->count) * sizeof *env);
    if (!env)
        return -1;
    l->env = env;
    for (size_t i = 1; i < op->count; i++)
        env[have++] = op->words[i];
    env[have] = NULL;
    return 0;
}

static int op_fd(struct launch *l, const struct op *op) {
    long long from, to;
    if (l->fd_count == LAUNCH_FDS || !plan_number(op->words[1], 0, 65535, &from) || !plan_number(op->words[2], 0, 1023, &to)) {
        errno = EINVAL;
        return -1;
    }
    l->fds[l->fd_count].from = (int)from;
    l->fds[l->fd_count++].to = (int)to;
    return 0;
}

static const struct {
    const char *name;
    int (*run)(struct launch *l, const struct op *op);
} OPERATIONS[] = {
    {"hostname", op_hostname}, {"loopback", op_loopback}, {"root", op_root},
    {"dir", op_dir},           {"file", op_file},         {"link", op_link},
    {"bind", op_bind},         {"mount", op_mount},       {"pivot", op_pivot},
    {"rlimit", op_rlimit},     {"groups", op_groups},     {"user", op_user},
    {"caps", op_caps},         {"oom", op_oom},           {"no-new-privs", op_no_new_privs},
    {"landlock", op_landlock}, {"seccomp", op_seccomp},   {"chdir", op_chdir},
    {"env", op_env},           {"fd", op_fd},
};

static const struct op *find(const struct op *ops, size_t count, const char *name) {
    for (size_t i = 0; i < count; i++)
        if (!strcmp(ops[i].words[0], name))
            return &ops[i];
    return NULL;
}

static void become_default(void) {
    sigset_t none;
    sigemptyset(&none);
    for (int s = 1; s < 32; s++)
        signal(s, SIG_DFL);
    sigprocmask(SIG_SETMASK, &none, NULL);
}

/* Die with the parent. Called after all credential changes, which undo it. `go` is a pipe whose other
 * end only the parent holds: if that is gone already, the signal would never come. */
static void tie_to_parent(int go) {
    struct pollfd hangup = {.fd = go};
    if (prctl(PR_SET_PDEATHSIG, SIGKILL) < 0 || poll(&hangup, 1, 0) < 0 || hangup.revents & POLLHUP)
        _exit(LAUNCH_FAILED);
}

/* Carry out the plan in this process. Does not return. `go` is -1 for a process that nobody is tied to. */
static _Noreturn void launch_run(struct launch *l, int go) {
    size_t last = l->count - 1;
    umask(022); /* the keeper's is 077: folders of the new root would be closed to an id of its own */
    l->root = l->oom = -1;
    l->keep_caps = find(l->ops, l->count, "caps");
    if (find(l->ops, l->count, "oom"))
        l->oom = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
    for (size_t i = 0; i < last; i++)
        for (size_t k = 0; k < sizeof OPERATIONS / sizeof *OPERATIONS; k++)
            if (!strcmp(OPERATIONS[k].name, l->ops[i].words[0]) && OPERATIONS[k].run(l, &l->ops[i]) < 0)
                fail(l, i, errno);
    if (go >= 0)
        tie_to_parent(go);
    become_default();
    if (descriptors_apply(l) < 0 || landlock_apply(l) < 0 || seccomp_apply(l) < 0)
        fail(l, last, errno);
    char *nothing[] = {NULL};
    execve(l->ops[last].words[1], l->ops[last].words + 1, l->env ? l->env : nothing);
    fail(l, last, errno);
}

static bool namespace_flags(const struct op *op, unsigned long *flags) {
    static const struct { const char *name; unsigned long flag; } NAMES[] = {
        {"user", CLONE_NEWUSER}, {"mount", CLONE_NEWNS}, {"pid", CLONE_NEWPID},       {"net", CLONE_NEWNET},
        {"ipc", CLONE_NEWIPC},   {"uts", CLONE_NEWUTS},  {"cgroup", CLONE_NEWCGROUP},
    };
    *flags = 0;
    for (size_t i = 1; op && i < op->count; i++) {
        size_t n = 0;
        while (n < sizeof NAMES / sizeof *NAMES && strcmp(NAMES[n].name, op->words[i]))
            n++;
        if (n == sizeof NAMES / sizeof *NAMES)
            return false;
        *flags |= NAMES[n].flag;
    }
    return true;
}

static bool write_proc(pid_t pid, const char *name, const char *text, size_t size) {
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/%s", (int)pid, name);
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    bool good = fd >= 0 && write(fd, text, size) == (ssize_t)size;
    int saved = errno;
    if (fd >= 0)
        close(fd);
    errno = saved;
    return good;
}

static bool write_map(pid_t pid, const char *file, const char *kind, const struct op *ops, size_t count) {
    char text[4096];
    size_t used = 0;
    for (size_t i = 0; i < count && used < sizeof text - 128; i++)
        if (!strcmp(ops[i].words[0], kind))
            used += (size_t)snprintf(text + used, 128, "%.30s %.30s %.30s\n", ops[i].words[1], ops[i].words[2], ops[i].words[3]);
    return used == 0 || write_proc(pid, file, text, used);
}

static bool write_maps(pid_t pid, const struct op *ops, size_t count) {
    if (geteuid() != 0 && find(ops, count, "map-group") && !write_proc(pid, "setgroups", "deny", 4))
        return false;
    return write_map(pid, "uid_map", "map-user", ops, count) && write_map(pid, "gid_map", "map-group", ops, count);
}

/* Read what the child has to say until it runs the program (its end closes) or fails. */
static ssize_t read_report(int fd, char *message) {
    struct pollfd ready = {.fd = fd, .events = POLLIN};
    int n;
    while ((n = poll(&ready, 1, LAUNCH_TIMEOUT_MS)) < 0 && errno == EINTR)
        ;
    if (n == 0)
        return snprintf(message, LAUNCH_MESSAGE, "the launch took over %d s", LAUNCH_TIMEOUT_MS / 1000);
    ssize_t size;
    while ((size = read(fd, message, LAUNCH_MESSAGE - 1)) < 0 && errno == EINTR)
        ;
    if (size < 0)
        size = snprintf(message, LAUNCH_MESSAGE, "reading its report: %s", strerror(errno));
    message[size] = 0;
    message[strcspn(message, "\n")] = 0;
    return size;
}

static _Noreturn void child(const struct op *ops, size_t count, int go, int report) {
    struct launch l = {.ops = ops, .count = count, .error_fd = report};
    char byte;
    ssize_t n;
    while ((n = read(go, &byte, 1)) < 0 && errno == EINTR)
        ;
    if (n != 1)
        _exit(LAUNCH_FAILED); /* the parent died before it had written our maps */
    launch_run(&l, go);
}

pid_t launch_start(const struct op *ops, size_t count, char *message) {
    int go[2] = {-1, -1}, report[2] = {-1, -1};
    unsigned long flags;
    const char *why = plan_check_launch(ops, count);
    if (!why && !namespace_flags(find(ops, count, "namespaces"), &flags))
        why = "a namespace of the plan is not known";
    if (why) {
        snprintf(message, LAUNCH_MESSAGE, "%s", why);
        return -1;
    }
    pid_t pid = -1;
    if (pipe2(go, O_CLOEXEC) == 0 && pipe2(report, O_CLOEXEC) == 0)
        pid = (pid_t)syscall(SYS_clone, flags | SIGCHLD, NULL, NULL, NULL, NULL);
    if (pid == 0) {
        close(go[1]);
        close(report[0]);
        child(ops, count, go[0], report[1]);
    }
    int error = errno;
    close(go[0]);
    close(report[1]);
    ssize_t said = 1;
    if (pid < 0)
        snprintf(message, LAUNCH_MESSAGE, "a process in new namespaces cannot be made: %s", strerror(error));
    else if (!write_maps(pid, ops, count))
        snprintf(message, LAUNCH_MESSAGE, "the id maps cannot be written: %s", strerror(errno));
    else if (write(go[1], "g", 1) != 1)
        snprintf(message, LAUNCH_MESSAGE, "the process ended before it began");
    else
        said = read_report(report[0], message);
    close(go[1]);
    close(report[0]);
    if (pid > 0 && said > 0) {
        kill(pid, SIGKILL);
        waitpid(pid, NULL, 0);
        pid = -1;
    }
    return pid;
}

static volatile sig_atomic_t launched;

static void forward(int signal_number) {
    if (launched > 0)
        kill((pid_t)launched, signal_number);
}

static int run_in_child(const struct plan *plan) {
    char message[LAUNCH_MESSAGE];
    static const int SIGNALS[] = {SIGTERM, SIGINT, SIGHUP, SIGQUIT, SIGUSR1, SIGUSR2, SIGWINCH};
    for (size_t i = 0; i < sizeof SIGNALS / sizeof *SIGNALS; i++)
        sigaction(SIGNALS[i], &(struct sigaction){.sa_handler = forward, .sa_flags = SA_RESTART}, NULL);
    launched = launch_start(plan->ops, plan->count, message);
    if (launched < 0) {
        fprintf(stderr, "tvinit launch: %s\n", message);
        return LAUNCH_FAILED;
    }
    int status;
    while (waitpid((pid_t)launched, &status, 0) < 0)
        if (errno != EINTR)
            return LAUNCH_FAILED;
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

int launch_main(int argc, char **argv) {
    long long fd;
    struct plan plan;
    if (argc != 1 || !plan_number(argv[0], 0, 65535, &fd)) {
        fprintf(stderr, "usage: tvinit launch FD\n");
        return 2;
    }
    if (!plan_read((int)fd, &plan)) {
        fprintf(stderr, "tvinit launch: reading the plan: %s\n", strerror(errno));
        return LAUNCH_FAILED;
    }
    close((int)fd);
    const char *why = plan_check_launch(plan.ops, plan.count);
    if (why) {
        fprintf(stderr, "tvinit launch: %s\n", why);
        return LAUNCH_FAILED;
    }
    if (find(plan.ops, plan.count, "namespaces"))
        return run_in_child(&plan);
    int error_fd = fcntl(2, F_DUPFD_CLOEXEC, 3);
    struct launch l = {.ops = plan.ops, .count = plan.count, .error_fd = error_fd < 0 ? 2 : error_fd};
    launch_run(&l, -1);
}
