#include "launch.h"

#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <poll.h>
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

#include "fds.h"
#include "modes.h"
#include "net.h"
#include "request.h"

enum { LAUNCH_FAILED = 125, LAUNCH_TIMEOUT_MS = 20000, GUEST_LINE = 3, GUEST_ANSWER = 4, STACK_USED = 512 << 10, MEMORY_MERGE = 67 /* PR_SET_MEMORY_MERGE */ };

/* Tell on error_fd which operation failed, and end. */
static _Noreturn void fail(const struct launch *l, size_t index, int error) {
    char text[LAUNCH_MESSAGE];
    int used = snprintf(text, sizeof text, "operation %zu (", index + 1);
    const struct op *op = &l->ops[index];
    /* A seccomp program says nothing to a reader. */
    size_t shown = strstr(op->words[0], "seccomp") ? 1 : op->count;
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

static int op_address(struct launch *l, const struct op *op) {
    (void)l;
    errno = net_address(op->words[1], op->words[2], op->words[3], op->count > 4 ? op->words[4] : NULL);
    return errno ? -1 : 0;
}

static int op_oom(struct launch *l, const struct op *op) {
    size_t size = strlen(op->words[1]);
    return write(l->oom, op->words[1], size) == (ssize_t)size ? 0 : -1;
}

/* Programs that are executed have it from there on (Linux 6.7). */
static int op_merge(struct launch *l, const struct op *op) {
    (void)l, (void)op;
    return prctl(MEMORY_MERGE, 1, 0, 0, 0);
}

static int op_apparmor(struct launch *l, const struct op *op) {
    char text[256];
    int size = snprintf(text, sizeof text, "%s %s", l->guest ? "changeprofile" : "exec", op->words[1]);
    return write(l->apparmor, text, (size_t)size) == size ? 0 : -1;
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

static int op_hooks(struct launch *l, const struct op *op) {
    (void)op;
    l->hooks = true;
    return 0;
}

static int op_answer(struct launch *l, const struct op *op) {
    long long fd;
    errno = EINVAL;
    if (l->answer >= 0 || !plan_number(op->words[1], 0, 65535, &fd))
        return -1;
    l->answer = (int)fd;
    return 0;
}

static const struct {
    const char *name;
    int (*run)(struct launch *l, const struct op *op);
} OPERATIONS[] = {
    {"hostname", op_hostname}, {"loopback", op_loopback}, {"address", op_address}, {"root", op_root},
    {"dir", op_dir},           {"file", op_file},         {"link", op_link},
    {"bind", op_bind},         {"mount", op_mount},       {"pivot", op_pivot},
    {"rlimit", op_rlimit},     {"groups", op_groups},     {"user", op_user},
    {"caps", op_caps},         {"oom", op_oom},           {"no-new-privs", op_no_new_privs},
    {"landlock", op_landlock}, {"seccomp", op_seccomp},   {"chdir", op_chdir},
    {"env", op_env},           {"fd", op_fd},             {"overlay", op_overlay},
    {"text", op_text},         {"mask", op_mask},         {"readonly", op_readonly},
    {"apparmor", op_apparmor}, {"hooks", op_hooks},       {"landlock-domain", op_landlock_domain},
    {"answer", op_answer},     {"exec-seccomp", op_exec_seccomp},
    {"uplink", op_uplink},     {"merge", op_merge},
};

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

static char *arguments;
static size_t arguments_size;

/* The C library gives constructors what main gets. */
__attribute__((constructor)) static void note_arguments(int argc, char **argv) {
    if (argc > 0) {
        arguments = argv[0];
        arguments_size = (size_t)(argv[argc - 1] + strlen(argv[argc - 1]) + 1 - argv[0]);
    }
}

/* Our name alone, where a container's /proc/1/cmdline would show paths of the host. */
static void hide_arguments(void) {
    memset(arguments, 0, arguments_size);
    snprintf(arguments, arguments_size, "tvinit");
}

/* What earlier calls left below. */
static __attribute__((noinline)) void wipe_stack(void) {
    char below[STACK_USED];
    explicit_bzero(below, sizeof below);
}

/* What an exec would undo is undone here: we are a copy of the keeper. */
static _Noreturn void become_guest(struct launch *l, size_t last) {
    long long line;
    int null = open("/dev/null", O_RDWR | O_CLOEXEC);
    if (!plan_number(l->ops[last].words[1], 0, 65535, &line) || null < 0 || dup2(null, 0) < 0 || dup2(null, 1) < 0)
        fail(l, last, errno);
    l->fds[l->fd_count].from = (int)line;
    l->fds[l->fd_count++].to = GUEST_LINE;
    l->fds[l->fd_count].from = l->answer;
    l->fds[l->fd_count].to = GUEST_ANSWER;
    l->fd_count += l->answer >= 0;
    for (size_t i = 0; l->env && l->env[i]; i++)
        if (env_set(l->env[i]))
            fail(l, last, ENOMEM);
    clearenv();
    prctl(PR_SET_NAME, "tvinit");
    hide_arguments();
    /* Nobody inside may look into us or attach to us: whatever user they are, they would need power over the user
     * namespace in which our memory was made, the host's. Changes of user have set this, unless sysctl says otherwise. */
    if (prctl(PR_SET_DUMPABLE, 0) < 0 || descriptors_apply(l) < 0 || landlock_apply(l) < 0 || seccomp_apply(l) < 0)
        fail(l, last, errno);
    int answer = l->answer >= 0 ? GUEST_ANSWER : -1, kept[] = {GUEST_LINE, answer};
    for (int i = 0; i < 2; i++)
        if (kept[i] >= 0)
            fcntl(kept[i], F_SETFD, FD_CLOEXEC);
    /* The report's end is among them: the parent learns that all went well. */
    close_all_but(kept, 2);
    /* Commands begin as copies of us, and one that is traced can be looked into before its execve. */
    plan_forget();
    wipe_stack();
    _exit(guest_contained(GUEST_LINE, answer, &l->exec_filter, l->hooks));
}

/* Carry out the plan in this process. Does not return. `go` is -1 for a process that nobody is tied to. */
static _Noreturn void launch_run(struct launch *l, int go) {
    size_t last = l->count - 1;
    umask(022); /* the keeper's is 077: folders of the new root would be closed to an id of its own */
    l->root = l->base = l->answer = -1;
    l->keep_caps = launch_find(l->ops, l->count, "caps");
    for (size_t i = 0; i < last; i++)
        for (size_t k = 0; k < sizeof OPERATIONS / sizeof *OPERATIONS; k++)
            if (!strcmp(OPERATIONS[k].name, l->ops[i].words[0]) && OPERATIONS[k].run(l, &l->ops[i]) < 0)
                fail(l, i, errno);
    if (go >= 0)
        tie_to_parent(go);
    become_default();
    if (l->guest)
        become_guest(l, last);
    if (descriptors_apply(l) < 0 || landlock_apply(l) < 0 || seccomp_apply(l) < 0)
        fail(l, last, errno);
    char *nothing[] = {NULL};
    execve(l->ops[last].words[1], l->ops[last].words + 1, l->env ? l->env : nothing);
    fail(l, last, errno);
}

/* What is written to in /proc, which a new root may not have and which is closed to us once we have changed user. */
static void open_early(struct launch *l) {
    l->guest = !strcmp(l->ops[l->count - 1].words[0], "guest");
    l->oom = launch_find(l->ops, l->count, "oom") ? open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC) : -1;
    l->apparmor = -1;
    if (launch_find(l->ops, l->count, "apparmor"))
        l->apparmor = open(l->guest ? "/proc/self/attr/apparmor/current" : "/proc/self/attr/apparmor/exec", O_WRONLY | O_CLOEXEC);
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

static _Noreturn void child(struct launch *l, int go) {
    char byte, text[LAUNCH_MESSAGE];
    ssize_t n;
    while ((n = read(go, &byte, 1)) < 0 && errno == EINTR)
        ;
    if (n != 1)
        _exit(LAUNCH_FAILED); /* the parent died before it had settled us */
    open_early(l);
    const char *fault = namespaces_enter(l->ops, l->count);
    if (fault) {
        int size = snprintf(text, sizeof text, "%s: %s\n", fault, strerror(errno));
        (void)!write(l->error_fd, text, (size_t)size);
        _exit(LAUNCH_FAILED);
    }
    launch_run(l, go);
}

/* Settle the child and wait for what it says. Returns the size of the message: 0 if all went well. */
static ssize_t settle(pid_t pid, bool moved, struct launch *l, int go, int report, char *message) {
    const char *fault = namespaces_settle(pid, moved, l->ops, l->count, l->prepared);
    if (fault)
        return snprintf(message, LAUNCH_MESSAGE, "%s: %s", fault, strerror(errno));
    if (write(go, "g", 1) != 1)
        return snprintf(message, LAUNCH_MESSAGE, "the process ended before it began");
    return read_report(report, message);
}

/* fork with the plan's namespaces, with what joins us and the child. -1 with the reason in message. */
static pid_t clone_and_settle(struct launch *l, char *message) {
    int go[2] = {-1, -1}, report[2] = {-1, -1};
    pid_t pid = -1;
    bool moved = false;
    if (pipe2(go, O_CLOEXEC) == 0 && pipe2(report, O_CLOEXEC) == 0)
        pid = namespaces_clone(l->ops, l->count, l->prepared, &moved);
    if (pid == 0) {
        close(go[1]);
        close(report[0]);
        l->error_fd = report[1];
        child(l, go[0]);
    }
    int error = errno;
    close(go[0]);
    close(report[1]);
    ssize_t said = 1;
    if (pid < 0)
        snprintf(message, LAUNCH_MESSAGE, "a process in new namespaces cannot be made: %s", strerror(error));
    else
        said = settle(pid, moved, l, go[1], report[0], message);
    close(go[1]);
    close(report[0]);
    if (pid > 0 && said > 0) {
        kill(pid, SIGKILL);
        waitpid(pid, NULL, 0);
        pid = -1;
    }
    return pid;
}

pid_t launch_start(const struct op *ops, size_t count, char *message) {
    const char *why = plan_check_launch(ops, count);
    if (!why)
        why = namespaces_check(ops, count);
    struct prepared *prepared = why ? NULL : calloc(count, sizeof *prepared);
    if (!why && !prepared)
        why = strerror(ENOMEM);
    if (why) {
        snprintf(message, LAUNCH_MESSAGE, "%s", why);
        return -1;
    }
    pid_t pid = -1;
    if (namespaces_prepare(ops, count, prepared)) {
        struct launch l = {.ops = ops, .count = count, .prepared = prepared};
        pid = clone_and_settle(&l, message);
        namespaces_release(prepared, count);
    } else {
        snprintf(message, LAUNCH_MESSAGE, "the sources of a mount cannot be opened: %s", strerror(errno));
    }
    free(prepared);
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
    if (launch_find(plan.ops, plan.count, "namespaces") || launch_find(plan.ops, plan.count, "cgroup") || launch_find(plan.ops, plan.count, "netns"))
        return run_in_child(&plan);
    int error_fd = fcntl(2, F_DUPFD_CLOEXEC, 3);
    struct launch l = {.ops = plan.ops, .count = plan.count, .error_fd = error_fd < 0 ? 2 : error_fd};
    open_early(&l);
    launch_run(&l, -1);
}
