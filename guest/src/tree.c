/* Trees: folders, files and links as one stream of records (PROTOCOL.md, "tree"). Both directions walk with
 * descriptors of folders and never follow a link, so a tree that changes under us cannot lead us elsewhere. */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "builtins.h"

enum {
    DEPTH_MAX = 512,
    FOLDERS_BYTES = 32 << 20, /* names of folders that wait for their marks */
};

int tree_name_ok(const char *path) {
    if (!*path)
        return 1;
    if (strlen(path) >= PATH_MAX)
        return 0;
    for (const char *part = path;; part++) {
        size_t size = strcspn(part, "/");
        if (size == 0 || size > NAME_MAX || (size == 1 && part[0] == '.') || (size == 2 && part[0] == '.' && part[1] == '.'))
            return 0;
        part += size;
        if (!*part)
            return 1;
    }
}

/* ---- get: from the file system to the stream ---- */

static int put_header(char kind, const char *path, const struct stat *st) {
    struct writer w = {0};
    write_u8(&w, (uint8_t)kind);
    write_string(&w, path);
    write_u32(&w, st->st_mode & 07777);
    write_u32(&w, st->st_uid);
    write_u32(&w, st->st_gid);
    write_u64(&w, (uint64_t)st->st_mtim.tv_sec * 1000000000u + (uint64_t)st->st_mtim.tv_nsec);
    int error = w.bad ? ENOMEM : write_all(STDOUT_FILENO, w.data, w.used);
    writer_free(&w);
    return error;
}

static int put_number(uint64_t v, size_t size) {
    struct writer w = {0};
    if (size == 8)
        write_u64(&w, v);
    else
        write_u32(&w, (uint32_t)v);
    int error = w.bad ? ENOMEM : write_all(STDOUT_FILENO, w.data, w.used);
    writer_free(&w);
    return error;
}

static int get_file(int parent, const char *name, const char *path) {
    struct stat st;
    int fd = openat(parent, name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
    if (fd < 0 || fstat(fd, &st) < 0)
        return complain(path);
    uint64_t left = (uint64_t)st.st_size, copied = 0;
    int error = put_header('f', path, &st);
    if (!error)
        error = put_number(left, 8);
    if (!error)
        error = copy_bytes(fd, STDOUT_FILENO, left, &copied);
    close(fd);
    /* A file that shrank is filled up with zeros: its size is said already. */
    static const char zeros[4096];
    for (left -= copied; !error && left > 0;) {
        size_t n = left < sizeof zeros ? (size_t)left : sizeof zeros;
        error = write_all(STDOUT_FILENO, zeros, n);
        left -= n;
    }
    return error;
}

static int get_link(int parent, const char *name, const char *path, const struct stat *st) {
    char target[PATH_MAX];
    ssize_t n = readlinkat(parent, name, target, sizeof target - 1);
    if (n < 0)
        return complain(path);
    int error = put_header('l', path, st);
    if (!error)
        error = put_number((uint64_t)n, 4);
    return error ? error : write_all(STDOUT_FILENO, target, (size_t)n);
}

static int get_folder(int parent, const char *name, const char *path, const struct stat *st, int depth);

static int get_entry(int parent, const char *name, const char *path, int flags, int depth) {
    struct stat st;
    if (fstatat(parent, name, &st, flags) < 0)
        return errno == ENOENT && depth ? 0 : complain(*path ? path : name);
    if (S_ISDIR(st.st_mode))
        return get_folder(parent, name, path, &st, depth);
    if (S_ISREG(st.st_mode))
        return get_file(parent, name, path);
    return S_ISLNK(st.st_mode) ? get_link(parent, name, path, &st) : 0;
}

static int get_folder(int parent, const char *name, const char *path, const struct stat *st, int depth) {
    if (depth > DEPTH_MAX)
        return errno = ELOOP, complain(path);
    int error = put_header('d', path, st);
    int fd = openat(parent, name, O_RDONLY | O_DIRECTORY | O_CLOEXEC | (depth ? O_NOFOLLOW : 0));
    DIR *dir = fd < 0 ? NULL : fdopendir(fd);
    if (!dir)
        return complain(*path ? path : name);
    char *child = malloc(PATH_MAX);
    for (struct dirent *e; child && !error && (e = readdir(dir));) {
        if (!strcmp(e->d_name, ".") || !strcmp(e->d_name, ".."))
            continue;
        int n = snprintf(child, PATH_MAX, "%s%s%s", path, *path ? "/" : "", e->d_name);
        if (n >= PATH_MAX)
            error = (errno = ENAMETOOLONG, complain(path));
        else
            error = get_entry(fd, e->d_name, child, AT_SYMLINK_NOFOLLOW, depth + 1);
    }
    if (!child)
        error = ENOMEM;
    free(child);
    closedir(dir);
    return error;
}

int tree_get(char **argv) {
    int error = get_entry(AT_FDCWD, argv[1], "", 0, 0);
    return error ? error : write_all(STDOUT_FILENO, "e", 1);
}

/* ---- put: from the stream to the file system ---- */

struct record {
    char kind;
    char *path;
    uint32_t mode, uid, gid;
    uint64_t mtime;
};

static int take_number(size_t size, uint64_t *v) {
    uint8_t bytes[8];
    int error = read_all(STDIN_FILENO, bytes, size);
    struct reader r = reader_of(bytes, size);
    *v = error ? 0 : size == 8 ? read_u64(&r) : read_u32(&r);
    return error;
}

static int take_string(char **out) {
    uint64_t size;
    int error = take_number(4, &size);
    if (error)
        return error;
    if (size >= PATH_MAX)
        return ENAMETOOLONG;
    char *s = malloc((size_t)size + 1);
    if (!s)
        return ENOMEM;
    if ((error = read_all(STDIN_FILENO, s, (size_t)size)) || memchr(s, 0, (size_t)size)) {
        free(s);
        return error ? error : EINVAL;
    }
    s[size] = 0;
    *out = s;
    return 0;
}

static int take_record(struct record *r) {
    uint8_t bytes[20];
    int error = read_all(STDIN_FILENO, &r->kind, 1);
    if (error || r->kind == 'e')
        return error;
    if ((error = take_string(&r->path)) || (error = read_all(STDIN_FILENO, bytes, sizeof bytes)))
        return error;
    struct reader in = reader_of(bytes, sizeof bytes);
    r->mode = read_u32(&in) & 07777;
    r->uid = read_u32(&in);
    r->gid = read_u32(&in);
    r->mtime = read_u64(&in);
    return tree_name_ok(r->path) ? 0 : EINVAL;
}

/* The folder that holds `path` under `base`, by descriptors; *name is its last component. */
static int open_parent(int base, char *path, char **name) {
    int fd = dup(base);
    for (char *slash; fd >= 0 && (slash = strchr(path, '/')); path = slash + 1) {
        *slash = 0;
        int next = openat(fd, path, O_PATH | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
        *slash = '/';
        int error = errno;
        close(fd);
        errno = error;
        fd = next;
    }
    *name = path;
    return fd;
}

static int set_times(int dir, const char *name, uint64_t mtime) {
    struct timespec times[2] = {{.tv_nsec = UTIME_NOW},
                                {.tv_sec = (time_t)(mtime / 1000000000u), .tv_nsec = (long)(mtime % 1000000000u)}};
    return utimensat(dir, name, times, AT_SYMLINK_NOFOLLOW);
}

static int put_content(int dir, const char *name) {
    uint64_t size, copied;
    int error = take_number(8, &size);
    if (error)
        return error;
    if (unlinkat(dir, name, 0) < 0 && errno != ENOENT)
        return errno;
    int fd = openat(dir, name, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
    if (fd < 0)
        return errno;
    error = copy_bytes(STDIN_FILENO, fd, size, &copied);
    if (!error && copied < size)
        error = EPIPE;
    if (close(fd) < 0 && !error)
        error = errno;
    return error;
}

static int put_link(int dir, const char *name) {
    char *target = NULL;
    int error = take_string(&target);
    if (!error && unlinkat(dir, name, 0) < 0 && errno != ENOENT)
        error = errno;
    if (!error && symlinkat(target, dir, name) < 0)
        error = errno;
    free(target);
    return error;
}

/* Owner, mode and time. */
static int put_marks(int dir, const char *name, const struct record *r) {
    if (r->uid != UINT32_MAX && geteuid() == 0 && fchownat(dir, name, r->uid, r->gid, AT_SYMLINK_NOFOLLOW) < 0)
        return errno;
    /* After chown, which clears set-user-id. */
    if (r->kind != 'l' && fchmodat(dir, name, r->mode, 0) < 0)
        return errno;
    return set_times(dir, name, r->mtime) < 0 ? errno : 0;
}

/* A folder is made so that we can fill it; it gets its marks at the end, deepest first, since what is put into it
 * moves its time and its mode may forbid us to. */
static struct {
    struct record *list;
    size_t count, size, bytes;
} folders;

static int keep_folder(const struct record *r) {
    size_t length = strlen(r->path) + 1;
    if (folders.bytes + length > FOLDERS_BYTES)
        return E2BIG;
    if (folders.count == folders.size) {
        size_t want = folders.size ? folders.size * 2 : 64;
        struct record *grown = realloc(folders.list, want * sizeof *grown);
        if (!grown)
            return ENOMEM;
        folders.list = grown;
        folders.size = want;
    }
    struct record copy = *r;
    if (!(copy.path = strdup(r->path)))
        return ENOMEM;
    folders.bytes += length;
    folders.list[folders.count++] = copy;
    return 0;
}

static int put_folder(int dir, const char *name, const struct record *r) {
    struct stat st;
    if (mkdirat(dir, name, 0700) < 0) {
        if (errno != EEXIST)
            return errno;
        if (fstatat(dir, name, &st, AT_SYMLINK_NOFOLLOW) < 0 || !S_ISDIR(st.st_mode))
            return ENOTDIR;
    }
    return keep_folder(r);
}

static int put_record(int dir, const char *name, const struct record *r) {
    if (r->kind == 'd')
        return put_folder(dir, name, r);
    int error = r->kind == 'f' ? put_content(dir, name) : r->kind == 'l' ? put_link(dir, name) : EINVAL;
    return error ? error : put_marks(dir, name, r);
}

/* The folder that holds what the record is about, and its name there. Path "" is argv[1] itself; all others need that to
 * be a folder. */
static int open_place(const char *root, int *base, char *path, char **name) {
    if (*path) {
        if (*base < 0)
            *base = open(root, O_PATH | O_DIRECTORY | O_CLOEXEC);
        return *base < 0 ? -1 : open_parent(*base, path, name);
    }
    char parent[PATH_MAX];
    *name = strrchr(root, '/') ? strrchr(root, '/') + 1 : (char *)(uintptr_t)root;
    int n = snprintf(parent, sizeof parent, "%.*s", (int)(*name - root), root);
    if (n >= PATH_MAX)
        return errno = ENAMETOOLONG, -1;
    if (!**name)
        *name = (char *)(uintptr_t) ".";
    return open(*parent ? parent : ".", O_PATH | O_DIRECTORY | O_CLOEXEC);
}

static int put_one(const char *root, int *base, struct record *r) {
    struct stat st;
    /* An existing target folder keeps what it is. */
    if (!*r->path && r->kind == 'd' && stat(root, &st) == 0 && S_ISDIR(st.st_mode))
        return 0;
    char *name;
    int dir = open_place(root, base, r->path, &name);
    if (dir < 0)
        return errno;
    int error = put_record(dir, name, r);
    close(dir);
    return error;
}

static int finish_folders(const char *root, int *base) {
    while (folders.count > 0) {
        struct record *r = &folders.list[--folders.count];
        char *name;
        int dir = open_place(root, base, r->path, &name);
        int error = dir < 0 ? errno : put_marks(dir, name, r);
        if (error)
            return errno = error, complain(*r->path ? r->path : root);
        close(dir);
        free(r->path);
    }
    free(folders.list);
    return 0;
}

int tree_put(char **argv) {
    char *root = argv[1];
    for (size_t n = strlen(root); n > 1 && root[n - 1] == '/'; n--)
        root[n - 1] = 0;
    int base = -1;
    for (;;) {
        struct record r = {0};
        int error = take_record(&r);
        if (!error && r.kind == 'e')
            return finish_folders(root, &base);
        if (!error)
            error = put_one(root, &base, &r);
        if (error) {
            errno = error;
            return complain(r.path && *r.path ? r.path : root);
        }
        free(r.path);
    }
}
