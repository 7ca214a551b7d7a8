/* The whole guest under the sanitizers: guest_main in a child, raw frames over a socket pair. What windows promise is
 * counted here; everything else of the protocol is tested from outside, on the real binary. */
#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"
#include "frame.h"
#include "line.h"
#include "loop.h"
#include "modes.h"
#include "request.h"
#include "wire.h"

static int sock;
static struct parser parser;
static uint8_t buffer[65536];
static const uint8_t *at;
static size_t left;

static void send_frame(uint8_t type, uint32_t stream, const void *payload, size_t size) {
    uint8_t bytes[FRAME_HEADER + FRAME_MAX];
    frame_header(bytes, type, stream, (uint32_t)size);
    if (size)
        memcpy(bytes + FRAME_HEADER, payload, size);
    CHECK(write(sock, bytes, FRAME_HEADER + size) == (ssize_t)(FRAME_HEADER + size));
}

static struct frame next(void) {
    struct frame f;
    for (;;) {
        enum parse got = parser_feed(&parser, &at, &left, &f);
        CHECK(got != PARSE_BAD);
        if (got == PARSE_FRAME && f.type != F_LOG)
            return f;
        if (got == PARSE_FRAME)
            continue;
        ssize_t n = read(sock, buffer, sizeof buffer);
        CHECK(n > 0);
        at = buffer;
        left = (size_t)n;
    }
}

static struct frame expect(uint8_t type, uint32_t stream) {
    struct frame f;
    do
        f = next();
    while (f.stream != stream || (f.type != type && f.type == F_DATA && f.length == 1));
    CHECK(f.type == type);
    return f;
}

static void ask(uint32_t stream, uint32_t flags, const char *const *argv) {
    struct writer w = {0};
    uint32_t count = 0;
    write_u8(&w, 0);
    write_u32(&w, flags);
    write_u32(&w, 0);
    write_string(&w, "");
    write_string(&w, "/");
    while (argv[count])
        count++;
    write_u32(&w, count);
    for (uint32_t i = 0; i < count; i++)
        write_string(&w, argv[i]);
    write_u32(&w, 0);
    if (flags & EXEC_PROGRAM)
        write_u32(&w, SIGUSR1);
    send_frame(F_EXEC, stream, w.data, w.used);
    writer_free(&w);
}

static void start(uint32_t stream, uint32_t flags, const char *const *argv) {
    ask(stream, flags, argv);
    expect(F_STARTED, stream);
}

static void send_data(uint32_t stream, size_t size) {
    static uint8_t bytes[FRAME_MAX];
    bytes[0] = CH_STDIN;
    send_frame(F_DATA, stream, bytes, size + 1);
}

static void window(uint32_t stream, uint8_t channel, uint32_t more) {
    uint8_t bytes[5] = {channel};
    put_u32(bytes + 1, more);
    send_frame(F_WINDOW, stream, bytes, sizeof bytes);
}

static void synchronise(void) {
    static const uint8_t zeros[FRAME_RESYNC];
    uint8_t payload[SYNC_SIZE] = "0123456789abcdef\1";
    CHECK(write(sock, zeros, sizeof zeros) == sizeof zeros);
    send_frame(F_SYNC, 0, payload, sizeof payload);
    struct frame f = expect(F_SYNCED, 0);
    CHECK(f.length == SYNC_SIZE && !memcmp(f.payload, payload, SYNC_SIZE));
}

/* A command's output stops where the window ends, and goes on by exactly what is granted. */
static void output_window(uint32_t stream) {
    start(stream, EXEC_NO_STDIN, (const char *const[]){"head", "-c", "1000000", "/dev/zero", NULL});
    size_t got = 0;
    while (got < WINDOW_SIZE)
        got += expect(F_DATA, stream).length - 1;
    CHECK(got == WINDOW_SIZE);
    send_frame(F_PING, stream, "still?", 6);
    expect(F_PONG, stream); /* nothing came in between */
    window(stream, CH_STDOUT, 1);
    CHECK(expect(F_DATA, stream).length == 2);
    window(stream, CH_STDOUT, 1000000);
    for (got++; got < 1000000;)
        got += expect(F_DATA, stream).length - 1;
    CHECK(got == 1000000);
    struct frame f = expect(F_EXITED, stream);
    CHECK(f.length == 29 && f.payload[0] == 0 && get_u32(f.payload + 1) == 0);
}

/* A command that does not read holds up its own stream alone; one byte too many ends it. */
static void input_window(uint32_t stream) {
    start(stream, 0, (const char *const[]){"sleep", "1000", NULL});
    size_t credit = WINDOW_SIZE, taken = 0;
    while (credit > 0) {
        for (; credit > 0; credit -= 16384)
            send_data(stream, 16384);
        send_frame(F_PING, stream, NULL, 0);
        for (struct frame f; (f = next()).type != F_PONG; taken += get_u32(f.payload + 1)) {
            CHECK(f.type == F_WINDOW && f.payload[0] == CH_STDIN && get_u32(f.payload + 1) % 16384 == 0);
            credit += get_u32(f.payload + 1);
        }
    }
    CHECK(taken <= 65536); /* a pipe */
    send_data(stream, 1);
    struct frame f = expect(F_ERROR, stream);
    CHECK(get_u32(f.payload) == EPROTO);
}

/* Frames for streams that never were, and frames cut short. */
static void nonsense(uint32_t stream) {
    static const uint8_t types[] = {F_DATA, F_WINDOW, F_SIGNAL, F_RESIZE, F_GONE};
    for (size_t i = 0; i < sizeof types; i++)
        for (size_t size = 0; size < 6; size++)
            send_frame(types[i], stream, "\1\2\3\4\5", size);
    send_frame(F_EXEC, stream, "\0", 1);
    CHECK(get_u32(expect(F_ERROR, stream).payload) == EINVAL);
    send_frame(F_STEPS, stream, "\xff\xff\xff\xff", 4);
    CHECK(get_u32(expect(F_ERROR, stream).payload) == EINVAL);
    send_frame(0x7f, stream, NULL, 0);
    CHECK(get_u32(expect(F_ERROR, stream).payload) == ENOSYS);
    CHECK(write(sock, "not a frame", 11) == 11);
    synchronise();
}

/* What it writes comes without a window, on stream 0; there is one at a time; a shutdown begins with its own signal. */
static void program(uint32_t stream) {
    static const uint32_t flags = EXEC_PROGRAM | EXEC_DETACH | EXEC_NO_STDIN;
    const char *const plain[] = {"true", NULL};
    ask(stream, EXEC_PROGRAM, plain);
    CHECK(get_u32(expect(F_ERROR, stream).payload) == EINVAL);
    ask(stream, flags, (const char *const[]){"/no/such/program", NULL});
    CHECK(get_u32(expect(F_ERROR, stream).payload) == ENOENT);
    start(stream, flags, (const char *const[]){"sh", "-c", "trap 'echo told; exit 7' USR1; head -c 500000 /dev/zero; while :; do sleep 0.01; done", NULL});
    for (size_t got = 0; got < 500000;) {
        struct frame f = next();
        CHECK(f.type == F_DATA && f.stream == 0 && f.payload[0] == CH_STDOUT);
        got += f.length - 1;
    }
    ask(stream + 1, flags, plain);
    CHECK(get_u32(expect(F_ERROR, stream + 1).payload) == EBUSY);
    start(stream + 2, EXEC_BUILTIN | EXEC_NO_STDIN, (const char *const[]){"program", NULL});
    struct frame f;
    do
        f = expect(F_DATA, stream + 2);
    while (f.payload[0] != CH_STDOUT); /* the end of the other may be seen first */
    CHECK(f.length > 6 && !memcmp(f.payload + 1, "pid ", 4) && !memchr(f.payload, 'e', f.length));
    synchronise();
    send_frame(F_SHUTDOWN, 0, "\0\x20\x4e\0", 5);
    f = expect(F_DATA, 0);
    CHECK(f.length == 6 && !memcmp(f.payload + 1, "told\n", 5));
}

/* One that takes no notice has its time, and is killed. */
static void deaf_program(uint32_t stream) {
    start(stream, EXEC_PROGRAM | EXEC_DETACH | EXEC_NO_STDIN, (const char *const[]){"sh", "-c", "trap '' USR1 TERM; echo deaf; while :; do sleep 1; done", NULL});
    expect(F_DATA, 0);
    int64_t began = now_ms();
    send_frame(F_SHUTDOWN, 0, "\0\x64\0\0\0", 5);
    expect(F_BYE, 0);
    CHECK(now_ms() - began >= 100 && now_ms() - began < 1900);
}

static pid_t begin(void) {
    int pair[2];
    CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) == 0);
    pid_t pid = fork();
    if (pid == 0) {
        char number[16];
        close(pair[0]);
        snprintf(number, sizeof number, "%d", pair[1]);
        exit(guest_main(2, (char *[]){(char *)"--fd", number}));
    }
    close(pair[1]);
    sock = pair[0];
    parser.used = left = 0;
    synchronise();
    return pid;
}

static void ends(pid_t pid) {
    int status;
    CHECK(waitpid(pid, &status, 0) == pid && WIFEXITED(status) && WEXITSTATUS(status) == 0);
    close(sock);
}

int main(void) {
    pid_t pid = begin();
    output_window(0x10001);
    input_window(0x10002);
    nonsense(0x10003);
    start(0x10004, EXEC_PTY, (const char *const[]){"sleep", "1000", NULL});
    synchronise();
    program(0x10005);
    expect(F_BYE, 0);
    ends(pid);
    pid = begin();
    deaf_program(0x10001);
    ends(pid);
    return 0;
}
