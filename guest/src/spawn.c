#include "spawn.h"

#include <errno.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "keys.h"

enum { STACK = 64 * 1024, PATH_SIZE = 4096, NAME_SAID = 1024 };

static char stack[STACK] __attribute__((aligned(16)));
static struct sock_fprog filter;

void spawn_filter_set(const struct sock_fprog *given) { filter = *given; }

IN_CHILD int spawn_filter(void) {
    return filter.len ? (int)syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &filter) : 0;
}

IN_CHILD static int become(const struct user *u) {
    /* System calls, not the C library's wrappers: nothing of the parent's memory may change. */
    if (syscall(SYS_setgroups, u->group_count, u->groups) < 0 || syscall(SYS_setresgid, u->gid, u->gid, u->gid) < 0)
        return -1;
    return (int)syscall(SYS_setresuid, u->uid, u->uid, u->uid);
}

IN_CHILD int spawn_enter(struct spawn *s) {
    const char *failed = NULL;
    sigset_t none;
    sigemptyset(&none);
    if (setsid() < 0 && errno != EPERM)
        failed = "setsid";
    else if (s->pty && ioctl(s->fd[0], TIOCSCTTY, 0) < 0)
        failed = "controlling terminal";
    else if (s->keys && keys_listen(s->fd[0], s->keys) < 0)
        failed = "keys of the terminal";
    else if (dup2(s->fd[0], 0) < 0 || dup2(s->fd[1], 1) < 0 || dup2(s->fd[2], 2) < 0)
        failed = "dup2";
    else if (s->user && become(s->user) < 0)
        failed = "user";
    else if (s->cwd && chdir(s->cwd) < 0)
        failed = s->cwd;
    else if (sigprocmask(SIG_SETMASK, &none, NULL) < 0)
        failed = "signal mask";
    s->failed = failed;
    return failed ? errno : 0;
}

IN_CHILD static size_t text_size(const char *s) {
    size_t n = 0;
    while (s[n])
        n++;
    return n;
}

/* execvp by the command's own PATH and without its shell fall-back. */
IN_CHILD static int execute(const struct spawn *s) {
    const char *name = s->argv[0];
    size_t name_size = text_size(name);
    char full[PATH_SIZE];
    int error = ENOENT;
    for (size_t i = 0; i < name_size; i++) {
        if (name[i] == '/') {
            execve(name, s->argv, s->env);
            return errno;
        }
    }
    for (const char *at = s->path, *end; at; at = *end ? end + 1 : NULL) {
        for (end = at; *end && *end != ':'; end++) {
        }
        size_t size = (size_t)(end - at);
        if (size + name_size + 2 > sizeof full)
            continue;
        for (size_t i = 0; i < size; i++)
            full[i] = at[i];
        if (size)
            full[size++] = '/';
        for (size_t i = 0; i <= name_size; i++)
            full[size + i] = name[i];
        execve(full, s->argv, s->env);
        if (errno == EACCES)
            error = EACCES;
        else if (errno != ENOENT && errno != ENOTDIR)
            return errno;
    }
    return error;
}

IN_CHILD static void say(int fd, const char *text, size_t most) {
    size_t size = text_size(text);
    if (write(fd, text, size < most ? size : most) < 0) {
        /* Whoever listened has gone. */
    }
}

/* Not more than a pipe takes at once: it may be PID 1 that says so. */
IN_CHILD void spawn_say(const struct spawn *s, int fd) {
    say(fd, s->argv[0], NAME_SAID);
    say(fd, ": ", 2);
    say(fd, s->error == ENOENT ? "not found" : strerrordesc_np(s->error), NAME_SAID);
    say(fd, "\n", 1);
}

IN_CHILD _Noreturn void spawn_execute(struct spawn *s) {
    s->error = execute(s);
    if (!s->quiet)
        spawn_say(s, 2);
    _exit(s->error == ENOENT || s->error == ENOTDIR ? 127 : 126);
}

IN_CHILD static int child(void *arg) {
    struct spawn *s = arg;
    s->error = spawn_enter(s);
    if (!s->error && s->under) {
        s->error = s->under(s);
    } else if (!s->error && spawn_filter() < 0) {
        s->failed = "seccomp";
        s->error = errno;
    }
    if (s->error)
        _exit(127);
    spawn_execute(s);
}

pid_t spawn(struct spawn *s) {
    s->error = 0;
    s->failed = NULL;
    return clone(child, stack + sizeof stack, CLONE_VM | CLONE_VFORK | SIGCHLD, s);
}
