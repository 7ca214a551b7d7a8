/* The new root: a private tmpfs that holds only what the plan puts there.
 *
 * Targets are found and made under the root's descriptor with openat2(RESOLVE_IN_ROOT), so that a link in
 * a bound tree cannot lead an operation out of it. Mounts are made detached, given all their flags
 * with mount_setattr (recursively) and only then attached: there is no moment without them. */
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/openat2.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "launch.h"
#include "mounts.h"

int open_in(int root, const char *path, uint64_t flags) {
    struct open_how how = {.flags = flags | O_CLOEXEC, .resolve = RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS};
    return (int)syscall(SYS_openat2, root, path, &how, sizeof how);
}

int open_parent(int root, const char *path, char copy[PATH_MAX], char **name) {
    if (path[0] != '/' || strlen(path) >= PATH_MAX) {
        errno = EINVAL;
        return -1;
    }
    strcpy(copy, path);
    int at = open_in(root, "/", O_PATH | O_DIRECTORY);
    char *part = copy + 1;
    for (char *slash; at >= 0 && (slash = strchr(part, '/')); part = slash + 1) {
        *slash = 0;
        if (*part) {
            /* An entry that exists is opened below whatever it is; a dangling link then fails. */
            if (mkdirat(at, part, 0755) < 0 && errno != EEXIST && errno != EROFS) {
                close(at);
                return -1;
            }
            int next = open_in(root, copy, O_PATH | O_DIRECTORY);
            close(at);
            at = next;
        }
        *slash = '/';
    }
    *name = part;
    if (at >= 0 && (!*part || !strcmp(part, ".") || !strcmp(part, ".."))) {
        close(at);
        errno = EINVAL;
        return -1;
    }
    return at;
}

bool parse_mode(const char *word, mode_t *mode) {
    char *end;
    unsigned long v = strtoul(word, &end, 8);
    *mode = (mode_t)v;
    if (*word >= '0' && *word <= '7' && !*end && v <= 07777)
        return true;
    errno = EINVAL;
    return false;
}

/* Make PATH with MODE, past the umask; `make` makes it and returns a descriptor of it, or -1. */
static int make_in_root(struct launch *l, const struct op *op, int (*make)(int at, const char *name, mode_t mode)) {
    char copy[PATH_MAX], *name;
    mode_t mode;
    if (!parse_mode(op->words[2], &mode))
        return -1;
    int at = open_parent(l->root, op->words[1], copy, &name);
    if (at < 0)
        return -1;
    int fd = make(at, name, mode);
    int r = fd < 0 ? -1 : fchmod(fd, mode);
    if (fd >= 0)
        close(fd);
    close(at);
    return r;
}

static int make_folder(int at, const char *name, mode_t mode) {
    (void)mode; /* set when it is open, which a mode may not allow */
    return mkdirat(at, name, 0700) < 0 ? -1 : openat(at, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
}

static int make_file(int at, const char *name, mode_t mode) {
    return openat(at, name, O_CREAT | O_EXCL | O_WRONLY | O_NOFOLLOW | O_CLOEXEC, mode);
}

int op_dir(struct launch *l, const struct op *op) { return make_in_root(l, op, make_folder); }

int op_file(struct launch *l, const struct op *op) { return make_in_root(l, op, make_file); }

int op_link(struct launch *l, const struct op *op) {
    char copy[PATH_MAX], *name;
    int at = open_parent(l->root, op->words[2], copy, &name);
    int r = at < 0 ? -1 : symlinkat(op->words[1], at, name);
    if (at >= 0)
        close(at);
    return r;
}

bool parse_flags(const char *words, uint64_t *attributes, unsigned *bind) {
    static const struct { const char *word; uint64_t clears; unsigned bind; } FLAGS[] = {
        {"ro", 0, 0},          {"rw", MOUNT_ATTR_RDONLY, 0},  {"nodev", 0, 0},         {"dev", MOUNT_ATTR_NODEV, 0}, {"noexec", 0, 0},
        {"exec", MOUNT_ATTR_NOEXEC, 0}, {"nosuid", 0, 0}, {"idmap", 0, BIND_IDMAP}, {"alone", 0, BIND_ALONE},
        {"straight", 0, BIND_STRAIGHT}, {"owner", 0, BIND_OWNER},
    };
    *attributes = MOUNT_ATTR_RDONLY | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC | MOUNT_ATTR_NOSUID;
    if (bind)
        *bind = 0;
    for (const char *at = words; *at;) {
        size_t n = strcspn(at, ","), i = 0;
        while (i < sizeof FLAGS / sizeof *FLAGS && (strlen(FLAGS[i].word) != n || strncmp(at, FLAGS[i].word, n)))
            i++;
        if (i == sizeof FLAGS / sizeof *FLAGS || (FLAGS[i].bind && !bind)) {
            errno = EINVAL;
            return false;
        }
        *attributes &= ~FLAGS[i].clears;
        if (bind)
            *bind |= FLAGS[i].bind;
        at += n + (at[n] == ',');
    }
    return true;
}

int open_target(int root, const char *path, bool folder) {
    if (!strcmp(path, "/"))
        return open_in(root, "/", O_PATH);
    char copy[PATH_MAX], *name;
    int at = open_parent(root, path, copy, &name);
    if (at < 0)
        return -1;
    int fd = open_in(root, path, O_PATH);
    if (fd < 0 && errno == ENOENT) {
        struct stat st;
        /* A link of the image that leads nowhere: there is no telling what it meant, so it goes. */
        if (fstatat(at, name, &st, AT_SYMLINK_NOFOLLOW) == 0 && S_ISLNK(st.st_mode))
            unlinkat(at, name, 0);
        if (folder) {
            (void)mkdirat(at, name, 0755);
        } else {
            int made = openat(at, name, O_CREAT | O_EXCL | O_WRONLY | O_NOFOLLOW | O_CLOEXEC, 0644);
            if (made >= 0)
                close(made);
        }
        fd = open_in(root, path, O_PATH); /* its errno also tells that making failed */
    }
    close(at);
    return fd;
}

int attach(int root, int tree, uint64_t attributes, const char *path, bool folder) {
    struct mount_attr attr = {.attr_set = attributes};
    int r = mount_setattr(tree, "", AT_EMPTY_PATH | AT_RECURSIVE, &attr, sizeof attr);
    int target = r < 0 ? -1 : open_target(root, path, folder);
    if (target < 0) {
        r = -1;
    } else {
        r = move_mount(tree, "", target, "", MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH);
        close(target);
    }
    int saved = errno;
    close(tree);
    errno = saved;
    return r;
}

int op_bind(struct launch *l, const struct op *op) {
    uint64_t attributes;
    unsigned how;
    struct stat st;
    if (!parse_flags(op->words[3], &attributes, &how))
        return -1;
    int tree = launch_tree(l, op, 0, op->words[1], how);
    if (tree < 0 || fstat(tree, &st) < 0)
        return -1;
    return attach(l->root, tree, attributes, op->words[2], S_ISDIR(st.st_mode));
}

/* Set the options of a new file system from DATA: comma-separated KEY=VALUE or KEY. */
static int configure(int fs, const char *data) {
    char *copy = strdup(data), *rest = NULL;
    if (!copy)
        return -1;
    int r = 0;
    for (char *word = strtok_r(copy, ",", &rest); word && r == 0; word = strtok_r(NULL, ",", &rest)) {
        char *value = strchr(word, '=');
        if (value)
            *value++ = 0;
        r = value ? fsconfig(fs, FSCONFIG_SET_STRING, word, value, 0) : fsconfig(fs, FSCONFIG_SET_FLAG, word, NULL, 0);
    }
    int saved = errno;
    free(copy);
    errno = saved;
    return r;
}

int new_filesystem(const char *type, const char *source, const char *data) {
    int fs = fsopen(type, FSOPEN_CLOEXEC);
    if (fs < 0)
        return -1;
    int tree = -1;
    if (fsconfig(fs, FSCONFIG_SET_STRING, "source", source, 0) == 0 && configure(fs, data) == 0 &&
        fsconfig(fs, FSCONFIG_CMD_CREATE, NULL, NULL, 0) == 0)
        tree = fsmount(fs, FSMOUNT_CLOEXEC, 0);
    int saved = errno;
    close(fs);
    errno = saved;
    return tree;
}

int op_mount(struct launch *l, const struct op *op) {
    uint64_t attributes;
    if (!parse_flags(op->words[4], &attributes, NULL))
        return -1;
    const struct prepared *p = l->prepared ? &l->prepared[op - l->ops] : NULL;
    int tree = p && p->tree[0] >= 0 ? p->tree[0] : new_filesystem(op->words[1], op->words[2], op->words[5]);
    return tree < 0 ? -1 : attach(l->root, tree, attributes, op->words[3], true);
}

int op_root(struct launch *l, const struct op *op) {
    if (mount("", "/", NULL, MS_REC | MS_PRIVATE, NULL) < 0)
        return -1;
    int tree = new_filesystem("tmpfs", "root", "mode=0755,size=16m,nr_inodes=4096");
    if (tree < 0)
        return -1;
    struct mount_attr attr = {.attr_set = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC};
    if (mount_setattr(tree, "", AT_EMPTY_PATH, &attr, sizeof attr) < 0 ||
        move_mount(tree, "", AT_FDCWD, op->words[1], MOVE_MOUNT_F_EMPTY_PATH) < 0)
        return -1;
    l->root = l->base = tree;
    l->over_root = !strcmp(op->words[1], "/");
    return 0;
}

/* Whether nothing lies over our root: what did would be where its `..` leads. */
static bool alone(void) {
    struct statx root, up;
    bool same = statx(AT_FDCWD, "/", AT_NO_AUTOMOUNT, STATX_BASIC_STATS | STATX_MNT_ID, &root) == 0 &&
                statx(AT_FDCWD, "/..", AT_NO_AUTOMOUNT, STATX_BASIC_STATS | STATX_MNT_ID, &up) == 0 &&
                root.stx_ino == up.stx_ino && root.stx_dev_major == up.stx_dev_major && root.stx_dev_minor == up.stx_dev_minor &&
                (!(root.stx_mask & STATX_MNT_ID) || root.stx_mnt_id == up.stx_mnt_id);
    if (!same)
        errno = EXDEV;
    return same;
}

int op_pivot(struct launch *l, const struct op *op) {
    bool writable = op->count > 1;
    if (writable && strcmp(op->words[1], "rw")) {
        errno = EINVAL;
        return -1;
    }
    /* pivot_root(2), "pivot_root(".", ".")": the old root lies over the new one until it is detached, and over the old
     * root our base, if that is where it was mounted. */
    if (fchdir(l->root) < 0 || syscall(SYS_pivot_root, ".", ".") < 0)
        return -1;
    for (int layers = l->over_root && l->base != l->root ? 2 : 1; layers > 0; layers--)
        if (umount2(".", MNT_DETACH) < 0)
            return -1;
    if (chdir("/") < 0 || !alone())
        return -1;
    if (l->base != l->root)
        close(l->base);
    close(l->root);
    l->root = l->base = -1;
    struct mount_attr attr = {.attr_set = MOUNT_ATTR_RDONLY};
    return writable ? 0 : mount_setattr(AT_FDCWD, "/", 0, &attr, sizeof attr);
}
