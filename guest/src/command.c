#include "command.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

#include "line.h"
#include "program.h"
#include "request.h"
#include "stream.h"
#include "wire.h"

static struct command *commands;
static size_t count;

struct command *command_of(uint32_t stream) {
    struct command *c = commands;
    while (c && !(c->attached && c->stream == stream))
        c = c->next;
    return c;
}

size_t command_count(void) { return count; }

struct command *command_add(uint32_t stream, uint32_t flags, pid_t pid, int in, int out, int err) {
    struct command *c = calloc(1, sizeof *c);
    if (!c)
        return NULL;
    *c = (struct command){.next = commands, .stream = stream, .flags = flags, .attached = true, .pid = pid};
    bool pty = flags & EXEC_PTY;
    sink_open(&c->in, c, in, pty);
    source_open(&c->out, c, out, CH_STDOUT, pty);
    source_open(&c->err, c, err, CH_STDERR, false);
    c->trace.watch.fd = -1;
    commands = c;
    count++;
    return c;
}

void command_trace(struct command *c, int fd) { source_open(&c->trace, c, fd, CH_TRACE, false); }

static void detach(struct command *c) {
    c->attached = false;
    source_wake(&c->out);
    source_wake(&c->err);
    source_wake(&c->trace);
}

void command_data(const struct frame *f) {
    struct reader r = reader_of(f->payload, f->length);
    uint8_t channel = read_u8(&r);
    struct command *c = command_of(f->stream);
    if (!c || r.bad || channel != CH_STDIN)
        return;
    if (sink_take(&c->in, r.at, r.left))
        return;
    /* More than was granted: this client's command dies, the others know nothing of it. */
    line_error(c->stream, EPROTO, "more data than was granted");
    detach(c);
    if (!c->ended)
        kill(-c->pid, SIGKILL);
}

void command_window(const struct frame *f) {
    struct reader r = reader_of(f->payload, f->length);
    uint8_t channel = read_u8(&r);
    uint32_t more = read_u32(&r);
    struct command *c = command_of(f->stream);
    if (!c || !reader_done(&r))
        return;
    if (channel == CH_STDOUT)
        source_grant(&c->out, more);
    else if (channel == CH_STDERR)
        source_grant(&c->err, more);
    else if (channel == CH_TRACE)
        source_grant(&c->trace, more);
}

void command_signal(const struct frame *f) {
    struct reader r = reader_of(f->payload, f->length);
    uint32_t number = read_u32(&r);
    bool group = read_u8(&r);
    struct command *c = command_of(f->stream);
    /* After the first process has been reaped its number may be another's. */
    if (!c || c->ended || !reader_done(&r) || number == 0 || number > 64)
        return;
    kill(group ? -c->pid : c->pid, (int)number);
}

void command_resize(const struct frame *f) {
    struct reader r = reader_of(f->payload, f->length);
    struct winsize size = {.ws_row = read_u16(&r)};
    size.ws_col = read_u16(&r);
    struct command *c = command_of(f->stream);
    if (c && reader_done(&r) && c->out.pty && c->out.watch.fd >= 0)
        ioctl(c->out.watch.fd, TIOCSWINSZ, &size);
}

void command_gone(uint32_t slot) {
    for (struct command *c = commands; c; c = c->next) {
        if (!c->attached || c->stream >> 16 != slot)
            continue;
        detach(c);
        if (!c->ended && !(c->flags & EXEC_DETACH))
            kill(-c->pid, SIGKILL);
    }
}

void command_detach_all(void) {
    for (struct command *c = commands; c; c = c->next) {
        if (!c->attached)
            continue;
        detach(c);
        if (!c->ended && c->flags & EXEC_BUILTIN)
            kill(-c->pid, SIGKILL);
    }
}

void command_kill_all(int number) {
    for (struct command *c = commands; c; c = c->next)
        if (!c->ended)
            kill(-c->pid, number);
}

static void mark_ended(struct command *c) {
    c->ended = true;
    sink_close(&c->in);
    source_last(&c->out);
    source_last(&c->err);
}

bool command_reap(void) {
    for (;;) {
        int status;
        struct rusage usage;
        pid_t pid = wait4(-1, &status, WNOHANG, &usage);
        if (pid <= 0)
            return pid == 0;
        program_ended(pid, status);
        for (struct command *c = commands; c; c = c->next) {
            if (c->ended || c->pid != pid)
                continue;
            c->status = status;
            c->usage = usage;
            mark_ended(c);
            break;
        }
    }
}

static uint64_t microseconds(struct timeval t) { return (uint64_t)t.tv_sec * 1000000 + (uint64_t)t.tv_usec; }

static void send_exited(const struct command *c) {
    struct writer w = {0};
    write_u8(&w, WIFSIGNALED(c->status));
    write_u32(&w, (uint32_t)(WIFSIGNALED(c->status) ? WTERMSIG(c->status) : WEXITSTATUS(c->status)));
    write_u64(&w, microseconds(c->usage.ru_utime));
    write_u64(&w, microseconds(c->usage.ru_stime));
    write_u64(&w, (uint64_t)c->usage.ru_maxrss);
    if (!w.bad)
        line_send(F_EXITED, c->stream, w.data, w.used);
    writer_free(&w);
}

bool command_pump(void) { return source_pump(); }

static bool source_open_yet(const struct source *s) { return s->watch.fd >= 0 || s->queued; }

void command_bury(void) {
    for (struct command **at = &commands; *at;) {
        struct command *c = *at;
        if (!c->ended || source_open_yet(&c->out) || source_open_yet(&c->err) || source_open_yet(&c->trace)) {
            at = &c->next;
            continue;
        }
        if (c->attached)
            send_exited(c);
        *at = c->next;
        count--;
        free(c);
    }
}
