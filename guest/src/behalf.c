#include "behalf.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "behalf_ids.h"
#include "behalf_make.h"
#include "fds.h"
#include "landlock.h"

enum { TEXT_MAX = 4096, DATA_MAX = 16384 };

static char *take_text(struct reader *r, size_t most) {
    char *text = read_string(r);
    if (text && strlen(text) >= most)
        r->bad = true;
    return text;
}

bool behalf_read(struct reader *r, char what, struct behalf *b) {
    *b = (struct behalf){.what = what, .request = read_u32(r), .dirfd = AT_FDCWD};
    b->id = read_u64(r);
    b->pid = read_u32(r);
    if (what != 'M')
        b->dirfd = (int32_t)read_u32(r);
    if (what == 'N') {
        b->mode = read_u32(r);
        b->dev = read_u64(r);
    } else {
        b->flags = read_u64(r);
    }
    if (what == 'P') {
        b->mode = read_u64(r);
        b->resolve = read_u64(r);
    }
    if (what == 'M')
        b->source = take_text(r, TEXT_MAX);
    b->path = take_text(r, TEXT_MAX);
    if (what == 'M') {
        b->type = take_text(r, TEXT_MAX);
        b->data = take_text(r, DATA_MAX);
    }
    if (reader_done(r))
        return true;
    behalf_free(b);
    return false;
}

void behalf_free(struct behalf *b) {
    free(b->path);
    free(b->source);
    free(b->type);
    free(b->data);
    b->path = b->source = b->type = b->data = NULL;
}

/* Namespaces by which the kernel's files show different things to who opens them: of the host, if we stayed in ours. */
static const struct view {
    const char *name, *ours;
    int kind;
} VIEWS[] = {
    {"ns/ipc", "/proc/self/ns/ipc", CLONE_NEWIPC},
    {"ns/net", "/proc/self/ns/net", CLONE_NEWNET},
    {"ns/uts", "/proc/self/ns/uts", CLONE_NEWUTS},
    {"ns/cgroup", "/proc/self/ns/cgroup", CLONE_NEWCGROUP},
};

enum { VIEW_COUNT = sizeof VIEWS / sizeof *VIEWS };

/* The program's places, opened while we still are who we are. views: -1 where there is nothing to enter. */
struct places {
    int proc, root, base, user, mount, self, views[VIEW_COUNT];
};

static int open_in(int dir, const char *name, int flags) { return openat(dir, name, flags | O_CLOEXEC); }

static bool same(int fd, const char *path) {
    struct stat a, b;
    return fstat(fd, &a) == 0 && stat(path, &b) == 0 && a.st_ino == b.st_ino && a.st_dev == b.st_dev;
}

static int open_views(struct places *p) {
    for (int i = 0; i < VIEW_COUNT; i++) {
        int fd = p->views[i] = open_in(p->proc, VIEWS[i].name, O_RDONLY);
        if (fd < 0 && errno != ENOENT) /* a kernel may be without */
            return -1;
        if (fd >= 0 && same(fd, VIEWS[i].ours)) {
            close(fd);
            p->views[i] = -1;
        }
    }
    return 0;
}

/* 0 if all of them are entered. Some need power over the host's user namespace (a network that is joined), others over the
 * program's alone: so this is called before and after that is entered. */
static int enter_views(struct places *p) {
    int left = 0;
    for (int i = 0; i < VIEW_COUNT; i++)
        if (p->views[i] >= 0 && setns(p->views[i], VIEWS[i].kind) == 0)
            p->views[i] = -1;
        else
            left |= p->views[i] >= 0;
    return left ? -1 : 0;
}

static int open_places(const struct behalf *b, int listener, struct places *p) {
    char name[32];
    uint64_t id = b->id;
    snprintf(name, sizeof name, "/proc/%u", b->pid);
    p->proc = open(name, O_PATH | O_DIRECTORY | O_CLOEXEC);
    /* From here on it is this task or none; and it is the right one, because it waits still. */
    if (p->proc < 0 || ioctl(listener, SECCOMP_IOCTL_NOTIF_ID_VALID, &id) < 0)
        return errno = EINTR, -1;
    p->root = open_in(p->proc, "root", O_PATH | O_DIRECTORY);
    p->user = open_in(p->proc, "ns/user", O_RDONLY);
    p->mount = open_in(p->proc, "ns/mnt", O_RDONLY);
    p->self = open("/proc/self/fd", O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (p->root < 0 || p->user < 0 || p->mount < 0 || p->self < 0 || (b->what == 'P' && open_views(p) < 0))
        return -1;
    /* A descriptor that is none matters only to a path that is not absolute. */
    snprintf(name, sizeof name, b->dirfd == AT_FDCWD || b->path[0] == '/' ? "cwd" : "fd/%d", b->dirfd);
    p->base = open_in(p->proc, name, O_PATH);
    return p->base < 0 ? (errno = errno == ENOENT ? EBADF : errno, -1) : 0;
}

/* Its namespaces and root. */
static int enter(const struct behalf *b, struct places *p) {
    bool other_mounts = !same(p->mount, "/proc/self/ns/mnt"), other_root = !same(p->root, "/");
    bool opens = b->what == 'P';
    if (opens)
        enter_views(p);
    if (!same(p->user, "/proc/self/ns/user") && setns(p->user, CLONE_NEWUSER) < 0)
        return -1;
    if (opens && enter_views(p) < 0)
        return -1;
    if (!opens && other_mounts && setns(p->mount, CLONE_NEWNS) < 0)
        return -1;
    if (!other_mounts && !other_root)
        return 0;
    return fchdir(p->root) < 0 || chroot(".") < 0 ? -1 : 0;
}

/* 0, or an errno; *out a descriptor to hand over, or -1. */
static int carry_out(const struct behalf *b, int listener, int ruleset, int *out) {
    struct places p;
    struct ids ids;
    *out = -1;
    if (open_places(b, listener, &p) < 0 || enter(b, &p) < 0 || ids_read(p.proc, &ids) < 0)
        return errno;
    /* A folder that the program may not search is its folder all the same. */
    bool relative = b->path[0] != '/' || (b->source && b->source[0] != '/');
    if (b->what == 'M' && relative && fchdir(p.base) < 0)
        return errno;
    if (b->what == 'M' && ruleset >= 0)
        return EPERM; /* a mount would move what its rules are about */
    if (ruleset >= 0 && landlock_enter(ruleset) < 0)
        return errno;
    uint64_t more = b->what == 'P' || (b->what == 'N' && ruleset >= 0) ? 0 : IDS_CAP_SYS_ADMIN;
    if (ids_become(&ids, more) < 0)
        return errno;
    umask((mode_t)ids.umask);
    if (b->what == 'M')
        return make_mount(b->source, b->path, b->type, b->flags, b->data);
    if (b->what == 'N')
        return make_node(p.base, b->path, (mode_t)b->mode, (dev_t)b->dev);
    struct opening o = {.base = p.base, .self = p.self, .path = b->path, .flags = b->flags, .mode = b->mode, .resolve = b->resolve,
                        .process = ids.process, .thread = ids.thread};
    *out = make_open(&o);
    return *out < 0 ? errno : 0;
}

void behalf_child(const struct behalf *b, int listener, int ruleset, int sock) {
    int kept[] = {listener, ruleset, sock}, fd;
    close_all_but(kept, 3);
    signal(SIGALRM, SIG_DFL);
    int error = carry_out(b, listener, ruleset, &fd);
    _exit(!behalf_reply(sock, b->request, error, fd));
}
