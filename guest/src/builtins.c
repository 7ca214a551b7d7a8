#include "builtins.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

int complain(const char *what) {
    int error = errno ? errno : EIO;
    dprintf(STDERR_FILENO, "%s: %s\n", what, strerror(error));
    return error;
}

int write_all(int fd, const void *data, size_t size) {
    for (const char *p = data; size > 0;) {
        ssize_t n = write(fd, p, size);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return errno;
        p += n;
        size -= (size_t)n;
    }
    return 0;
}

int read_all(int fd, void *data, size_t size) {
    for (char *p = data; size > 0;) {
        ssize_t n = read(fd, p, size);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return n < 0 ? errno : EPIPE;
        p += n;
        size -= (size_t)n;
    }
    return 0;
}

int copy_bytes(int from, int to, uint64_t size, uint64_t *copied) {
    static char buffer[COPY_SIZE]; /* touched only in children that copy */
    uint64_t done = 0;
    int error = 0;
    while (!error && done < size) {
        size_t want = size - done < sizeof buffer ? (size_t)(size - done) : sizeof buffer;
        ssize_t n = read(from, buffer, want);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            error = errno;
        if (n <= 0)
            break;
        error = write_all(to, buffer, (size_t)n);
        done += (uint64_t)n;
    }
    if (copied)
        *copied = done;
    return error;
}

static void write_stat(struct writer *w, const struct stat *st, const char *target) {
    write_u32(w, st->st_mode);
    write_u64(w, (uint64_t)st->st_size);
    write_u32(w, st->st_uid);
    write_u32(w, st->st_gid);
    write_u64(w, (uint64_t)st->st_mtim.tv_sec * 1000000000u + (uint64_t)st->st_mtim.tv_nsec);
    write_string(w, target);
}

static int flush_record(struct writer *w) {
    int error = w->bad ? ENOMEM : write_all(STDOUT_FILENO, w->data, w->used);
    w->used = 0;
    return error;
}

/* The record of `name` in folder `dir`. */
static int describe(struct writer *w, int dir, const char *name, int flags) {
    struct stat st;
    char target[PATH_MAX] = "";
    if (fstatat(dir, name, &st, flags) < 0)
        return -1;
    if (S_ISLNK(st.st_mode)) {
        ssize_t n = readlinkat(dir, name, target, sizeof target - 1);
        target[n < 0 ? 0 : n] = 0;
    }
    write_stat(w, &st, target);
    return 0;
}

static int stat_path(const char *path, int flags) {
    struct writer w = {0};
    if (describe(&w, AT_FDCWD, path, flags) < 0)
        return complain(path);
    return flush_record(&w);
}

static int do_stat(char **argv) { return stat_path(argv[1], 0); }
static int do_lstat(char **argv) { return stat_path(argv[1], AT_SYMLINK_NOFOLLOW); }

static int do_list(char **argv) {
    DIR *dir = opendir(argv[1]);
    if (!dir)
        return complain(argv[1]);
    struct writer w = {0};
    int error = 0;
    for (struct dirent *e; !error && (errno = 0, e = readdir(dir));) {
        if (!strcmp(e->d_name, ".") || !strcmp(e->d_name, ".."))
            continue;
        size_t before = w.used;
        write_string(&w, e->d_name);
        if (describe(&w, dirfd(dir), e->d_name, AT_SYMLINK_NOFOLLOW) < 0)
            w.used = before; /* removed since: not there */
        if (w.used > COPY_SIZE)
            error = flush_record(&w);
    }
    if (!error && errno)
        return complain(argv[1]);
    return error ? error : flush_record(&w);
}

static int do_read(char **argv) {
    char *end;
    errno = 0;
    long long offset = strtoll(argv[2], &end, 10);
    long long length = strtoll(argv[3], &end, 10);
    if (errno || offset < 0 || length < -1)
        return errno = EINVAL, complain("read");
    int fd = open(argv[1], O_RDONLY | O_CLOEXEC);
    struct stat st;
    if (fd < 0 || fstat(fd, &st) < 0)
        return complain(argv[1]);
    if (S_ISDIR(st.st_mode))
        return errno = EISDIR, complain(argv[1]);
    if (offset && lseek(fd, offset, SEEK_SET) < 0)
        return complain(argv[1]);
    int error = copy_bytes(fd, STDOUT_FILENO, length < 0 ? UINT64_MAX : (uint64_t)length, NULL);
    return error ? (errno = error, complain(argv[1])) : 0;
}

/* mkdir -p of what comes before the last slash. */
static int make_parents(char *path) {
    for (char *slash = strchr(path + 1, '/'); slash; slash = strchr(slash + 1, '/')) {
        *slash = 0;
        int failed = mkdir(path, 0755) < 0 && errno != EEXIST;
        *slash = '/';
        if (failed)
            return -1;
    }
    return 0;
}

static int do_write(char **argv) {
    const char *flags = argv[3];
    mode_t mode = (mode_t)strtoul(argv[2], NULL, 8) & 07777;
    int how = O_WRONLY | O_CREAT | O_CLOEXEC | (strchr(flags, 'a') ? O_APPEND : O_TRUNC) | (strchr(flags, 'x') ? O_EXCL : 0);
    if (strchr(flags, 'p') && *argv[1] && make_parents(argv[1]) < 0)
        return complain(argv[1]);
    int fd = open(argv[1], how, mode);
    if (fd < 0)
        return complain(argv[1]);
    int error = copy_bytes(STDIN_FILENO, fd, UINT64_MAX, NULL);
    if (!error && close(fd) < 0)
        error = errno;
    return error ? (errno = error, complain(argv[1])) : 0;
}

static int do_mkdir(char **argv) {
    mode_t mode = (mode_t)strtoul(argv[2], NULL, 8) & 07777;
    bool parents = *argv[3] == 'p';
    if (parents && *argv[1] && make_parents(argv[1]) < 0)
        return complain(argv[1]);
    if (mkdir(argv[1], mode) == 0)
        return 0;
    struct stat st;
    if (parents && errno == EEXIST && stat(argv[1], &st) == 0 && S_ISDIR(st.st_mode))
        return 0;
    return complain(argv[1]);
}

/* Remove what is in folder `name` of `parent`, never following a link out of it. Each level holds one
 * descriptor, so a tree deeper than the limit ends in EMFILE, not in a crash. */
static int remove_tree(int parent, const char *name) {
    if (unlinkat(parent, name, 0) == 0)
        return 0;
    if (errno != EISDIR && errno != EPERM)
        return -1;
    int fd = openat(parent, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    DIR *dir = fd < 0 ? NULL : fdopendir(fd);
    if (!dir)
        return -1;
    int failed = 0;
    for (struct dirent *e; !failed && (errno = 0, e = readdir(dir));)
        if (strcmp(e->d_name, ".") && strcmp(e->d_name, ".."))
            failed = remove_tree(fd, e->d_name) < 0 && errno != ENOENT;
    int error = errno;
    closedir(dir);
    errno = error;
    return failed ? -1 : unlinkat(parent, name, AT_REMOVEDIR);
}

static int do_remove(char **argv) {
    int failed = *argv[2] == 'r' ? remove_tree(AT_FDCWD, argv[1]) : remove(argv[1]);
    return failed < 0 ? complain(argv[1]) : 0;
}

static int do_rename(char **argv) { return rename(argv[1], argv[2]) < 0 ? complain(argv[1]) : 0; }
static int do_symlink(char **argv) { return symlink(argv[1], argv[2]) < 0 ? complain(argv[2]) : 0; }

static int do_chmod(char **argv) {
    return chmod(argv[1], (mode_t)strtoul(argv[2], NULL, 8) & 07777) < 0 ? complain(argv[1]) : 0;
}

static const struct {
    const char *name;
    int words;
    int (*run)(char **argv);
} table[] = {
    {"stat", 2, do_stat},     {"lstat", 2, do_lstat},   {"list", 2, do_list},     {"read", 4, do_read},
    {"write", 4, do_write},   {"mkdir", 4, do_mkdir},   {"remove", 3, do_remove}, {"rename", 3, do_rename},
    {"symlink", 3, do_symlink}, {"chmod", 3, do_chmod}, {"put", 2, tree_put},     {"get", 2, tree_get},
    {"stats", 1, stats_main}, {"connect", 3, connect_main}, {"answer", 2, remote_main},
    {"device", 2, device_main}, {"upper", 2, upper_main}, {"program", 1, program_main},
};

int builtin_main(char **argv) {
    int words = 0;
    while (argv[words])
        words++;
    for (size_t i = 0; words > 0 && i < sizeof table / sizeof *table; i++)
        if (!strcmp(table[i].name, argv[0]) && table[i].words == words)
            return table[i].run(argv);
    errno = EINVAL;
    return complain(words ? argv[0] : "builtin");
}
