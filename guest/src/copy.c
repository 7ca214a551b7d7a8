/* tvinit copy FROM TO: the files below the folder FROM into the empty folder TO, as they are: owners, rights, times, extended attributes,
 * hard links, holes, whiteouts. A machine's writable layer is copied so when it is frozen: FROM is what a guest wrote, so nothing is
 * looked up by more than one name at a time and no link is followed. Sockets are left out; there are no other devices than whiteouts in it. */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/xattr.h>
#include <unistd.h>

#include "modes.h"

enum { DEPTH_MAX = 2000, SMALL = 1 << 16, NAMES = 1 << 16, LINKS_MAX = 1 << 24 };

/* The first name in TO of a file that has several. */
struct link {
    dev_t dev;
    ino_t ino;
    char *path;
};

struct copy {
    int top; /* TO */
    struct link *links;
    size_t used, size; /* size: a power of two */
    char path[PATH_MAX]; /* of what is being copied, from TO on */
    char buffer[SMALL], names[NAMES], value[NAMES];
};

static size_t slot_of(const struct copy *c, const struct stat *st) {
    uint64_t hash = ((uint64_t)st->st_ino ^ (uint64_t)st->st_dev << 32) * 0x9e3779b97f4a7c15u;
    size_t at = (size_t)(hash >> 20) & (c->size - 1);
    while (c->links[at].path && (c->links[at].ino != st->st_ino || c->links[at].dev != st->st_dev))
        at = (at + 1) & (c->size - 1);
    return at;
}

static bool grow(struct copy *c) {
    struct copy old = {.links = c->links, .size = c->size};
    if (2 * c->used < c->size)
        return true;
    size_t size = c->size ? 2 * c->size : 1024;
    struct link *links = size > LINKS_MAX ? NULL : calloc(size, sizeof *links);
    if (!links) {
        errno = ENOMEM;
        return false;
    }
    c->links = links;
    c->size = size;
    for (size_t i = 0; i < old.size; i++)
        if (old.links[i].path)
            c->links[slot_of(c, &(struct stat){.st_dev = old.links[i].dev, .st_ino = old.links[i].ino})] = old.links[i];
    free(old.links);
    return true;
}

/* 1: it is another name of a file that is there, and now is; 0: it is not; -1 with errno. */
static int linked(struct copy *c, const struct stat *st, int to, const char *name) {
    if (st->st_nlink < 2)
        return 0;
    if (!grow(c))
        return -1;
    struct link *found = &c->links[slot_of(c, st)];
    if (found->path)
        return linkat(c->top, found->path, to, name, 0) < 0 ? -1 : 1;
    *found = (struct link){st->st_dev, st->st_ino, strdup(c->path)};
    c->used += found->path != NULL;
    return found->path ? 0 : -1;
}

static bool write_all(int fd, const char *data, size_t size, off_t at) {
    while (size) {
        ssize_t n = pwrite(fd, data, size, at);
        if (n < 0)
            return false;
        data += n;
        size -= (size_t)n;
        at += n;
    }
    return true;
}

/* Bytes from start to end; one that became shorter since has what it has. */
static bool copy_range(struct copy *c, int from, int to, off_t start, off_t end) {
    bool whole = end - start > SMALL;
    while (start < end) {
        off_t in = start, out = start;
        ssize_t n = whole ? copy_file_range(from, &in, to, &out, (size_t)(end - start), 0) : -1;
        if (n < 0) {
            whole = false; /* not between these two */
            n = pread(from, c->buffer, end - start < SMALL ? (size_t)(end - start) : SMALL, start);
            if (n < 0 || !write_all(to, c->buffer, (size_t)n, start))
                return false;
        }
        if (n == 0)
            return true;
        start += n;
    }
    return true;
}

static bool copy_data(struct copy *c, int from, int to, const struct stat *st) {
    if ((off_t)st->st_blocks * 512 >= st->st_size)
        return copy_range(c, from, to, 0, st->st_size);
    if (ftruncate(to, st->st_size) < 0)
        return false;
    for (off_t at = 0; at < st->st_size;) {
        off_t start = lseek(from, at, SEEK_DATA);
        off_t end = start < 0 ? -1 : lseek(from, start, SEEK_HOLE);
        if (start < 0)
            return errno == ENXIO; /* holes from there on */
        if (end < 0 || !copy_range(c, from, to, start, end < st->st_size ? end : st->st_size))
            return false;
        at = end;
    }
    return true;
}

static bool copy_attributes(struct copy *c, int from, int to) {
    ssize_t size = flistxattr(from, c->names, sizeof c->names);
    if (size < 0)
        return errno == EOPNOTSUPP;
    for (const char *name = c->names; name < c->names + size; name += strlen(name) + 1) {
        ssize_t n = fgetxattr(from, name, c->value, sizeof c->value);
        if (n < 0 && errno == ENODATA)
            continue;
        /* What a security module of this host's put on it is that module's. */
        if ((n < 0 || fsetxattr(to, name, c->value, (size_t)n, 0) < 0) && (strncmp(name, "security.", 9) || !strcmp(name, "security.capability")))
            return false;
    }
    return true;
}

/* Last, since a change of the owner takes rights and capabilities away, and every write the times. */
static bool dress(struct copy *c, int from, int to, const struct stat *st) {
    struct timespec times[] = {st->st_atim, st->st_mtim};
    return fchown(to, st->st_uid, st->st_gid) == 0 && copy_attributes(c, from, to) && fchmod(to, st->st_mode & 07777) == 0 && futimens(to, times) == 0;
}

/* errno stays. */
static void close_both(int in, int out) {
    int saved = errno;
    if (out >= 0)
        close(out);
    close(in);
    errno = saved;
}

static bool copy_file(struct copy *c, int from, int to, const char *name, struct stat *st) {
    int in = openat(from, name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
    if (in < 0)
        return false;
    int out = -1;
    bool good = fstat(in, st) == 0 && S_ISREG(st->st_mode) && (out = openat(to, name, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600)) >= 0 &&
                copy_data(c, in, out, st) && dress(c, in, out, st);
    close_both(in, out);
    return good;
}

/* What has no data: a symbolic link, a FIFO, a whiteout. */
static bool copy_node(int from, int to, const char *name, const struct stat *st) {
    struct timespec times[] = {st->st_atim, st->st_mtim};
    bool symbolic = S_ISLNK(st->st_mode);
    if (symbolic) {
        char target[PATH_MAX];
        ssize_t n = readlinkat(from, name, target, sizeof target - 1);
        if (n < 0)
            return false;
        target[n] = 0;
        if (symlinkat(target, to, name) < 0)
            return false;
    } else if (mknodat(to, name, (st->st_mode & S_IFMT) | 0600, 0) < 0) {
        return false;
    }
    return fchownat(to, name, st->st_uid, st->st_gid, AT_SYMLINK_NOFOLLOW) == 0 &&
           (symbolic || fchmodat(to, name, st->st_mode & 07777, 0) == 0) && utimensat(to, name, times, AT_SYMLINK_NOFOLLOW) == 0;
}

static bool copy_folder(struct copy *c, int from, int to, size_t used, int depth);

static bool copy_below(struct copy *c, int from, int to, const char *name, size_t used, int depth) {
    struct stat st;
    int in = openat(from, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (in < 0)
        return false;
    int out = -1;
    c->path[used] = '/';
    c->path[used + 1] = 0;
    bool good = mkdirat(to, name, 0700) == 0 && (out = openat(to, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC)) >= 0 && fstat(in, &st) == 0 &&
                copy_folder(c, in, out, used + 1, depth + 1) && dress(c, in, out, &st);
    close_both(in, out);
    return good;
}

static bool copy_entry(struct copy *c, int from, int to, const char *name, size_t used, int depth) {
    struct stat st;
    if (fstatat(from, name, &st, AT_SYMLINK_NOFOLLOW) < 0)
        return false;
    if (S_ISSOCK(st.st_mode) || S_ISBLK(st.st_mode) || (S_ISCHR(st.st_mode) && st.st_rdev))
        return true;
    if (S_ISDIR(st.st_mode))
        return copy_below(c, from, to, name, used, depth);
    int done = linked(c, &st, to, name);
    if (done)
        return done > 0;
    return S_ISREG(st.st_mode) ? copy_file(c, from, to, name, &st) : copy_node(from, to, name, &st);
}

/* used: bytes of c->path that name the folder, with a slash at their end unless it is the first. */
static bool copy_folder(struct copy *c, int from, int to, size_t used, int depth) {
    int again = openat(from, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *folder = again < 0 ? NULL : fdopendir(again);
    if (!folder) {
        if (again >= 0)
            close(again);
        return false;
    }
    bool good = true;
    for (struct dirent *entry; good;) {
        errno = 0;
        if (!(entry = readdir(folder))) {
            good = errno == 0;
            break;
        }
        if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, ".."))
            continue;
        int n = snprintf(c->path + used, sizeof c->path - used, "%s", entry->d_name);
        if (n < 0 || used + (size_t)n + 2 > sizeof c->path || depth > DEPTH_MAX) {
            errno = ENAMETOOLONG;
            good = false;
            break;
        }
        good = copy_entry(c, from, to, entry->d_name, used + (size_t)n, depth);
    }
    int saved = errno;
    closedir(folder);
    errno = saved;
    return good;
}

int copy_main(int argc, char **argv) {
    static struct copy c;
    struct rlimit files;
    struct stat st;
    if (argc != 2) {
        fprintf(stderr, "usage: tvinit copy FROM TO\n");
        return 2;
    }
    if (getrlimit(RLIMIT_NOFILE, &files) == 0) {
        files.rlim_cur = files.rlim_max;
        setrlimit(RLIMIT_NOFILE, &files); /* three for each folder in a folder */
    }
    umask(0);
    int from = open(argv[0], O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    c.top = open(argv[1], O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (from < 0 || c.top < 0 || fstat(from, &st) < 0 || !copy_folder(&c, from, c.top, 0, 0) || !dress(&c, from, c.top, &st)) {
        fprintf(stderr, "tvinit copy: %s: %s\n", c.path, strerror(errno));
        return 1;
    }
    return 0;
}
