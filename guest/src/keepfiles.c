#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "keep.h"

static void log_path(const struct logfile *log, const char *suffix, char path[64]) {
    snprintf(path, 64, "logs/%s.log%s", log->name, suffix);
}

static void open_file(struct keeper *k, struct logfile *log, int flags) {
    char path[64];
    struct stat st;
    log_path(log, "", path);
    log->file = openat(k->folder, path, O_WRONLY | O_CREAT | O_APPEND | O_NOFOLLOW | O_CLOEXEC | flags, 0600);
    log->size = log->file >= 0 && fstat(log->file, &st) == 0 ? (uint64_t)st.st_size : 0;
}

static void log_readable(struct watch *w, uint32_t events) {
    (void)events;
    ((struct logfile *)w)->readable = true;
}

bool keepfiles_open_log(struct keeper *k, struct logfile *log, const char *name, uint64_t cap) {
    if (!*name || strlen(name) >= sizeof log->name || strspn(name, "abcdefghijklmnopqrstuvwxyz0123456789-") != strlen(name))
        return false;
    strcpy(log->name, name);
    log->cap = cap;
    log->readable = true;
    log->watch = (struct watch){.fd = -1, .on = log_readable};
    if (mkdirat(k->folder, "logs", 0700) < 0 && errno != EEXIST)
        return false;
    open_file(k, log, 0);
    return log->file >= 0;
}

static void rotate(struct keeper *k, struct logfile *log) {
    char path[64], old[64];
    log_path(log, "", path);
    log_path(log, ".1", old);
    if (log->file >= 0)
        close(log->file);
    if (renameat(k->folder, path, k->folder, old) < 0)
        unlinkat(k->folder, path, 0); /* the cap holds whatever happens to the old part */
    open_file(k, log, 0);
}

void keepfiles_log(struct keeper *k, struct logfile *log, const void *data, size_t size) {
    const uint8_t *at = data;
    while (size > 0) {
        if (log->size >= log->cap)
            rotate(k, log);
        if (log->file < 0)
            open_file(k, log, 0); /* the disk was full before */
        size_t n = log->size < log->cap && size > log->cap - log->size ? (size_t)(log->cap - log->size) : size;
        ssize_t wrote = log->file < 0 ? -1 : write(log->file, at, n);
        if (wrote <= 0)
            return; /* a full disk costs log lines, nothing else */
        log->size += (uint64_t)wrote;
        at += wrote;
        size -= (size_t)wrote;
    }
}

bool keepfiles_serve(struct keeper *k) {
    static uint8_t chunk[16 * 1024];
    bool more = false;
    for (size_t i = 0; i < k->log_count; i++) {
        struct logfile *log = &k->logs[i];
        if (!log->readable || log->watch.fd < 0)
            continue;
        ssize_t n = read(log->watch.fd, chunk, sizeof chunk);
        if (n > 0) {
            keepfiles_log(k, log, chunk, (size_t)n);
            more = true;
        } else if (n == 0 || (errno != EAGAIN && errno != EINTR)) {
            loop_close(&log->watch);
        } else {
            log->readable = errno == EINTR;
        }
    }
    return more;
}

static unsigned long long start_time(void) {
    char text[512];
    int fd = open("/proc/self/stat", O_RDONLY | O_CLOEXEC);
    ssize_t n = fd < 0 ? -1 : read(fd, text, sizeof text - 1);
    if (fd >= 0)
        close(fd);
    if (n <= 0)
        return 0;
    text[n] = 0;
    char *at = strrchr(text, ')'); /* proc(5): field 22; the name before it may hold anything */
    for (int field = 2; at && field < 22; field++)
        at = strchr(at + 1, ' ');
    return at ? strtoull(at + 1, NULL, 10) : 0;
}

/* Write name aside, to disk, and rename it into place. */
static bool write_record(const struct keeper *k, const char *name, const char *text, size_t size) {
    char aside[32];
    snprintf(aside, sizeof aside, "%s.new", name);
    int fd = openat(k->folder, aside, O_WRONLY | O_CREAT | O_TRUNC | O_NOFOLLOW | O_CLOEXEC, 0600);
    bool good = fd >= 0 && write(fd, text, size) == (ssize_t)size && fsync(fd) == 0;
    if (fd >= 0)
        close(fd);
    if (good && renameat(k->folder, aside, k->folder, name) == 0)
        return fsync(k->folder) == 0 || errno == EINVAL;
    unlinkat(k->folder, aside, 0);
    return false;
}

bool keepfiles_write_pid(const struct keeper *k) {
    char text[64];
    int n = snprintf(text, sizeof text, "%d %llu\n", (int)getpid(), start_time());
    /* Not to disk: after a crash of the host it means nothing. Aside all the same, so that it is never half. */
    int fd = openat(k->folder, "keeper.new", O_WRONLY | O_CREAT | O_TRUNC | O_NOFOLLOW | O_CLOEXEC, 0600);
    bool good = fd >= 0 && write(fd, text, (size_t)n) == n && renameat(k->folder, "keeper.new", k->folder, "keeper") == 0;
    if (fd >= 0)
        close(fd);
    return good;
}

void keepfiles_write_exit(struct keeper *k) {
    char text[512];
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    bool signaled = WIFSIGNALED(k->engine_status);
    int n = snprintf(text, sizeof text, "how=%s\nvalue=%d\nreason=%s\nended_ns=%lld\n", signaled ? "signaled" : "exited",
                     signaled ? WTERMSIG(k->engine_status) : WEXITSTATUS(k->engine_status), k->reason,
                     (long long)now.tv_sec * 1000000000 + now.tv_nsec);
    if (k->mux.bye)
        n += snprintf(text + n, sizeof text - (size_t)n, "bye=%u\n", k->mux.bye_status);
    if (write_record(k, "exit", text, (size_t)n))
        return;
    /* A full disk: how the machine ended is worth more than its logs. */
    for (size_t i = 0; i < k->log_count; i++)
        if (k->logs[i].file >= 0 && ftruncate(k->logs[i].file, 0) == 0)
            k->logs[i].size = 0;
    struct logfile *rest[] = {&k->init_log, &k->program_log};
    for (size_t i = 0; i < sizeof rest / sizeof *rest; i++)
        if (rest[i]->file >= 0 && ftruncate(rest[i]->file, 0) == 0)
            rest[i]->size = 0;
    write_record(k, "exit", text, (size_t)n);
}
