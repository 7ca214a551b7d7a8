#include "exec.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pty.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "answer.h"
#include "answerer.h"
#include "builtins.h"
#include "command.h"
#include "fds.h"
#include "keys.h"
#include "line.h"
#include "loop.h"
#include "policy.h"
#include "program.h"
#include "request.h"
#include "spawn.h"
#include "wire.h"

enum {
    /* All half-made requests together. */
    COLLECT_MAX = 8 << 20,
    COLLECTORS_MAX = 64,
    BUILTIN_PIPE = 1 << 20,
    TTY_GROUP = 5,
};

/* A request of more than one frame. With `refused` set its frames are only counted off. */
struct collector {
    struct collector *next;
    uint32_t stream;
    bool refused;
    struct writer bytes;
};

static struct collector *collectors;
static size_t collector_count, collected;
static int null_fd = -1;
static bool closed;

/* Our ends of what joins us and a command, and its ends. */
struct joint {
    int in, out, err;
    int theirs[3];
    int keys[2]; /* what a terminal's keys say: read in its session, written by us. -1: it signals by itself */
};

int exec_open(void) {
    null_fd = open("/dev/null", O_RDWR | O_CLOEXEC);
    return null_fd < 0 ? -1 : 0;
}

void exec_close(void) { closed = true; }

static void close_fd(int *fd) {
    if (*fd >= 0 && *fd != null_fd)
        close(*fd);
    *fd = -1;
}

static void close_theirs(struct joint *j) {
    close_fd(&j->theirs[0]);
    if (j->theirs[2] != j->theirs[1])
        close_fd(&j->theirs[2]);
    close_fd(&j->theirs[1]);
}

/* A pipe of which our end does not block. */
static int open_pipe(int *ours, int *theirs, int our_end, bool wide) {
    int p[2];
    if (pipe2(p, O_CLOEXEC) < 0)
        return -1;
    *ours = p[our_end];
    *theirs = p[!our_end];
    if (wide)
        fcntl(*ours, F_SETPIPE_SZ, BUILTIN_PIPE); /* past the user's limit it stays as it is */
    return fcntl(*ours, F_SETFL, (our_end ? O_WRONLY : O_RDONLY) | O_NONBLOCK);
}

static int join_pty(struct joint *j, const struct request *r, const struct user *u) {
    struct winsize size = {.ws_row = r->rows, .ws_col = r->columns};
    int master, slave;
    if (openpty(&master, &slave, NULL, NULL, &size) < 0)
        return -1;
    j->out = master;
    j->theirs[0] = j->theirs[1] = j->theirs[2] = slave;
    if (fcntl(master, F_SETFL, O_RDWR | O_NONBLOCK) < 0 || fcntl(master, F_SETFD, FD_CLOEXEC) < 0 ||
        fcntl(slave, F_SETFD, FD_CLOEXEC) < 0 || (j->in = fcntl(master, F_DUPFD_CLOEXEC, 3)) < 0)
        return -1;
    if (!keys_signal() && pipe2(j->keys, O_CLOEXEC | O_NONBLOCK) == 0)
        fcntl(j->keys[0], F_SETFL, O_RDONLY);
    if (u->uid != geteuid() && (fchown(slave, u->uid, TTY_GROUP) < 0 || fchmod(slave, 0620) < 0))
        return -1;
    return 0;
}

static int join_pipes(struct joint *j, const struct request *r) {
    bool wide = r->flags & EXEC_BUILTIN;
    if (r->flags & EXEC_NO_STDIN)
        j->theirs[0] = null_fd;
    else if (open_pipe(&j->in, &j->theirs[0], 1, wide) < 0)
        return -1;
    if (open_pipe(&j->out, &j->theirs[1], 0, wide) < 0)
        return -1;
    return open_pipe(&j->err, &j->theirs[2], 0, false);
}

/* A terminal is one descriptor thrice. */
static void close_joint(struct joint *j) {
    if (j->theirs[0] == j->theirs[1])
        j->theirs[0] = -1;
    close_theirs(j);
    close_fd(&j->in);
    close_fd(&j->out);
    close_fd(&j->err);
    close_fd(&j->keys[0]);
    close_fd(&j->keys[1]);
}

/* The builtin that joins a client and the answerer. */
static bool answers(const struct spawn *s) { return !strcmp(s->argv[0], "answer"); }

static pid_t fork_builtin(struct spawn *s) {
    if (answers(s) && answerer_end() < 0)
        return -1;
    pid_t pid = fork();
    if (pid > 0)
        setpgid(pid, pid); /* or a signal to its group that comes before its setsid would find none */
    if (pid)
        return pid;
    int error = spawn_enter(s);
    if (error) {
        dprintf(s->fd[2], "%s: %s\n", s->failed, strerror(error));
        _exit(error);
    }
    /* Not even for a moment may it hold what belongs to others. */
    int answer = answers(s) ? dup2(answerer_end(), ANSWER_BUILTIN_FD) : -1;
    close_all_but(&answer, 1);
    if (spawn_filter() < 0) {
        dprintf(2, "seccomp: %s\n", strerror(errno));
        _exit(EPERM);
    }
    /* Modes are what the client said. */
    umask(0);
    _exit(builtin_main((char **)(uintptr_t)s->argv));
}

/* The folder to start in: what was asked for, else the home if there is one. */
static const char *start_folder(const struct request *r, const struct user *u) {
    struct stat st;
    if (r->cwd[0])
        return r->cwd;
    return u->home[0] == '/' && stat(u->home, &st) == 0 && S_ISDIR(st.st_mode) ? u->home : "/";
}

/* Already what the user is: nothing to change. */
static bool is_us(const struct user *u) {
    return u->uid == 0 && u->gid == 0 && u->group_count == 1 && geteuid() == 0;
}

static int find_user(const char *spec, struct user *u) {
    char own[16];
    if (!spec[0] && geteuid() != 0) {
        /* Not root, as in tests: "" means whoever we are. */
        snprintf(own, sizeof own, "%u", geteuid());
        spec = own;
    }
    return user_lookup(spec, u);
}

/* What the errno of start() is about. */
static const char *failed_what;

/* Of the request's kind: its pid, or -1 and errno. */
static pid_t start_child(struct spawn *s, const struct request *r, const struct policy *p) {
    if (r->flags & EXEC_BUILTIN)
        return fork_builtin(s);
    return r->flags & EXEC_POLICY ? policy_spawn(s, p) : spawn(s);
}

/* 0, or errno with failed_what set. */
static int start(uint32_t stream, const struct request *r, const struct policy *p) {
    struct user u;
    struct environment own;
    failed_what = r->user;
    int error = find_user(r->user, &u);
    if (error)
        return error;
    failed_what = r->argv[0];
    char **env = environment_of(r, &u, &own);
    if (!env)
        return ENOMEM;
    struct joint j = {-1, -1, -1, {-1, -1, -1}, {-1, -1}};
    const char *path = env_get(env, "PATH");
    struct spawn s = {.argv = r->argv, .env = env, .path = path ? path : "", .cwd = start_folder(r, &u), .pty = r->flags & EXEC_PTY};
    if (!is_us(&u) && (geteuid() == 0 || r->user[0]))
        s.user = &u;
    pid_t pid = -1;
    if ((r->flags & EXEC_PTY ? join_pty(&j, r, &u) : join_pipes(&j, r)) == 0) {
        memcpy(s.fd, j.theirs, sizeof s.fd);
        s.keys = j.keys[0] > 0 ? j.keys[0] : 0;
        pid = start_child(&s, r, p);
    }
    error = pid < 0 ? errno : 0;
    free(env);
    if (!error && s.error && (s.failed || r->flags & EXEC_PROGRAM)) {
        /* It never became a command: it is reaped as any other child. */
        failed_what = s.failed ? s.failed : r->argv[0];
        error = s.error;
    }
    struct command *added = error ? NULL : command_add(stream, r->flags, pid, j.in, j.out, j.err);
    if (!added) {
        close_joint(&j);
        if (s.records)
            close(s.records);
        if (!error)
            kill(-pid, SIGKILL);
        return error ? error : ENOMEM;
    }
    added->in.keys = j.keys[1];
    program_begin(r, pid);
    if (s.records)
        command_trace(added, s.records);
    close_fd(&j.keys[0]);
    if (s.pty)
        j.theirs[0] = j.theirs[2] = -1;
    close_theirs(&j);
    uint8_t number[4];
    put_u32(number, (uint32_t)pid);
    line_send(F_STARTED, stream, number, sizeof number);
    return 0;
}

static void refuse(uint32_t stream, int error, const char *what) {
    char text[512];
    snprintf(text, sizeof text, "%s: %s", what, strerror(error));
    line_error(stream, error, text);
}

static void run(uint32_t stream, const uint8_t *data, size_t size) {
    struct request r;
    int wrong;
    if (!request_decode(data, size, &r)) {
        refuse(stream, EINVAL, "malformed request");
    } else if (closed) {
        refuse(stream, ESHUTDOWN, r.argv[0]);
    } else if ((wrong = request_refused(&r, &failed_what))) {
        refuse(stream, wrong, failed_what);
    } else if (command_count() >= COMMANDS_MAX) {
        refuse(stream, EAGAIN, "too many commands");
    } else {
        struct policy p;
        int error = policy_take(&r.policy, &p);
        failed_what = p.failed;
        if (!error)
            error = start(stream, &r, &p);
        if (error)
            refuse(stream, error, failed_what);
        policy_free(&p);
    }
    request_free(&r);
}

static void collector_drop(struct collector **at) {
    struct collector *c = *at;
    *at = c->next;
    collected -= c->bytes.used;
    collector_count--;
    writer_free(&c->bytes);
    free(c);
}

static struct collector **collector_of(uint32_t stream) {
    struct collector **at = &collectors;
    while (*at && (*at)->stream != stream)
        at = &(*at)->next;
    if (*at || collector_count >= COLLECTORS_MAX)
        return at;
    *at = calloc(1, sizeof **at);
    if (*at) {
        (*at)->stream = stream;
        collector_count++;
    }
    return at;
}

static void collector_refuse(struct collector *c, int error, const char *what) {
    refuse(c->stream, error, what);
    c->refused = true;
    collected -= c->bytes.used;
    writer_free(&c->bytes);
}

void exec_frame(const struct frame *f) {
    struct reader r = reader_of(f->payload, f->length);
    bool more = read_u8(&r);
    bool known = false;
    for (struct collector *c = collectors; c; c = c->next)
        known |= c->stream == f->stream;
    if (r.bad || f->stream == 0 || (!known && command_of(f->stream))) {
        refuse(f->stream, r.bad || f->stream == 0 ? EINVAL : EBUSY, "exec");
        return;
    }
    if (!more && !known) {
        run(f->stream, r.at, r.left);
        return;
    }
    struct collector **at = collector_of(f->stream), *c = *at;
    if (!c) {
        refuse(f->stream, EAGAIN, "too many requests");
        return;
    }
    if (!c->refused && c->bytes.used + r.left > REQUEST_MAX)
        collector_refuse(c, E2BIG, "request");
    if (!c->refused && collected + r.left > COLLECT_MAX)
        collector_refuse(c, EAGAIN, "too many requests");
    if (!c->refused) {
        write_bytes(&c->bytes, r.at, r.left);
        collected += c->bytes.bad ? 0 : r.left;
        if (c->bytes.bad)
            collector_refuse(c, ENOMEM, "request");
    }
    if (more)
        return;
    if (!c->refused)
        run(f->stream, c->bytes.data, c->bytes.used);
    collector_drop(at);
}

void exec_forget(uint32_t slot) {
    for (struct collector **at = &collectors; *at;) {
        if (slot == 0 || (*at)->stream >> 16 == slot)
            collector_drop(at);
        else
            at = &(*at)->next;
    }
}

/* Without pidfds, as behind a gVisor of 2022, a blocked SIGCHLD tells; what it told of others is told again. */
static bool signal_within(pid_t pid, int ms) {
    int64_t end = now_ms() + ms, left;
    sigset_t child;
    sigemptyset(&child);
    sigaddset(&child, SIGCHLD);
    siginfo_t info = {0};
    while (waitid(P_PID, (id_t)pid, &info, WEXITED | WNOHANG | WNOWAIT) == 0 && !info.si_pid && (left = end - now_ms()) > 0)
        sigtimedwait(&child, NULL, &(struct timespec){.tv_sec = left / 1000, .tv_nsec = left % 1000 * 1000000});
    kill(getpid(), SIGCHLD);
    return info.si_pid == pid;
}

static bool ends_within(pid_t pid, int ms) {
    int fd = (int)syscall(SYS_pidfd_open, pid, 0);
    if (fd < 0)
        return signal_within(pid, ms);
    struct pollfd p = {.fd = fd, .events = POLLIN};
    bool ended = poll(&p, 1, ms) > 0;
    close(fd);
    return ended;
}

int exec_wait(char **argv, int ms) {
    struct user u;
    struct environment own;
    static char *none[] = {NULL};
    struct request r = {.user = (char *)"", .cwd = (char *)"", .argv = argv, .env = none};
    int error = find_user("", &u);
    char **env = error ? NULL : environment_of(&r, &u, &own);
    if (!env) {
        errno = error ? error : ENOMEM;
        return -1;
    }
    const char *path = env_get(env, "PATH");
    struct spawn s = {.argv = argv, .env = env, .path = path ? path : "", .cwd = "/", .fd = {null_fd, null_fd, null_fd}};
    pid_t pid = spawn(&s);
    free(env);
    if (pid < 0)
        return -1;
    int status = 0;
    bool late = !ends_within(pid, ms);
    if (late)
        kill(-pid, SIGKILL);
    if (waitpid(pid, &status, 0) < 0)
        return -1;
    if (late)
        errno = ETIMEDOUT;
    return late ? -1 : status;
}
