/* The builtin `answer`: an owner at the other end of two pipes. */
#include "answering.h"

#include <sys/mman.h>

#include "builtins.h"

static int to, from; /* the host's ends */
static pid_t builtin;
static uint8_t message[1 << 20];

static void start_builtin(const char *hex) {
    int in[2], out[2];
    CHECK(pipe2(in, O_CLOEXEC) == 0 && pipe2(out, O_CLOEXEC) == 0);
    builtin = fork();
    if (builtin == 0) {
        int error = open("/dev/null", O_WRONLY);
        CHECK(dup2(in[0], 0) == 0 && dup2(out[1], 1) == 1 && dup2(error, 2) == 2);
        int high = fcntl(intake, F_DUPFD, 100);
        CHECK(dup2(high, ANSWER_BUILTIN_FD) == ANSWER_BUILTIN_FD);
        int kept[] = {ANSWER_BUILTIN_FD};
        close_all_but(kept, 1);
        char *argv[] = {(char *)"answer", (char *)(uintptr_t)hex, NULL};
        _exit(builtin_main(argv));
    }
    close(in[0]);
    close(out[1]);
    to = in[1];
    from = out[0];
}

static void tell(struct writer *w) {
    uint32_t length = (uint32_t)w->used;
    CHECK(write(to, &length, 4) == 4 && write_all(to, w->data, w->used) == 0);
    writer_free(w);
}

static struct writer start_message(char type) {
    struct writer w = {0};
    write_u8(&w, (uint8_t)type);
    return w;
}

/* The next message's type; its rest is a reader's. */
static char next(struct reader *r) {
    uint32_t length;
    struct pollfd p = {.fd = from, .events = POLLIN};
    CHECK(poll(&p, 1, 10000) == 1);
    CHECK(read_all(from, &length, 4) == 0 && length > 0 && length <= sizeof message && read_all(from, message, length) == 0);
    *r = reader_of(message + 1, length - 1);
    return (char)message[0];
}

static int result(uint32_t request, struct reader *r) {
    CHECK(next(r) == 'R' && read_u32(r) == request);
    return (int)read_u32(r);
}

static int answered; /* calls not given back, for a rule answers them */

/* What comes but for word of those, which may cross the next call. */
static char next_other(struct reader *r) {
    char kind;
    for (; (kind = next(r)) == 'a'; answered++)
        CHECK(r->left == 8);
    return kind;
}

static struct seccomp_notif next_call(struct reader *r) {
    struct seccomp_notif call;
    CHECK(next_other(r) == 'n');
    memcpy(&call, read_bytes(r, sizeof call), sizeof call);
    return call;
}

static void reply_to(uint64_t id, int64_t value, int error) {
    struct writer w = start_message('d');
    write_u64(&w, id);
    write_u64(&w, (uint64_t)value);
    write_u32(&w, (uint32_t)error);
    write_u32(&w, 0);
    tell(&w);
}

static char held_text[64] = "as it was";

static int talk(void) {
    char text[64] = {0};
    CHECK(syscall(SYS_getppid) == 55 && !strcmp(held_text, "changed"));
    long fd = syscall(SYS_openat, AT_FDCWD, "/there/is/none", O_RDONLY); /* bytes */
    CHECK(fd >= 0 && read((int)fd, text, sizeof text) == 5 && !memcmp(text, "hello", 5) && write((int)fd, "x", 1) < 0);
    fd = syscall(SYS_openat, AT_FDCWD, "/a/stream", O_RDWR);
    CHECK(fd >= 0 && write((int)fd, "ping", 4) == 4 && read((int)fd, text, 4) == 4 && !memcmp(text, "pong", 4) && read((int)fd, text, 1) == 0);
    close((int)fd);
    fd = syscall(SYS_openat, AT_FDCWD, "/etc/passwd", O_RDONLY | O_CLOEXEC); /* on behalf */
    CHECK(fd >= 0 && fcntl((int)fd, F_GETFD) == FD_CLOEXEC);
    CHECK(syscall(SYS_openat, AT_FDCWD, (char *)8, O_RDONLY) < 0 && errno == EXDEV); /* handed off: a rule's */
    CHECK(syscall(SYS_getppid) == 56);                                                /* given back */
    CHECK(syscall(SYS_getppid) < 0 && errno == EPERM);                                /* nobody is there any more */
    return 9;
}

static void bytes_for(uint32_t request, const struct seccomp_notif *call, char type, const char *content) {
    struct writer w = start_message(type);
    write_u32(&w, request);
    write_u64(&w, call->id);
    write_u8(&w, 1);
    write_u32(&w, 0);
    write_u32(&w, O_CLOEXEC);
    write_bytes(&w, content, strlen(content));
    tell(&w);
}

static void memory(const struct seccomp_notif *call) {
    struct reader r;
    struct writer w = start_message('r');
    write_u32(&w, 1), write_u64(&w, call->id), write_u32(&w, call->pid), write_u64(&w, (uint64_t)(uintptr_t)held_text), write_u32(&w, 9);
    tell(&w);
    CHECK(result(1, &r) == 0 && r.left == 9 && !memcmp(r.at, "as it was", 9));
    w = start_message('r');
    write_u32(&w, 2), write_u64(&w, call->id), write_u32(&w, call->pid), write_u64(&w, 8), write_u32(&w, 9);
    tell(&w);
    CHECK(result(2, &r) == EFAULT && r.left == 0);
    w = start_message('w');
    write_u32(&w, 3), write_u64(&w, call->id), write_u32(&w, call->pid), write_u64(&w, (uint64_t)(uintptr_t)held_text), write_bytes(&w, "changed", 8);
    tell(&w);
    CHECK(result(3, &r) == 0);
    w = start_message('v');
    write_u32(&w, 4), write_u64(&w, call->id);
    tell(&w);
    CHECK(result(4, &r) == 0);
    w = start_message('v');
    write_u32(&w, 5), write_u64(&w, call->id + 1000);
    tell(&w);
    CHECK(result(5, &r) == ENOENT);
    w = start_message('w');
    write_u32(&w, 6), write_u64(&w, call->id + 1000), write_u32(&w, call->pid), write_u64(&w, (uint64_t)(uintptr_t)held_text), write_bytes(&w, "no", 2);
    tell(&w);
    CHECK(result(6, &r) == ENOENT);
}

static void stream(void) {
    struct reader r;
    struct seccomp_notif call = next_call(&r);
    bytes_for(77, &call, 'F', "");
    CHECK(result(77, &r) == 0);
    CHECK(next(&r) == 's' && read_u32(&r) == 77 && r.left == 4 && !memcmp(r.at, "ping", 4));
    struct writer w = start_message('s');
    write_u32(&w, 77), write_bytes(&w, "pong", 4);
    tell(&w);
    w = start_message('e');
    write_u32(&w, 77);
    tell(&w);
    CHECK(next(&r) == 'k' && read_u32(&r) == 77 && read_u32(&r) == 4);
    CHECK(next(&r) == 'e' && read_u32(&r) == 77);
}

static void give_off(const struct seccomp_notif *call, uint8_t flags) {
    struct writer w = start_message('h');
    write_u8(&w, flags);
    write_bytes(&w, call, sizeof *call);
    tell(&w);
}

static void conversation(void) {
    struct reader r;
    struct seccomp_notif call;
    char text[512];
    const int calls[] = {SYS_openat, SYS_getppid, 0};
    new_token();
    snprintf(text, sizeof text, "token %s\nrule 1 %d errno=18 arg=1:==:8:255\nhandler %d,%d", token, SYS_openat, SYS_openat, SYS_getppid);
    pid_t pid = program(text, calls, talk);
    start_builtin(token);
    CHECK(next(&r) == 'o');
    struct writer w = start_message('t');
    write_u32(&w, 1), write_u32(&w, SYS_openat), write_u8(&w, 1), write_u8(&w, 0), write_u32(&w, 0);
    tell(&w);
    call = next_call(&r);
    CHECK(call.data.nr == SYS_getppid && read_u8(&r) == 0 && reader_done(&r));
    memory(&call);
    reply_to(call.id, 55, 0);
    call = next_call(&r);
    CHECK(read_u8(&r) == 1 && read_u8(&r) == 1 && read_u32(&r) == 14 && r.left == 14 && !memcmp(r.at, "/there/is/none", 14));
    bytes_for(10, &call, 'f', "hello");
    CHECK(result(10, &r) == 0 && r.left == 4);
    stream();
    call = next_call(&r);
    w = start_message('p');
    write_u32(&w, 11), write_u64(&w, call.id), write_u32(&w, call.pid), write_u32(&w, (uint32_t)AT_FDCWD);
    write_u64(&w, O_RDONLY | O_CLOEXEC), write_u64(&w, 0), write_u64(&w, 0), write_string(&w, "/etc/passwd");
    tell(&w);
    CHECK(result(11, &r) == 0 && r.left == 4);
    call = next_call(&r);
    CHECK(read_u8(&r) == 0); /* what cannot be read is left out */
    give_off(&call, 1);
    call = next_call(&r);
    give_off(&call, 1);
    CHECK(next_other(&r) == 'b' && read_u64(&r) == call.id);
    reply_to(call.id, 56, 0);
    call = next_call(&r);
    CHECK(answered == 1);
    close(to); /* with that call held */
    CHECK(ends_within(pid, 5) && result_of(pid) == 9);
    CHECK(result_of(builtin) == 0);
    close(from);
}

static int ask_once(void) { return syscall(SYS_getppid) == 57 ? 3 : 4; }

static void attach_to(const char *hex) {
    struct writer w = start_message('a');
    for (int i = 0; i < ANSWER_TOKEN; i++) {
        char pair[3] = {hex[2 * i], hex[2 * i + 1], 0};
        write_u8(&w, (uint8_t)strtoul(pair, NULL, 16));
    }
    tell(&w);
}

/* One builtin carries one listener after the other. */
static void again(void) {
    const int calls[] = {SYS_getppid, 0};
    char text[256];
    struct reader r;
    for (int i = 0; i < 3; i++) {
        new_token();
        snprintf(text, sizeof text, "token %s\nhandler %d", token, SYS_getppid);
        pid_t pid = program(text, calls, ask_once);
        if (i == 0)
            start_builtin(token);
        else
            attach_to(token);
        CHECK(next(&r) == 'o');
        struct writer w = start_message('t');
        write_u32(&w, 0);
        tell(&w);
        struct seccomp_notif call = next_call(&r);
        reply_to(call.id, 57, 0);
        CHECK(next(&r) == 'x' && read_u32(&r) == 0 && reader_done(&r) && result_of(pid) == 3);
        reply_to(call.id, 58, 0); /* nobody's any more */
        attach_to(token);
        CHECK(next(&r) == 'x' && read_u32(&r) == ESRCH);
    }
    close(to);
    CHECK(result_of(builtin) == 0);
    close(from);
}

static size_t *said; /* shared */

/* Writes until neither we nor the builtin, whose messages nobody reads, hold any more. */
static int speak(void) {
    static const char text[32768];
    int fd = (int)syscall(SYS_getppid), room = 212992;
    struct pollfd p = {.fd = fd, .events = POLLOUT};
    CHECK(fd >= 0 && setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &room, sizeof room) == 0);
    while (poll(&p, 1, 300) == 1) {
        ssize_t n = send(fd, text, sizeof text, MSG_DONTWAIT);
        CHECK(n > 0 || errno == EAGAIN);
        *said += n > 0 ? (size_t)n : 0;
    }
    return 6;
}

/* What a program wrote before it ended is carried, however late it is taken. */
static void last_words(void) {
    const int calls[] = {SYS_getppid, 0};
    char text[256];
    struct reader r;
    size_t heard = 0;
    said = mmap(NULL, sizeof *said, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    new_token();
    snprintf(text, sizeof text, "token %s\nhandler %d", token, SYS_getppid);
    pid_t pid = program(text, calls, speak);
    start_builtin(token);
    CHECK(next(&r) == 'o');
    struct writer w = start_message('t');
    write_u32(&w, 0);
    tell(&w);
    struct seccomp_notif call = next_call(&r);
    bytes_for(12, &call, 'F', "");
    CHECK(result(12, &r) == 0 && result_of(pid) == 6);
    char kind;
    while ((kind = next(&r)) == 's') {
        CHECK(read_u32(&r) == 12);
        heard += r.left;
    }
    CHECK(kind == 'e' || kind == 'x');
    CHECK(heard == *said && heard > 2 * 65536);
    close(to);
    CHECK(result_of(builtin) == 0);
    close(from);
    munmap(said, sizeof *said);
}

static int wait_here(void) { return syscall(SYS_getppid) < 0 ? errno : 0; }

/* What the host says wrongly ends the builtin, and what it held is refused. */
static void malformed(void) {
    static const uint8_t bad[][12] = {{0, 0, 0, 0, 1}, {0xff, 0xff, 0xff, 0xff, 1}, {1, 0, 0, 0, 'z'}, {3, 0, 0, 0, 'd', 1, 2}, {5, 0, 0, 0, 't', 255, 255, 255, 255}};
    const int calls[] = {SYS_getppid, 0};
    char text[256];
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        struct reader r;
        new_token();
        snprintf(text, sizeof text, "token %s\nhandler %d", token, SYS_getppid);
        pid_t pid = program(text, calls, wait_here);
        start_builtin(token);
        CHECK(next(&r) == 'o');
        if (bad[i][4] != 't') {
            struct writer w = start_message('t');
            write_u32(&w, 0);
            tell(&w);
            next_call(&r);
        }
        CHECK(write(to, bad[i], sizeof bad[i]) == sizeof bad[i]);
        CHECK(ends_within(builtin, 5) && result_of(builtin) == EPROTO);
        CHECK(ends_within(pid, 5) && result_of(pid) == EPERM);
        close(to);
        close(from);
    }
    start_builtin("nonsense");
    CHECK(result_of(builtin) == EINVAL);
    close(to);
    close(from);
}

int main(void) {
    if (!able()) {
        puts("test_remote: skipped: no seccomp listener can be had here");
        return 0;
    }
    signal(SIGPIPE, SIG_IGN);
    begin(false);
    conversation();
    again();
    last_words();
    malformed();
    end();
    puts("test_remote: ok");
    return 0;
}
