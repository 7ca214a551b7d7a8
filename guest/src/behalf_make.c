#include "behalf_make.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/openat2.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <unistd.h>

enum { PROC_MAGIC = 0x9fa0 };

#define FLAGS                                                                                                                                       \
    (O_ACCMODE | O_CREAT | O_EXCL | O_NOCTTY | O_TRUNC | O_APPEND | O_NONBLOCK | O_SYNC | O_DSYNC | FASYNC | O_DIRECT | O_LARGEFILE | 0100000 |     \
     O_DIRECTORY | O_NOFOLLOW | O_NOATIME | O_CLOEXEC | O_PATH | O_TMPFILE)

void make_words(const char *path, long process, long thread, char *out, int *own) {
    static const char *const standard[] = {"/dev/stdin", "/dev/stdout", "/dev/stderr"};
    const char *rest = path;
    *own = 0;
    if (!strncmp(path, "/proc/self", 10) && (!path[10] || path[10] == '/')) {
        snprintf(out, MAKE_WORDS, "/proc/%ld%s", process, rest = path + 10);
    } else if (!strncmp(path, "/proc/thread-self", 17) && (!path[17] || path[17] == '/')) {
        snprintf(out, MAKE_WORDS, "/proc/%ld/task/%ld%s", process, thread, rest = path + 17);
    } else if ((!strncmp(path, "/proc/net", 9) && (!path[9] || path[9] == '/')) || !strcmp(path, "/proc/mounts")) {
        snprintf(out, MAKE_WORDS, "/proc/%ld%s", process, rest = path + 5); /* links by way of /proc/self */
    } else if (!strncmp(path, "/dev/fd", 7) && (!path[7] || path[7] == '/')) {
        snprintf(out, MAKE_WORDS, "/proc/%ld/fd%s", process, path + 7);
        rest = path + 4;
    } else {
        snprintf(out, MAKE_WORDS, "%s", path);
        for (int i = 0; i < 3; i++)
            if (!strcmp(path, standard[i])) {
                snprintf(out, MAKE_WORDS, "/proc/%ld/fd/%d", process, i);
                *own = 1;
            }
        return;
    }
    const char *digits = !strncmp(rest, "/fd/", 4) ? rest + 4 : !strncmp(rest, "fd/", 3) ? rest + 3 : "";
    *own = *digits && strspn(digits, "0123456789") == strlen(digits);
}

/* Where the program and we share a pid namespace, a link may have led /proc/self to us: that is not what it asked for. */
static bool is_ours(int fd, int self) {
    struct statfs fs;
    char name[16], place[4096], us[24];
    if (fstatfs(fd, &fs) < 0 || (unsigned)fs.f_type != PROC_MAGIC)
        return false;
    snprintf(name, sizeof name, "%d", fd);
    snprintf(us, sizeof us, "/%d", (int)getpid());
    ssize_t n = readlinkat(self, name, place, sizeof place - 1);
    if (n <= 0)
        return true;
    place[n] = 0;
    const char *found = strstr(place, us);
    return found && (!found[strlen(us)] || found[strlen(us)] == '/');
}

int make_open(const struct opening *o) {
    char path[MAKE_WORDS];
    int own;
    make_words(o->path, o->process, o->thread, path, &own);
    bool makes = o->flags & O_CREAT || (o->flags & O_TMPFILE) == O_TMPFILE;
    /* openat(2) passes over what it does not know; a terminal must not become ours, which it could only here. */
    struct open_how how = {.flags = (o->flags & FLAGS) | O_NOCTTY | O_CLOEXEC, .mode = makes ? o->mode & 07777 : 0, .resolve = o->resolve};
    if (how.flags & O_PATH)
        how.flags &= O_PATH | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC;
    if (!own)
        how.resolve |= RESOLVE_NO_MAGICLINKS;
    int fd = (int)syscall(SYS_openat2, o->base, path, &how, sizeof how);
    if (fd >= 0 && is_ours(fd, o->self)) {
        close(fd);
        errno = ELOOP;
        return -1;
    }
    return fd;
}

/* mount_setattr(2) adds and takes nothing away, on the mount that was looked up, not on what the path means a moment later. */
static int restrict_mount(const char *target, uint64_t flags) {
    static const struct { uint64_t flag, attribute; } TABLE[] = {
        {MS_RDONLY, MOUNT_ATTR_RDONLY}, {MS_NOSUID, MOUNT_ATTR_NOSUID}, {MS_NODEV, MOUNT_ATTR_NODEV}, {MS_NOEXEC, MOUNT_ATTR_NOEXEC},
        {MS_NOSYMFOLLOW, MOUNT_ATTR_NOSYMFOLLOW},
    };
    struct mount_attr attributes = {0};
    for (size_t i = 0; i < sizeof TABLE / sizeof *TABLE; i++)
        if (flags & TABLE[i].flag)
            attributes.attr_set |= TABLE[i].attribute;
    return (int)syscall(SYS_mount_setattr, AT_FDCWD, target, 0, &attributes, sizeof attributes);
}

int make_mount(const char *source, const char *target, const char *type, uint64_t flags, const char *data) {
    int r;
    if (flags & MS_MOVE || (flags & MS_REMOUNT && !(flags & MS_BIND)))
        return EPERM;
    if (flags & MS_REMOUNT)
        r = restrict_mount(target, flags);
    else /* of a folder alone a bind would show what lies under what is mounted there: what is masked, too */
        r = mount(source, target, type, (unsigned long)(flags & MS_BIND ? flags | MS_REC : flags), *data ? data : NULL);
    return r < 0 ? errno : 0;
}

static const char *safe_device(mode_t mode, dev_t dev) {
    static const struct { unsigned major, minor; const char *path; } SAFE[] = {
        {1, 3, "/dev/null"}, {1, 5, "/dev/zero"}, {1, 7, "/dev/full"}, {1, 8, "/dev/random"}, {1, 9, "/dev/urandom"}, {5, 0, "/dev/tty"},
    };
    for (size_t i = 0; S_ISCHR(mode) && i < sizeof SAFE / sizeof *SAFE; i++)
        if (major(dev) == SAFE[i].major && minor(dev) == SAFE[i].minor)
            return SAFE[i].path;
    return NULL;
}

/* The machine's own device over an empty file that we made. 0, or an errno. */
static int cover(const char *device, dev_t dev, int file) {
    int tree = (int)syscall(SYS_open_tree, AT_FDCWD, device, OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC);
    struct stat st;
    if (tree < 0)
        return errno;
    /* The program may have put something else there, which would be no harm to us, but not what was asked for. */
    if (fstat(tree, &st) < 0 || !S_ISCHR(st.st_mode) || st.st_rdev != dev)
        return EPERM;
    return syscall(SYS_move_mount, tree, "", file, "", MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH) < 0 ? errno : 0;
}

int make_node(int base, const char *path, mode_t mode, dev_t dev) {
    const char *device = safe_device(mode, dev);
    bool whiteout = S_ISCHR(mode) && dev == 0;
    if (!device && !whiteout && !S_ISFIFO(mode) && !S_ISSOCK(mode) && !S_ISREG(mode) && (mode & S_IFMT))
        return EPERM;
    if (mknodat(base, path, mode, device ? dev : 0) == 0)
        return 0;
    if (!device || errno != EPERM)
        return errno;
    int file = openat(base, path, O_RDONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, mode & 07777);
    if (file < 0)
        return errno;
    int error = cover(device, dev, file);
    if (error)
        unlinkat(base, path, 0);
    return error;
}
