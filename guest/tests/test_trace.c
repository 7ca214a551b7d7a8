/* The tracer: a command of our own, with a filter where one is asked for, its records read here. */
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "check.h"
#include "trace.h"
#include "tracer.h"

static uint8_t *bytes;
static size_t used;
static int status;

/* RET_TRACE for these numbers. */
static void install(const int *numbers, uint32_t data) {
    struct sock_filter f[64] = {BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr))};
    unsigned short n = 1;
    for (; *numbers >= 0; numbers++) {
        f[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (unsigned)*numbers, 0, 1);
        f[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_TRACE | data);
    }
    f[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
    struct sock_fprog program = {n, f};
    CHECK(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 && prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0);
}

static pid_t begin(struct tracing *t, const char *const *words, bool no_vdso, const int *numbers, uint32_t data, const char *const *argv) {
    CHECK(trace_open(t, (char *const *)(uintptr_t)words, no_vdso, NULL) == 0);
    pid_t pid = fork();
    if (pid == 0) {
        trace_child(t);
        if (numbers)
            install(numbers, data);
        if (trace_ready(t))
            _exit(99);
        execv(argv[0], (char *const *)(uintptr_t)argv);
        _exit(98);
    }
    trace_parent(t, pid);
    return pid;
}

static void read_all(int fd) {
    struct pollfd p = {.fd = fd, .events = POLLIN};
    used = 0;
    for (;;) {
        bytes = realloc(bytes, used + 65536);
        ssize_t n = read(fd, bytes + used, 65536);
        if (n < 0 && errno == EAGAIN) {
            CHECK(poll(&p, 1, 60000) == 1);
            continue;
        }
        CHECK(n >= 0);
        if (n == 0)
            break;
        used += (size_t)n;
    }
    close(fd);
}

/* The tracer has ended by itself: none is left. */
static void reap(pid_t pid, const struct tracing *t) {
    int tracer = 0;
    CHECK(waitpid(pid, &status, 0) == pid);
    CHECK(waitpid(t->tracer, &tracer, 0) == t->tracer && WIFEXITED(tracer) && WEXITSTATUS(tracer) == 0);
}

static void run(const char *const *words, const int *numbers, const char *const *argv) {
    struct tracing t;
    pid_t pid = begin(&t, words, false, numbers, 0, argv);
    read_all(t.records);
    reap(pid, &t);
}

struct record {
    uint8_t kind;
    uint32_t tgid, tid;
    uint64_t at;
    struct reader body;
};

/* Walk the records: all whole, each with a time not before the first. */
static bool next(struct reader *all, struct record *out) {
    if (all->left == 0)
        return false;
    uint32_t size = read_u32(all);
    const uint8_t *p = read_bytes(all, size);
    CHECK(p && !all->bad);
    out->body = reader_of(p, size);
    out->kind = read_u8(&out->body);
    out->tgid = read_u32(&out->body);
    out->tid = read_u32(&out->body);
    out->at = read_u64(&out->body);
    CHECK(!out->body.bad && out->kind <= REC_LOST);
    return true;
}

static size_t count_of(int kind) {
    struct reader all = reader_of(bytes, used);
    struct record r;
    size_t n = 0;
    while (next(&all, &r))
        n += r.kind == kind;
    return n;
}

/* What the records say is missing. */
static uint64_t lost(void) {
    struct reader all = reader_of(bytes, used);
    struct record r;
    uint64_t n = 0;
    while (next(&all, &r))
        n += r.kind == REC_LOST ? read_u64(&r.body) : 0;
    return n;
}

/* How many calls `nr` ended with `result`, or were cut off by an end; with `text` among what was copied, unless NULL. */
static size_t calls(uint32_t nr, int64_t result, const char *text) {
    struct reader all = reader_of(bytes, used);
    struct record r;
    size_t n = 0;
    while (next(&all, &r)) {
        if (r.kind != REC_CALL)
            continue;
        read_u64(&r.body);
        bool unfinished = read_u8(&r.body) & CALL_UNFINISHED;
        bool is = read_u32(&r.body) == nr;
        is &= (int64_t)read_u64(&r.body) == result || unfinished;
        read_bytes(&r.body, 48);
        CHECK(!r.body.bad);
        n += is && (!text || memmem(r.body.at, r.body.left, text, strlen(text)));
    }
    return n;
}

#define WORDS(...) ((const char *const[]){__VA_ARGS__, NULL})
#define SH(script) WORDS("/bin/sh", "-c", script)

static char clock_word[32], openat_word[32], execve_word[32], uname_word[32], write_word[32];

static void filtered(void) {
    const int numbers[] = {SYS_openat, SYS_execve, -1};
    run(WORDS(openat_word, execve_word), numbers, WORDS("/bin/cat", "/etc/passwd", "/nowhere"));
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 1);
    CHECK(calls(SYS_openat, -ENOENT, "/nowhere") == 1 && calls(SYS_openat, 3, "/etc/passwd") == 1);
    CHECK(calls(SYS_execve, 0, "/bin/cat") == 1 && calls(SYS_read, 0, NULL) == 0);
    CHECK(count_of(REC_HELLO) == 1 && count_of(REC_EXEC) == 1 && count_of(REC_EXIT) == 1);
}

/* Everything, forks followed, each process's end said, and what is not asked for left out. */
static void every_call(void) {
    run(WORDS("all", execve_word, write_word), NULL, SH("/bin/true; echo hi >/dev/null; (exit 7); kill -9 $$"));
    CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
    CHECK(calls(SYS_execve, 0, "/bin/true") == 2 /* in the argv of sh too */ && calls(SYS_write, 3, "hi\n") == 1 && calls(SYS_close, 0, NULL) > 0);
    CHECK(count_of(REC_NEW) == 2 && count_of(REC_EXIT) == 3 && count_of(REC_SIGNAL) >= 2);
    run(WORDS("stops", write_word), NULL, SH("echo hi >/dev/null"));
    CHECK(calls(SYS_write, 3, "hi\n") == 1 && calls(SYS_close, 0, NULL) == 0 && calls(SYS_execve, 0, NULL) == 0);
}

/* The filter's data is an errno: the call is recorded, and fails. */
static void refused(void) {
    struct tracing t;
    pid_t pid = begin(&t, WORDS(uname_word), false, (const int[]){SYS_uname, -1}, EACCES, WORDS("/bin/uname"));
    read_all(t.records);
    reap(pid, &t);
    CHECK(calls(SYS_uname, -EACCES, NULL) > 0 && calls(SYS_uname, 0, NULL) == 0);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 1);
}

/* A command that stops itself stays stopped until SIGCONT, and goes on. */
static void group_stop(void) {
    run(WORDS(execve_word), (const int[]){SYS_execve, -1}, SH("(sleep 0.2; kill -CONT $$) & kill -STOP $$; wait; exit 5"));
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 5 && count_of(REC_STOP) >= 1);
}

static void many(void) {
    run(WORDS(execve_word), (const int[]){SYS_execve, -1}, SH("i=0; while [ $i -lt 300 ]; do /bin/true & i=$((i+1)); done; wait; exit 4"));
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 4);
    CHECK(calls(SYS_execve, 0, "/bin/true") == 301 && count_of(REC_NEW) == 300 && count_of(REC_EXIT) == 301);
}

/* What the command leaves behind goes on under its filter, and the pipe ends with the command. */
static void left_behind(void) {
    struct tracing t;
    int end[2], tracer;
    char got[8] = "";
    CHECK(pipe(end) == 0);
    char script[128];
    snprintf(script, sizeof script, "(sleep 0.3; cat /dev/null && echo on >&%d) & exit 6", end[1]);
    pid_t pid = begin(&t, WORDS(openat_word), false, (const int[]){SYS_openat, -1}, 0, SH(script));
    close(end[1]);
    read_all(t.records);
    CHECK(waitpid(pid, &status, 0) == pid && WEXITSTATUS(status) == 6);
    CHECK(waitpid(t.tracer, &tracer, WNOHANG) == 0);
    CHECK(read(end[0], got, sizeof got) == 3 && !memcmp(got, "on\n", 3));
    CHECK(waitpid(t.tracer, &tracer, 0) == t.tracer);
    close(end[0]);
}

/* Until nothing more goes into the pipe. */
static void await_full(int fd) {
    for (int before = -1, now = 0; now != before || now == 0;) {
        struct timespec wait = {.tv_nsec = 300000000};
        before = now;
        nanosleep(&wait, NULL);
        CHECK(ioctl(fd, FIONREAD, &now) == 0);
    }
}

/* Nobody reads: it stands still, can be killed, and its end is heard of before a record is read. */
static void not_read(void) {
    struct tracing t;
    pid_t pid = begin(&t, WORDS("all"), false, NULL, 0, SH("while :; do echo x; done >/dev/null"));
    await_full(t.records);
    kill(pid, SIGKILL);
    CHECK(waitpid(pid, &status, 0) == pid && WIFSIGNALED(status));
    read_all(t.records);
    CHECK(waitpid(t.tracer, &status, 0) == t.tracer);
    CHECK(used > 256 * 1024 && used < 2 << 20 && count_of(REC_EXIT) == 1 && count_of(REC_LOST) == 0);
    /* Too long: it goes on, and what is missing is said. */
    pid = begin(&t, WORDS("all", "stall=100"), false, NULL, 0, SH("i=0; while [ $i -lt 20000 ]; do echo x; i=$((i+1)); done >/dev/null"));
    CHECK(waitpid(pid, &status, 0) == pid && WIFEXITED(status) && WEXITSTATUS(status) == 0);
    read_all(t.records);
    CHECK(waitpid(t.tracer, &status, 0) == t.tracer);
    CHECK(count_of(REC_LOST) >= 1 && calls(SYS_write, 2, NULL) + lost() > 20000);
    /* The reader goes: the command does not stand still for it. */
    pid = begin(&t, WORDS("all"), false, NULL, 0, SH("i=0; while [ $i -lt 20000 ]; do echo x; i=$((i+1)); done >/dev/null"));
    close(t.records);
    reap(pid, &t);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

static void never_born(void) {
    struct tracing t;
    CHECK(trace_open(&t, (char *[]){NULL}, false, NULL) == 0);
    trace_parent(&t, -1);
    CHECK(waitpid(t.tracer, &status, 0) == t.tracer && WIFEXITED(status));
    close(t.records);
}

static void words(void) {
    static struct asked a;
    static const char *const bad[] = {"", "x", "1024", "1:", "1:6s", "1:0", "1:0q", "1:0s,", "1:0b", "1:0b6", "1:0f513", "1:0s 1s",
                                      "99999999999999999999", "bytes=4097", "bytes=", "bytes=1x", "stall=", "stall=86400001", "-1", "1:0s,0s,0s,0s,0s,0s,0s"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        CHECK(!asked_parse(&a, (char *const *)(uintptr_t)WORDS(bad[i])));
    memset(&a, 0, sizeof a);
    CHECK(asked_parse(&a, (char *const *)(uintptr_t)WORDS("stops", "bytes=9", "3:0s,1b2,5F144", "4")));
    CHECK(a.mode == TRACE_STOPS && a.bytes == 9 && a.calls[3].count == 3 && a.calls[3].captures[2].size == 144 && a.calls[4].wanted);
}

/* date(1) reads the clock by the vDSO, or where it finds none by a call. */
static void hidden_vdso(void) {
    for (int hidden = 0; hidden < 2; hidden++) {
        struct tracing t;
        pid_t pid = begin(&t, WORDS(clock_word), hidden, (const int[]){SYS_clock_gettime, -1}, 0, WORDS("/bin/date"));
        read_all(t.records);
        reap(pid, &t);
        CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
        CHECK((calls(SYS_clock_gettime, 0, NULL) > 0) == hidden);
    }
    struct tracing t;
    pid_t pid = begin(&t, NULL, true, NULL, 0, WORDS("/bin/true"));
    CHECK(t.records == -1);
    reap(pid, &t);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

int main(void) {
    snprintf(clock_word, sizeof clock_word, "%d", (int)SYS_clock_gettime);
    snprintf(openat_word, sizeof openat_word, "%d:1s", (int)SYS_openat);
    snprintf(execve_word, sizeof execve_word, "%d:0s,1v", (int)SYS_execve);
    snprintf(uname_word, sizeof uname_word, "%d", (int)SYS_uname);
    snprintf(write_word, sizeof write_word, "%d:1b2", (int)SYS_write);
    words();
    filtered();
    every_call();
    refused();
    group_stop();
    many();
    left_behind();
    not_read();
    never_born();
    hidden_vdso();
    free(bytes);
    return 0;
}
