/* What a machine wrote, as one stream of records (PROTOCOL.md, "upper"): in a helper machine, from a disk of another one, which is
 * hostile. It is mounted where nobody else sees it, and read with descriptors of folders; no link is followed. */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/xattr.h>
#include <unistd.h>

#include "builtins.h"

enum {
    DEPTH_MAX = 512,
    XATTRS_MAX = 64 * 1024,
    PIECES_MAX = 4096, /* of one file; what is beyond them is sent with its holes */
};

static const char *const where = "/reading";
static char out[COPY_SIZE];
static size_t used;

static int flush(void) {
    int error = write_all(STDOUT_FILENO, out, used);
    used = 0;
    return error;
}

static int put(struct writer *w) {
    int error = w->bad ? ENOMEM : 0;
    if (!error && used + w->used > sizeof out)
        error = flush();
    if (!error && w->used > sizeof out) {
        error = write_all(STDOUT_FILENO, w->data, w->used);
    } else if (!error) {
        memcpy(out + used, w->data, w->used);
        used += w->used;
    }
    writer_free(w);
    *w = (struct writer){0};
    return error;
}

/* The attributes of an open file; count first. */
static void put_xattrs(struct writer *w, int fd) {
    static char names[XATTRS_MAX], value[XATTRS_MAX];
    ssize_t size = fd < 0 ? 0 : flistxattr(fd, names, sizeof names);
    uint32_t count = 0;
    struct writer list = {0};
    for (ssize_t at = 0; at < size; at += (ssize_t)strlen(names + at) + 1) {
        ssize_t n = fgetxattr(fd, names + at, value, sizeof value);
        if (n < 0)
            continue;
        write_string(&list, names + at);
        write_u32(&list, (uint32_t)n);
        write_bytes(&list, value, (size_t)n);
        count++;
    }
    write_u32(w, count);
    write_bytes(w, list.data, list.used);
    w->bad |= list.bad;
    writer_free(&list);
}

static void put_head(struct writer *w, char kind, const char *path, const struct stat *st, int fd) {
    write_u8(w, (uint8_t)kind);
    write_string(w, path);
    write_u32(w, st->st_mode & 07777);
    write_u32(w, st->st_uid);
    write_u32(w, st->st_gid);
    write_u64(w, (uint64_t)st->st_mtim.tv_sec);
    write_u64(w, st->st_ino);
    write_u32(w, (uint32_t)st->st_nlink);
    put_xattrs(w, fd);
}

struct piece {
    off_t start, end;
};

/* Where a file has data. */
static size_t find_pieces(int fd, off_t size, struct piece *pieces) {
    size_t count = 0;
    for (off_t at = 0; at < size;) {
        off_t start = lseek(fd, at, SEEK_DATA);
        if (start < 0 && errno == ENXIO)
            break;
        off_t end = start < 0 || count == PIECES_MAX - 1 ? size : lseek(fd, start, SEEK_HOLE);
        if (start < at)
            start = at;
        if (end <= start || end > size)
            end = size;
        if (start >= end)
            break;
        pieces[count++] = (struct piece){start, end};
        at = end;
    }
    return count;
}

static int put_piece(int fd, struct piece piece) {
    int error = 0;
    while (!error && piece.start < piece.end) {
        if (used == sizeof out && (error = flush()))
            break;
        size_t want = sizeof out - used;
        if ((off_t)want > piece.end - piece.start)
            want = (size_t)(piece.end - piece.start);
        ssize_t n = pread(fd, out + used, want, piece.start);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return n < 0 ? errno : EIO; /* nobody writes to it, so it cannot have become shorter */
        used += (size_t)n;
        piece.start += n;
    }
    return error;
}

static int put_file(int parent, const char *name, const char *path) {
    static struct piece pieces[PIECES_MAX];
    struct stat st;
    int fd = openat(parent, name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
    if (fd < 0 || fstat(fd, &st) < 0)
        return complain(path);
    size_t count = find_pieces(fd, st.st_size, pieces);
    struct writer w = {0};
    put_head(&w, 'f', path, &st, fd);
    write_u64(&w, (uint64_t)st.st_size);
    write_u32(&w, (uint32_t)count);
    for (size_t i = 0; i < count; i++) {
        write_u64(&w, (uint64_t)pieces[i].start);
        write_u64(&w, (uint64_t)(pieces[i].end - pieces[i].start));
    }
    int error = put(&w);
    for (size_t i = 0; !error && i < count; i++)
        error = put_piece(fd, pieces[i]);
    close(fd);
    return error ? (errno = error, complain(path)) : 0;
}

static int put_other(int parent, const char *name, const char *path, const struct stat *st) {
    char target[PATH_MAX] = "", kind = 0;
    if (S_ISLNK(st->st_mode)) {
        if (readlinkat(parent, name, target, sizeof target - 1) < 0)
            return complain(path);
        kind = 'l';
    } else if (S_ISFIFO(st->st_mode)) {
        kind = 'p';
    } else if (S_ISCHR(st->st_mode) && st->st_rdev == makedev(0, 0)) {
        kind = 'w';
    }
    if (!kind)
        return 0;
    struct writer w = {0};
    put_head(&w, kind, path, st, -1);
    if (kind == 'l')
        write_string(&w, target);
    return put(&w);
}

static int put_folder(int parent, const char *name, const char *path, int depth);

static int put_entry(int parent, const char *name, const char *path, int depth) {
    struct stat st;
    if (fstatat(parent, name, &st, AT_SYMLINK_NOFOLLOW) < 0)
        return complain(path);
    if (S_ISDIR(st.st_mode))
        return put_folder(parent, name, path, depth);
    return S_ISREG(st.st_mode) ? put_file(parent, name, path) : put_other(parent, name, path, &st);
}

static int put_names(DIR *dir, const char *path, int depth) {
    char *child = malloc(PATH_MAX);
    int error = child ? 0 : ENOMEM;
    for (struct dirent *e; !error && (errno = 0, e = readdir(dir));) {
        if (!strcmp(e->d_name, ".") || !strcmp(e->d_name, ".."))
            continue;
        if (snprintf(child, PATH_MAX, "%s%s%s", path, *path ? "/" : "", e->d_name) >= PATH_MAX)
            error = (errno = ENAMETOOLONG, complain(path));
        else
            error = put_entry(dirfd(dir), e->d_name, child, depth + 1);
        errno = 0;
    }
    free(child);
    return error || !errno ? error : complain(path);
}

static int put_folder(int parent, const char *name, const char *path, int depth) {
    struct stat st;
    if (depth > DEPTH_MAX)
        return errno = ELOOP, complain(path);
    int fd = openat(parent, name, O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW);
    DIR *dir = fd < 0 || fstat(fd, &st) < 0 ? NULL : fdopendir(fd);
    if (!dir)
        return complain(*path ? path : name);
    struct writer w = {0};
    put_head(&w, 'd', path, &st, fd);
    int error = put(&w);
    if (!error)
        error = put_names(dir, path, depth);
    closedir(dir);
    return error;
}

/* The disk as a file system of our own mount namespace, which goes with us. Not kept from writing to the device: its journal is replayed. */
static int mount_disk(const char *device) {
    if (unshare(CLONE_NEWNS) < 0 || (mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) < 0 && errno != EINVAL))
        return complain("namespace");
    if (mkdir(where, 0700) < 0 && errno != EEXIST)
        return complain(where);
    if (mount(device, where, "ext4", MS_RDONLY | MS_NODEV | MS_NOEXEC | MS_NOSUID | MS_NOATIME, NULL) < 0)
        return complain(device);
    return 0;
}

int upper_main(char **argv) {
    struct stat st;
    if (stat(argv[1], &st) < 0)
        return complain(argv[1]);
    int base = AT_FDCWD, error = 0;
    const char *top = argv[1];
    if (S_ISBLK(st.st_mode)) {
        if ((error = mount_disk(argv[1])))
            return error;
        base = open(where, O_PATH | O_DIRECTORY | O_CLOEXEC);
        top = "upper";
        if (base < 0)
            return complain(where);
        /* A disk that no guest has had yet. */
        if (fstatat(base, top, &st, AT_SYMLINK_NOFOLLOW) < 0 && errno == ENOENT)
            return write_all(STDOUT_FILENO, "e", 1);
    }
    error = put_folder(base, top, "", 0);
    if (!error) {
        struct writer w = {0};
        write_u8(&w, 'e');
        error = put(&w);
    }
    return error ? error : flush();
}
