/* An answerer and the programs that it answers, for the tests of both ends. */
#ifndef TVINIT_ANSWERING_H
#define TVINIT_ANSWERING_H

#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "answer.h"
#include "check.h"
#include "fds.h"
#include "operations.h"
#include "wire.h"

static int intake = -1; /* PID 1's end */
static pid_t answerer;
static char socket_path[64], test_folder[48];

/* Each listener's own: nobody waits for one that has been. */
static char token[2 * ANSWER_TOKEN + 1];

static inline void new_token(void) {
    static unsigned count;
    snprintf(token, sizeof token, "%032x", ++count);
}

static inline double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static inline void begin(bool listens) {
    int pair[2], ear = -1;
    CHECK(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) == 0);
    if (listens) {
        struct sockaddr_un a = {.sun_family = AF_UNIX};
        strcpy(test_folder, "/tmp/tvinit-answer-XXXXXX");
        CHECK(mkdtemp(test_folder));
        snprintf(socket_path, sizeof socket_path, "%s/answer.sock", test_folder);
        strcpy(a.sun_path, socket_path);
        ear = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
        CHECK(bind(ear, (struct sockaddr *)&a, sizeof a) == 0 && listen(ear, 16) == 0);
    }
    answerer = fork();
    if (answerer == 0) {
        int kept[] = {pair[1], ear};
        close_all_but(kept, 2);
        _exit(answer_main(pair[1], ear));
    }
    close(pair[1]);
    if (ear >= 0)
        close(ear);
    intake = pair[0];
}

/* With PID 1's end closed and no program left it ends by itself. */
static inline void end(void) {
    int status;
    close(intake);
    CHECK(waitpid(answerer, &status, 0) == answerer && WIFEXITED(status) && WEXITSTATUS(status) == 0);
    if (test_folder[0]) {
        unlink(socket_path);
        CHECK(rmdir(test_folder) == 0);
        test_folder[0] = 0;
    }
}

static inline bool send_with_fd(int sock, const void *data, size_t size, int fd) {
    union { struct cmsghdr head; char bytes[CMSG_SPACE(sizeof(int))]; } control = {{0}};
    struct iovec io = {(void *)(uintptr_t)data, size};
    struct msghdr m = {.msg_iov = &io, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
    control.head = (struct cmsghdr){.cmsg_len = CMSG_LEN(sizeof fd), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS};
    memcpy(CMSG_DATA(&control.head), &fd, sizeof fd);
    if (fd < 0)
        m.msg_control = NULL, m.msg_controllen = 0;
    return sendmsg(sock, &m, MSG_NOSIGNAL) == (ssize_t)size;
}

/* 'L': words by spaces, operations by newlines. */
static inline void hand_over(int listener, const char *text) {
    struct writer w = {0};
    write_u8(&w, 'L');
    write_operations(&w, text);
    CHECK(send_with_fd(intake, w.data, w.used, listener));
    writer_free(&w);
}

/* From here on these calls of ours are held; returns the listener. */
static inline int filter_calls(const int *calls, size_t count) {
    struct sock_filter code[40];
    unsigned short n = 0;
    code[n++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr));
    for (size_t i = 0; i < count; i++)
        code[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (uint32_t)calls[i], (unsigned char)(count - i), 0);
    code[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
    code[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_USER_NOTIF);
    struct sock_fprog p = {n, code};
    CHECK(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0);
    unsigned long killable = 1UL << 5;
    int fd = (int)syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_NEW_LISTENER | killable, &p);
    if (fd < 0 && errno == EINVAL)
        fd = (int)syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_NEW_LISTENER, &p);
    return fd;
}

/* A program of which `calls` (ended by 0) are answered. Its exit status is what `run` returns. */
static inline pid_t program(const char *operations, const int *calls, int (*run)(void)) {
    size_t n = 0;
    while (calls[n])
        n++;
    pid_t pid = fork();
    if (pid)
        return pid;
    int kept[] = {intake};
    close_all_but(kept, 1); /* an owner's connection ends with the owner */
    int fd = filter_calls(calls, n);
    CHECK(fd >= 0);
    hand_over(fd, operations);
    close(fd);
    close(intake);
    _exit(run());
}

static inline int result_of(pid_t pid) {
    int status;
    CHECK(waitpid(pid, &status, 0) == pid);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}

static inline bool ends_within(pid_t pid, double limit) {
    double until = seconds() + limit;
    siginfo_t info = {0};
    while (seconds() < until) {
        if (waitid(P_PID, (id_t)pid, &info, WEXITED | WNOHANG | WNOWAIT) == 0 && info.si_pid == pid)
            return true;
        usleep(5000);
    }
    return false;
}

/* Connect and say 'A'. */
static inline int call_answerer(const char *hex, int page) {
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    uint8_t hello[17] = {'A'};
    strcpy(a.sun_path, socket_path);
    int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    CHECK(connect(fd, (struct sockaddr *)&a, sizeof a) == 0);
    for (int i = 0; i < 16; i++) {
        char pair[3] = {hex[2 * i], hex[2 * i + 1], 0};
        hello[1 + i] = (uint8_t)strtoul(pair, NULL, 16);
    }
    CHECK(send_with_fd(fd, hello, sizeof hello, page));
    return fd;
}

/* One message, within 10 s. */
static inline ssize_t hear(int sock, uint8_t *out, size_t size, int *fd) {
    union { struct cmsghdr head; char bytes[CMSG_SPACE(sizeof(int))]; } control;
    struct iovec io = {out, size};
    struct msghdr m = {.msg_iov = &io, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
    struct pollfd p = {.fd = sock, .events = POLLIN};
    CHECK(poll(&p, 1, 10000) == 1);
    *fd = -1;
    ssize_t n = recvmsg(sock, &m, MSG_CMSG_CLOEXEC);
    if (n > 0 && m.msg_controllen && CMSG_FIRSTHDR(&m))
        memcpy(fd, CMSG_DATA(CMSG_FIRSTHDR(&m)), sizeof *fd);
    return n;
}

/* Attach; the listener, or minus the errno that was said. */
static inline int attach(const char *hex, int page, int *sock) {
    uint8_t b[16] = {0};
    int fd, error;
    *sock = call_answerer(hex, page);
    ssize_t n = hear(*sock, b, sizeof b, &fd);
    if (n == 1 && b[0] == 'O' && fd >= 0)
        return fd;
    CHECK(n == 5 && b[0] == 'E');
    memcpy(&error, b + 1, 4);
    return -error;
}

static inline bool receive(int listener, struct seccomp_notif *call) {
    memset(call, 0, sizeof *call);
    struct pollfd p = {.fd = listener, .events = POLLIN};
    CHECK(poll(&p, 1, 10000) == 1);
    return ioctl(listener, SECCOMP_IOCTL_NOTIF_RECV, call) == 0;
}

static inline void respond(int listener, uint64_t id, int64_t value, int error) {
    struct seccomp_notif_resp r = {.id = id, .val = value, .error = error};
    CHECK(ioctl(listener, SECCOMP_IOCTL_NOTIF_SEND, &r) == 0);
}

static char rules[1024];

/* With a token of its own, that of the next attach. */
static inline const char *with(const char *format, int a, int b) {
    new_token();
    int n = snprintf(rules, sizeof rules, "token %s\n", token);
    snprintf(rules + n, sizeof rules - (size_t)n, format, a, b);
    return rules;
}

#define PPID ((const int[]){SYS_getppid, 0})
#define OPENS ((const int[]){SYS_openat, SYS_getppid, 0})

static inline long ppid(void) { return syscall(SYS_getppid); }

static inline int opened(const char *path) {
    long fd = syscall(SYS_openat, AT_FDCWD, path, O_RDONLY | O_CLOEXEC);
    int error = errno;
    if (fd >= 0)
        close((int)fd);
    return fd >= 0 ? 0 : error;
}

static inline void *ask(void *arg) {
    *(long *)arg = ppid();
    return NULL;
}

/* Whether this kernel, and what we are under, let us have a listener. */
static inline bool able(void) {
    pid_t pid = fork();
    if (pid == 0)
        _exit(filter_calls(PPID, 1) < 0);
    return result_of(pid) == 0;
}

#endif
