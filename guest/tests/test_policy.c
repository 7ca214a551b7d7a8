/* Commands with a policy: their filter, their Landlock domain, and the way of a listener to whoever answers it. */
#include "policy.h"

#include <errno.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "answerer.h"
#include "check.h"
#include "filter.h"
#include "landlock.h"

#define TOKEN "00112233445566778899aabbccddeeff"
#define ALLOW 0x7fff0000u
#define NOTIFY 0x7fc00000u
#define ERRNO(n) (0x50000u | (n))

enum { OPS = 8, WORDS = 6 };

/* A plan made of lines of words. */
struct made {
    struct plan plan;
    struct op ops[OPS];
    char *words[OPS][WORDS], text[OPS][4096];
};

static struct made made;

static const struct plan *plan_of(const char *first, ...) {
    va_list args;
    memset(&made, 0, sizeof made);
    made.plan.ops = made.ops;
    va_start(args, first);
    for (const char *line = first; line; line = va_arg(args, const char *)) {
        size_t i = made.plan.count++, n = 0;
        snprintf(made.text[i], sizeof made.text[i], "%s", line);
        for (char *word = strtok(made.text[i], " "); word; word = strtok(NULL, " "))
            made.words[i][n++] = word;
        made.ops[i] = (struct op){.words = made.words[i], .count = n};
    }
    va_end(args);
    return &made.plan;
}

/* A filter with one verdict for one call. */
static const char *filter_of(unsigned number, unsigned verdict) {
    const struct sock_filter code[] = {
        {0x20, 0, 0, 0}, {0x15, 0, 1, number}, {0x06, 0, 0, verdict}, {0x06, 0, 0, ALLOW},
    };
    static char text[16 + 2 * sizeof code];
    size_t used = (size_t)sprintf(text, "seccomp ");
    for (size_t i = 0; i < sizeof code; i++)
        used += (size_t)sprintf(text + used, "%02x", ((const unsigned char *)code)[i]);
    return text;
}

static int taken(const struct plan *plan) {
    struct policy p;
    int error = policy_take(plan, &p);
    policy_free(&p);
    return error;
}

static void lists(void) {
    CHECK(taken(&(struct plan){0}) == 0);
    CHECK(taken(plan_of(filter_of(1, ALLOW), NULL)) == 0);
    CHECK(taken(plan_of(filter_of(1, NOTIFY), "token " TOKEN, "rule 1 83 errno=5", NULL)) == 0);
    CHECK(taken(plan_of("rule 1 83 errno=5", "token " TOKEN, NULL)) == EINVAL);      /* of no filter */
    CHECK(taken(plan_of(filter_of(1, NOTIFY), "rule 1 83 errno=5", NULL)) == EINVAL); /* nobody could attach */
    CHECK(taken(plan_of("token 00", NULL)) == EINVAL);
    CHECK(taken(plan_of("token " TOKEN "0", NULL)) == EINVAL);
    CHECK(taken(plan_of("seccomp", NULL)) == EINVAL);
    CHECK(taken(plan_of("seccomp 00", NULL)) == EINVAL);
    CHECK(taken(plan_of("seccomp 0000000000000000", "seccomp 0000000000000000", NULL)) == EINVAL);
    CHECK(taken(plan_of("landlock relative r", NULL)) == EINVAL);
    CHECK(taken(plan_of("landlock / q", NULL)) == EINVAL);
    CHECK(taken(plan_of("landlock /", NULL)) == EINVAL);
    CHECK(taken(plan_of("landlock-net all", NULL)) == EINVAL);
    CHECK(taken(plan_of("else", NULL)) == EINVAL);
    CHECK(taken(plan_of("no-vdso x", NULL)) == EINVAL);
}

static void hexadecimal(void) {
    struct sock_fprog f;
    CHECK(filter_parse("0600000000000500", &f) == 0 && f.len == 1 && f.filter[0].code == 6 && f.filter[0].k == 0x50000);
    free(f.filter);
    CHECK(filter_parse("", &f) < 0 && filter_parse("06", &f) < 0 && filter_parse("060000000000050", &f) < 0);
    CHECK(filter_parse("0600000000000G00", &f) < 0 && !f.filter && errno == EINVAL);
}

/* Whether a filter lets a call be made, found out without making it. */
static void certainties(void) {
    const struct { bool lets; int nr; size_t len; struct sock_filter code[8]; } cases[] = {
        {true, 5, 4, {{0x20, 0, 0, 0}, {0x15, 0, 1, 6}, {0x06, 0, 0, NOTIFY}, {0x06, 0, 0, ALLOW}}},
        {false, 6, 4, {{0x20, 0, 0, 0}, {0x15, 0, 1, 6}, {0x06, 0, 0, NOTIFY}, {0x06, 0, 0, ALLOW}}},
        {true, 6, 4, {{0x20, 0, 0, 0}, {0x35, 0, 1, 7}, {0x06, 0, 0, NOTIFY}, {0x06, 0, 0, ALLOW}}},
        {false, 7, 4, {{0x20, 0, 0, 0}, {0x25, 1, 0, 6}, {0x06, 0, 0, ALLOW}, {0x06, 0, 0, ERRNO(1)}}},
        /* by an argument: it may be either */
        {false, 6, 4, {{0x20, 0, 0, 16}, {0x45, 0, 1, 1}, {0x06, 0, 0, NOTIFY}, {0x06, 0, 0, ALLOW}}},
        /* two ways to one test, one of which lost the number */
        {false, 6, 7, {{0x20, 0, 0, 0}, {0x15, 0, 2, 6}, {0x20, 0, 0, 16}, {0x05, 0, 0, 0}, {0x15, 1, 0, 6}, {0x06, 0, 0, NOTIFY}, {0x06, 0, 0, ALLOW}}},
        {false, 6, 3, {{0x20, 0, 0, 0}, {0x54, 0, 0, 0}, {0x16, 0, 0, 0}}}, /* returns the accumulator */
        {false, 6, 2, {{0x20, 0, 0, 0}, {0x15, 9, 0, 6}}},                  /* leads nowhere */
        {false, 6, 1, {{0x20, 0, 0, 0}}},
        {false, 6, 0, {{0x06, 0, 0, ALLOW}}},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct sock_fprog f = {(unsigned short)cases[i].len, (struct sock_filter *)(uintptr_t)cases[i].code};
        CHECK(filter_lets(&f, cases[i].nr) == cases[i].lets);
    }
}

/* The command's pid; 0 and `error` if it was refused. */
static pid_t begin(const struct plan *plan, const char *const *argv, const char *cwd, int *error) {
    struct policy p;
    static char *env[] = {NULL};
    struct spawn s = {.argv = (char **)(uintptr_t)argv, .env = env, .path = "/usr/bin:/bin", .cwd = cwd, .fd = {0, 1, 2}};
    *error = policy_take(plan, &p);
    pid_t pid = *error ? 0 : policy_spawn(&s, &p);
    policy_free(&p);
    CHECK(pid >= 0);
    if (!*error && s.failed) {
        *error = s.error;
        CHECK(waitpid(pid, NULL, 0) == pid);
        return 0;
    }
    return pid;
}

static int end_of(pid_t pid) {
    int status;
    CHECK(waitpid(pid, &status, 0) == pid);
    return status;
}

static int run(const struct plan *plan, const char *script) {
    int error;
    pid_t pid = begin(plan, (const char *const[]){"sh", "-c", script, NULL}, "/", &error);
    CHECK(!error);
    return end_of(pid);
}

static void kernel(void) {
    int error;
    CHECK(WEXITSTATUS(run(plan_of(filter_of(SYS_uname, ERRNO(5)), NULL), "uname 2>/dev/null || exit 7")) == 7);
    CHECK(WEXITSTATUS(run(&(struct plan){0}, "uname >/dev/null || exit 7")) == 0); /* where there is no default one */
    int status = run(plan_of(filter_of(SYS_uname, 0x80000000u), NULL), "exec uname");
    CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGSYS);
    const char *const command[] = {"true", NULL};
    /* The kernel takes no such program. */
    CHECK(begin(plan_of("seccomp 0000000000000000", NULL), command, "/", &error) == 0 && error == EINVAL);
    CHECK(WEXITSTATUS(run(plan_of("seccomp 0000000000000000", "landlock / rwx", NULL), ":")) == 126);
    CHECK(WEXITSTATUS(run(plan_of(filter_of(SYS_execve, ERRNO(5)), NULL), ":")) == 126);
    CHECK(begin(plan_of(filter_of(1, ALLOW), NULL), command, "/no/such", &error) == 0 && error == ENOENT);
}

static void landlocked(void) {
    int error;
    if (landlock_abi() < 1) {
        fprintf(stderr, "skipped: needs a kernel with Landlock\n");
        return;
    }
    char folder[] = "/tmp/policy-XXXXXX", line[64], script[256];
    CHECK(mkdtemp(folder));
    snprintf(line, sizeof line, "landlock %s rw", folder);
    snprintf(script, sizeof script, "mkdir %s/a && mkfifo %s/f && mv %s/f %s/a/ || exit 1; mkdir /tmp/policy-not && exit 2; exit 0",
             folder, folder, folder, folder);
    CHECK(WEXITSTATUS(run(plan_of("landlock / rx", line, NULL), script)) == 0);
    CHECK(WEXITSTATUS(run(plan_of("landlock none", NULL), ":")) == 126); /* nor may it be executed */
    CHECK(begin(plan_of("landlock /no/such r", NULL), (const char *const[]){"true", NULL}, "/", &error) == 0 && error == ENOENT);
    snprintf(script, sizeof script, "rm -r %s", folder);
    CHECK(system(script) == 0);
}

/* What is handed over: the number of descriptors that came with `bytes`. */
static size_t receive(int intake, char *bytes, size_t size, int fds[2]) {
    union { struct cmsghdr head; char bytes[CMSG_SPACE(2 * sizeof(int))]; } control;
    struct iovec part = {bytes, size};
    struct msghdr m = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
    ssize_t n = recvmsg(intake, &m, MSG_CMSG_CLOEXEC);
    CHECK(n > 0 && !(m.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) && m.msg_controllen);
    size_t count = (control.head.cmsg_len - CMSG_LEN(0)) / sizeof *fds;
    memcpy(fds, CMSG_DATA(&control.head), count * sizeof *fds);
    return count;
}

/* Answer `count` calls, each with `error`. Whose they were is returned of the last. */
static pid_t answer(int listener, int count, int error) {
    struct seccomp_notif call;
    for (; count > 0; count--) {
        memset(&call, 0, sizeof call);
        CHECK(ioctl(listener, SECCOMP_IOCTL_NOTIF_RECV, &call) == 0);
        struct seccomp_notif_resp r = {.id = call.id, .error = -error, .flags = error ? 0 : SECCOMP_USER_NOTIF_FLAG_CONTINUE};
        CHECK(ioctl(listener, SECCOMP_IOCTL_NOTIF_SEND, &r) == 0);
    }
    return (pid_t)call.pid;
}

static void listeners(void) {
    int pair[2], error, fds[2];
    char bytes[65536];
    CHECK(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) == 0);
    answerer_given(pair[1]);
    const char *const twice[] = {"sh", "-c", "uname 2>/dev/null; exec uname 2>/dev/null", NULL};
    pid_t pid = begin(plan_of(filter_of(SYS_uname, NOTIFY), "token " TOKEN, "rule 1 63 errno=5", "handler 63", NULL), twice, "/", &error);
    CHECK(pid > 0);
    CHECK(receive(pair[0], bytes, sizeof bytes, fds) == 1);
    CHECK(bytes[0] == 'L' && bytes[1] == 3 && bytes[5] == 2 && !memcmp(bytes + 13, "token", 5));
    CHECK(answer(fds[0], 1, 5) != pid); /* a child has the filter, too */
    CHECK(answer(fds[0], 1, 5) == pid);
    CHECK(WEXITSTATUS(end_of(pid)) == 1);
    CHECK(wait(NULL) < 0); /* it had no sibling: none of its own calls until then is held */
    close(fds[0]);
    /* execve itself may be held: nobody waits for it. */
    pid = begin(plan_of(filter_of(SYS_execve, NOTIFY), "token " TOKEN, "handler 59", NULL), (const char *const[]){"true", NULL}, "/", &error);
    CHECK(receive(pair[0], bytes, sizeof bytes, fds) == 1);
    answer(fds[0], 1, 0);
    CHECK(end_of(pid) == 0 && wait(NULL) > 0); /* its sibling is ours to reap */
    close(fds[0]);
    /* Nor need the listener be sent by who is under it, nor say that there is no such program. */
    pid = begin(plan_of(filter_of(SYS_sendmsg, ERRNO(5)), "token " TOKEN, "handler 63", NULL), (const char *const[]){"true", NULL}, "/", &error);
    CHECK(receive(pair[0], bytes, sizeof bytes, fds) == 1 && end_of(pid) == 0 && wait(NULL) > 0);
    close(fds[0]);
    pid = begin(plan_of(filter_of(SYS_write, NOTIFY), "token " TOKEN, "handler 1", NULL), (const char *const[]){"no such", NULL}, "/", &error);
    CHECK(WEXITSTATUS(end_of(pid)) == 127 && wait(NULL) < 0 && receive(pair[0], bytes, sizeof bytes, fds) == 1);
    close(fds[0]);
    if (landlock_abi() >= 1) {
        pid = begin(plan_of(filter_of(SYS_uname, NOTIFY), "token " TOKEN, "handler 63", "landlock / rwx", NULL), (const char *const[]){"true", NULL},
                    "/", &error);
        CHECK(receive(pair[0], bytes, sizeof bytes, fds) == 2);
        CHECK(end_of(pid) == 0 && wait(NULL) > 0);
        close(fds[0]);
        close(fds[1]);
    }
    /* Nobody takes it: the program would go on with calls that fail for no reason. */
    close(pair[0]);
    CHECK(begin(plan_of(filter_of(SYS_uname, NOTIFY), "token " TOKEN, "handler 63", NULL), (const char *const[]){"true", NULL}, "/", &error) == 0);
    CHECK(error == EPIPE);
    pid = begin(plan_of(filter_of(SYS_sendmsg, NOTIFY), "token " TOKEN, "handler 46", NULL), (const char *const[]){"sleep", "100", NULL}, "/", &error);
    int status = end_of(pid);
    CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL && wait(NULL) > 0);
    answerer_given(-1);
    close(pair[1]);
}

/* The same where the kernel refuses a flag that it does not know: Linux before 5.19. */
static void without_killable_waits(void) {
    pid_t pid = fork();
    if (pid == 0) {
        struct sock_filter code[] = {
            {0x20, 0, 0, offsetof(struct seccomp_data, nr)}, {0x15, 0, 3, SYS_seccomp}, {0x20, 0, 0, offsetof(struct seccomp_data, args[1])},
            {0x45, 0, 1, 1u << 5}, {0x06, 0, 0, ERRNO(EINVAL)}, {0x06, 0, 0, ALLOW},
        };
        struct sock_fprog old = {sizeof code / sizeof *code, code};
        CHECK(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 && syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &old) == 0);
        CHECK(syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 1u << 5, &old) < 0 && errno == EINVAL);
        listeners();
        _exit(0);
    }
    CHECK(end_of(pid) == 0);
}

/* The machine's own filter, for commands that have no policy or one without a filter. */
static void defaults(void) {
    struct policy p;
    static char *env[] = {NULL};
    const char *const argv[] = {"sh", "-c", "uname 2>/dev/null || exit 7", NULL};
    CHECK(policy_take(plan_of(filter_of(SYS_uname, ERRNO(5)), NULL), &p) == 0);
    CHECK(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0);
    spawn_filter_set(&p.filter);
    struct spawn s = {.argv = (char **)(uintptr_t)argv, .env = env, .path = "/bin", .cwd = "/", .fd = {0, 1, 2}};
    CHECK(WEXITSTATUS(end_of(spawn(&s))) == 7);
    CHECK(WEXITSTATUS(run(plan_of("landlock / rwx", NULL), argv[2])) == 7);
    CHECK(WEXITSTATUS(run(plan_of(filter_of(SYS_mkdir, ERRNO(5)), NULL), argv[2])) == 0);
    spawn_filter_set(&(struct sock_fprog){0});
    policy_free(&p);
}

int main(void) {
    sigset_t all;
    sigfillset(&all);
    sigprocmask(SIG_BLOCK, &all, NULL);
    lists();
    hexadecimal();
    certainties();
    kernel();
    landlocked();
    listeners();
    without_killable_waits();
    defaults();
    return 0;
}
