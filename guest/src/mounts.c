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

static int open_in(int root, const char *path, uint64_t flags) {
    struct open_how how = {.flags = flags | O_CLOEXEC, .resolve = RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS};
    return (int)syscall(SYS_openat2, root, path, &how, sizeof how);
}

/* Open the folder that holds the last component of path, making folders on the way; *name gets that
 * component, within copy. Returns -1 with errno. */
static int open_parent(int root, const char *path, char copy[PATH_MAX], char **name) {
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

static bool parse_mode(const char *word, mode_t *mode) {
    char *end;
    unsigned long v = strtoul(word, &end, 8);
    *mode = (mode_t)v;
    if (*word >= '0' && *word <= '7' && !*end && v <= 07777)
        return true;
    errno = EINVAL;
    return false;
}

int op_dir(struct launch *l, const struct op *op) {
    char copy[PATH_MAX], *name;
    mode_t mode;
    if (!parse_mode(op->words[2], &mode))
        return -1;
    int at = open_parent(l->root, op->words[1], copy, &name);
    if (at < 0)
        return -1;
    int r = mkdirat(at, name, mode);
    if (r == 0)
        r = fchmodat(at, name, mode, 0); /* past the umask */
    close(at);
    return r;
}

int op_file(struct launch *l, const struct op *op) {
    char copy[PATH_MAX], *name;
    mode_t mode;
    if (!parse_mode(op->words[2], &mode))
        return -1;
    int at = open_parent(l->root, op->words[1], copy, &name);
    if (at < 0)
        return -1;
    int fd = openat(at, name, O_CREAT | O_EXCL | O_WRONLY | O_NOFOLLOW | O_CLOEXEC, mode);
    int r = fd < 0 ? -1 : fchmod(fd, mode);
    if (fd >= 0)
        close(fd);
    close(at);
    return r;
}

int op_link(struct launch *l, const struct op *op) {
    char copy[PATH_MAX], *name;
    int at = open_parent(l->root, op->words[2], copy, &name);
    int r = at < 0 ? -1 : symlinkat(op->words[1], at, name);
    if (at >= 0)
        close(at);
    return r;
}

/* Words of FLAGS as mount attributes; false with EINVAL for a word that is not one. */
static bool parse_flags(const char *words, uint64_t *attr) {
    *attr = MOUNT_ATTR_RDONLY | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC | MOUNT_ATTR_NOSUID;
    for (const char *at = words; *at;) {
        size_t n = strcspn(at, ",");
        if (n == 2 && !strncmp(at, "rw", n))
            *attr &= ~(uint64_t)MOUNT_ATTR_RDONLY;
        else if (n == 3 && !strncmp(at, "dev", n))
            *attr &= ~(uint64_t)MOUNT_ATTR_NODEV;
        else if (n == 4 && !strncmp(at, "exec", n))
            *attr &= ~(uint64_t)MOUNT_ATTR_NOEXEC;
        else if (!(n == 2 && !strncmp(at, "ro", n)) && !(n == 5 && !strncmp(at, "nodev", n)) &&
                 !(n == 6 && (!strncmp(at, "nosuid", n) || !strncmp(at, "noexec", n)))) {
            errno = EINVAL;
            return false;
        }
        at += n + (at[n] == ',');
    }
    return true;
}

/* Open the place to mount on, made if it is not there: a folder or an empty file. */
static int open_target(int root, const char *path, bool folder) {
    if (!strcmp(path, "/"))
        return open_in(root, "/", O_PATH);
    char copy[PATH_MAX], *name;
    int at = open_parent(root, path, copy, &name);
    if (at < 0)
        return -1;
    int fd = open_in(root, path, O_PATH);
    if (fd < 0 && errno == ENOENT) {
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

/* Attach a detached mount at path with these attributes; closes tree. */
static int attach(struct launch *l, int tree, uint64_t attributes, const char *path, bool folder) {
    struct mount_attr attr = {.attr_set = attributes};
    int r = mount_setattr(tree, "", AT_EMPTY_PATH | AT_RECURSIVE, &attr, sizeof attr);
    int target = r < 0 ? -1 : open_target(l->root, path, folder);
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
    struct stat st;
    if (!parse_flags(op->words[3], &attributes))
        return -1;
    int tree = open_tree(AT_FDCWD, op->words[1], OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_RECURSIVE);
    if (tree < 0 || fstat(tree, &st) < 0)
        return -1;
    return attach(l, tree, attributes, op->words[2], S_ISDIR(st.st_mode));
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

static int new_filesystem(const char *type, const char *source, const char *data) {
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
    if (!parse_flags(op->words[4], &attributes))
        return -1;
    int tree = new_filesystem(op->words[1], op->words[2], op->words[5]);
    return tree < 0 ? -1 : attach(l, tree, attributes, op->words[3], true);
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
    l->root = tree;
    return 0;
}

int op_pivot(struct launch *l, const struct op *op) {
    bool writable = op->count > 1;
    if (writable && strcmp(op->words[1], "rw")) {
        errno = EINVAL;
        return -1;
    }
    /* pivot_root(2), "pivot_root(".", ".")": the old root lies over the new one until it is detached. */
    if (fchdir(l->root) < 0 || syscall(SYS_pivot_root, ".", ".") < 0 || umount2(".", MNT_DETACH) < 0 || chdir("/") < 0)
        return -1;
    close(l->root);
    l->root = -1;
    struct mount_attr attr = {.attr_set = MOUNT_ATTR_RDONLY};
    return writable ? 0 : mount_setattr(AT_FDCWD, "/", 0, &attr, sizeof attr);
}
