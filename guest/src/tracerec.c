/* Records of a trace, and the arguments that are copied into them. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "tracer.h"

enum { RECORDS_HIGH = 256 * 1024, RECORDS_LOW = 64 * 1024, RECORDS_VERSION = 1 };

static struct {
    int fd;
    struct writer out;
    size_t sent;   /* of out */
    size_t begun;  /* where the record that is being written begins */
    bool dropping, ending;
    uint64_t lost;
} records = {.fd = -1};

uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* ---- copies of arguments ---- */

static void put_copy(struct tracee *t, const struct capture *c, const void *data, size_t size, int flags) {
    write_u8(&t->data, c->arg);
    write_u8(&t->data, c->kind);
    write_u8(&t->data, (uint8_t)flags);
    write_u32(&t->data, (uint32_t)size);
    write_bytes(&t->data, data, size);
    t->captured++;
}

/* The string at `from` up to its NUL; *cut if it goes on after `size` bytes, *fault if it could not be read to its end. */
static size_t copy_in_text(pid_t tid, uint64_t from, char *to, size_t size, int *flags) {
    size_t got = 0;
    while (got < size) {
        size_t want = 256 - (from + got) % 256; /* most are short */
        if (want > size - got)
            want = size - got;
        size_t n = tracee_read(tid, from + got, to + got, want);
        char *end = n ? memchr(to + got, 0, n) : NULL;
        if (end)
            return (size_t)(end - to);
        got += n;
        if (n < want) {
            *flags = COPY_FAULT;
            return got;
        }
    }
    *flags = COPY_CUT;
    return got;
}

static void copy_text(struct tracee *t, const struct capture *c, uint64_t from) {
    char text[TRACE_STRING];
    int flags = 0;
    size_t size = copy_in_text(t->tid, from, text, sizeof text, &flags);
    put_copy(t, c, text, size, flags);
}

static void copy_bytes(struct tracee *t, const struct capture *c, uint64_t from, uint64_t size, size_t most) {
    uint8_t bytes[TRACE_STRING];
    int flags = size > most ? COPY_CUT : 0;
    size_t want = size > most ? most : (size_t)size;
    size_t n = tracee_read(t->tid, from, bytes, want);
    put_copy(t, c, bytes, n, n < want ? COPY_FAULT : flags);
}

/* Strings, each with its NUL. */
static void copy_vector(struct tracee *t, const struct capture *c, uint64_t from) {
    char text[TRACE_VECTOR_TEXT];
    struct writer all = {0};
    int flags = COPY_CUT;
    for (int i = 0; i <= TRACE_VECTOR; i++) {
        uint64_t at = 0;
        int cut = 0;
        if (tracee_read(t->tid, from + 8 * (uint64_t)i, &at, sizeof at) != sizeof at) {
            flags = COPY_FAULT;
            break;
        }
        if (at == 0 || i == TRACE_VECTOR) {
            flags = at ? COPY_CUT : 0;
            break;
        }
        size_t size = copy_in_text(t->tid, at, text, sizeof text, &cut);
        write_bytes(&all, text, size);
        write_u8(&all, 0);
    }
    if (!all.bad)
        put_copy(t, c, all.data, all.used, flags);
    writer_free(&all);
}

void capture_in(struct tracee *t, const struct asked *a) {
    const struct call *call = &a->calls[t->nr];
    t->captured = 0;
    t->data.used = 0;
    t->data.bad = false;
    for (int i = 0; i < call->count; i++) {
        const struct capture *c = &call->captures[i];
        uint64_t at = t->args[c->arg];
        if (at == 0)
            continue;
        if (c->kind == 's')
            copy_text(t, c, at);
        else if (c->kind == 'v')
            copy_vector(t, c, at);
        else if (c->kind == 'b')
            copy_bytes(t, c, at, t->args[c->size], a->bytes);
        else if (c->kind == 'a')
            copy_bytes(t, c, at, (uint32_t)t->args[c->size], TRACE_STRUCT);
        else if (c->kind == 'f')
            copy_bytes(t, c, at, c->size, TRACE_STRUCT);
    }
}

void capture_out(struct tracee *t, const struct asked *a, int64_t result) {
    const struct call *call = &a->calls[t->nr];
    for (int i = 0; i < call->count && result >= 0; i++) {
        const struct capture *c = &call->captures[i];
        uint64_t at = t->args[c->arg];
        uint32_t size = 0;
        if (at == 0)
            continue;
        if (c->kind == 'B')
            copy_bytes(t, c, at, (uint64_t)result, a->bytes);
        else if (c->kind == 'A' && t->args[c->size] && tracee_read(t->tid, t->args[c->size], &size, 4) == 4)
            copy_bytes(t, c, at, size, TRACE_STRUCT);
        else if (c->kind == 'F')
            copy_bytes(t, c, at, c->size, TRACE_STRUCT);
    }
}

/* ---- the words of the operation ---- */

static bool number(const char **at, uint32_t limit, uint32_t *out) {
    uint32_t v = 0;
    if (**at < '0' || **at > '9')
        return false;
    for (; **at >= '0' && **at <= '9'; ++*at)
        if ((v = v * 10 + (uint32_t)(**at - '0')) > limit)
            return false;
    *out = v;
    return true;
}

/* NR, or NR:ARG KIND [SIZE],... */
static bool parse_call(struct asked *a, const char *at) {
    uint32_t nr, v;
    if (!number(&at, TRACE_CALLS - 1, &nr))
        return false;
    struct call *call = &a->calls[nr];
    call->wanted = true;
    for (char before = ':'; *at; before = ',') {
        if (*at++ != before || call->count == 6 || !number(&at, 5, &v))
            return false;
        struct capture *c = &call->captures[call->count++];
        c->arg = (uint8_t)v;
        c->kind = (uint8_t)*at;
        if (!*at || !strchr("svbBaAfF", *at++))
            return false;
        bool takes = c->kind != 's' && c->kind != 'v' && c->kind != 'B';
        if (takes && !number(&at, c->kind == 'f' || c->kind == 'F' ? TRACE_STRUCT : 5, &v))
            return false;
        c->size = takes ? (uint16_t)v : 0;
    }
    return true;
}

bool asked_parse(struct asked *a, char *const *words) {
    bool said = false;
    a->bytes = 64;
    a->stall = 30000;
    a->mode = words ? TRACE_ALL : TRACE_NONE;
    for (; words && *words; words++) {
        const char *w = *words;
        if (!strcmp(w, "filter") || !strcmp(w, "stops") || !strcmp(w, "all")) {
            a->mode = *w == 'f' ? TRACE_FILTER : *w == 's' ? TRACE_STOPS : TRACE_ALL;
            said = true;
        } else if (!strncmp(w, "bytes=", 6) || !strncmp(w, "stall=", 6)) {
            bool bytes = *w == 'b';
            w += 6;
            if (!number(&w, bytes ? TRACE_STRING : 86400000, bytes ? &a->bytes : &a->stall) || *w)
                return false;
        } else if (!parse_call(a, w)) {
            return false;
        } else if (!said) {
            a->mode = TRACE_FILTER;
        }
    }
    return true;
}

/* ---- records ---- */

static void head(int kind, const struct tracee *t, uint64_t now) {
    records.begun = records.out.used;
    write_u32(&records.out, 0);
    write_u8(&records.out, (uint8_t)kind);
    write_u32(&records.out, t ? (uint32_t)t->tgid : 0);
    write_u32(&records.out, t ? (uint32_t)t->tid : 0);
    write_u64(&records.out, now);
}

static bool begin(int kind, const struct tracee *t, uint64_t now) {
    if (records.fd < 0 || records.ending)
        return false;
    if (records.dropping) {
        records.lost++;
        return false;
    }
    head(kind, t, now);
    return true;
}

static void end(void) {
    if (records.out.bad) {
        /* Memory is out: this one is lost, those before it are whole. */
        records.out.bad = false;
        records.out.used = records.begun;
        records.lost++;
        return;
    }
    uint32_t size = (uint32_t)(records.out.used - records.begun - 4);
    for (int i = 0; i < 4; i++)
        records.out.data[records.begun + (size_t)i] = (uint8_t)(size >> 8 * i);
}

void records_open(int fd) {
    struct timespec wall;
    records.fd = fd;
    uint64_t now = now_ns();
    clock_gettime(CLOCK_REALTIME, &wall);
    if (!begin(REC_HELLO, NULL, now))
        return;
    write_u32(&records.out, RECORDS_VERSION);
    write_u64(&records.out, (uint64_t)wall.tv_sec * 1000000000u + (uint64_t)wall.tv_nsec);
    end();
}

void records_call(const struct tracee *t, bool finished, int64_t result, uint64_t now) {
    if (!begin(REC_CALL, t, t->start))
        return;
    write_u64(&records.out, now - t->start);
    write_u8(&records.out, finished ? 0 : CALL_UNFINISHED);
    write_u32(&records.out, t->nr);
    write_u64(&records.out, (uint64_t)result);
    for (int i = 0; i < 6; i++)
        write_u64(&records.out, t->args[i]);
    write_u8(&records.out, t->data.bad ? 0 : t->captured);
    if (!t->data.bad)
        write_bytes(&records.out, t->data.data, t->data.used);
    end();
}

void records_signal(const struct tracee *t, int number_of, int code, uint32_t sender, uint64_t now) {
    if (!begin(REC_SIGNAL, t, now))
        return;
    write_u32(&records.out, (uint32_t)number_of);
    write_u32(&records.out, (uint32_t)code);
    write_u32(&records.out, sender);
    end();
}

void records_stop(const struct tracee *t, int number_of, uint64_t now) {
    if (!begin(REC_STOP, t, now))
        return;
    write_u32(&records.out, (uint32_t)number_of);
    end();
}

void records_exit(const struct tracee *t, int status, uint64_t now) {
    if (!begin(REC_EXIT, t, now))
        return;
    write_u8(&records.out, WIFSIGNALED(status));
    write_u32(&records.out, (uint32_t)(WIFSIGNALED(status) ? WTERMSIG(status) : WEXITSTATUS(status)));
    end();
}

void records_new(const struct tracee *t, pid_t tgid, pid_t tid, uint64_t now) {
    if (!begin(REC_NEW, t, now))
        return;
    write_u32(&records.out, (uint32_t)tgid);
    write_u32(&records.out, (uint32_t)tid);
    end();
}

void records_exec(const struct tracee *t, pid_t former, const char *name, uint64_t now) {
    if (!begin(REC_EXEC, t, now))
        return;
    write_u32(&records.out, (uint32_t)former);
    write_string(&records.out, name);
    end();
}

static void shut(void) {
    close(records.fd);
    records.fd = -1;
    writer_free(&records.out);
    records.sent = 0;
}

void records_end(void) { records.ending = true; }
bool records_closed(void) { return records.fd < 0 || records.ending; }
bool records_full(void) { return !records.dropping && records.out.used - records.sent >= RECORDS_HIGH; }
void records_give_up(void) { records.dropping = true; }
int records_fd(void) { return records.fd; }

bool records_flush(void) {
    while (records.fd >= 0 && records.sent < records.out.used) {
        ssize_t n = write(records.fd, records.out.data + records.sent, records.out.used - records.sent);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0 && errno == EAGAIN)
            break;
        if (n < 0) {
            shut(); /* whoever read them has gone */
            return false;
        }
        records.sent += (size_t)n;
    }
    if (records.fd < 0)
        return false;
    size_t left = records.out.used - records.sent;
    if (records.sent) {
        memmove(records.out.data, records.out.data + records.sent, left);
        records.out.used = left;
        records.sent = 0;
    }
    if (records.lost && left < RECORDS_LOW) {
        uint64_t lost = records.lost;
        records.dropping = false;
        head(REC_LOST, NULL, now_ns());
        write_u64(&records.out, lost);
        end();
        records.lost -= lost; /* one more, if memory is out */
        return true;
    }
    if (records.ending && left == 0)
        shut();
    return left > 0;
}
