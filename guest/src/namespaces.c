/* What is done around the clone of a launch: namespaces, cgroups, id maps, and mounts that only the parent may make. */
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/magic.h>
#include <linux/openat2.h>
#include <linux/sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sched.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "launch.h"
#include "mounts.h"
#include "owner.h"

#ifndef MOUNT_ATTR_IDMAP
#define MOUNT_ATTR_IDMAP 0x00100000
#endif
#ifndef CLONE_NEWTIME
#define CLONE_NEWTIME 0x00000080
#endif

enum { JOIN_SESSION_KEYRING = 1, MAP_TEXT = 4096, MAP_WORDS = 3 * 64 };

const struct op *launch_find(const struct op *ops, size_t count, const char *name) {
    for (size_t i = 0; i < count; i++)
        if (!strcmp(ops[i].words[0], name))
            return &ops[i];
    return NULL;
}

static bool namespace_flags(const struct op *op, unsigned long *flags) {
    static const struct { const char *name; unsigned long flag; } NAMES[] = {
        {"user", CLONE_NEWUSER}, {"mount", CLONE_NEWNS}, {"pid", CLONE_NEWPID},       {"net", CLONE_NEWNET},
        {"ipc", CLONE_NEWIPC},   {"uts", CLONE_NEWUTS},  {"cgroup", CLONE_NEWCGROUP}, {"time", CLONE_NEWTIME},
    };
    *flags = 0;
    for (size_t i = 1; op && i < op->count; i++) {
        size_t n = 0;
        while (n < sizeof NAMES / sizeof *NAMES && strcmp(NAMES[n].name, op->words[i]))
            n++;
        if (n == sizeof NAMES / sizeof *NAMES)
            return false;
        *flags |= NAMES[n].flag;
    }
    return true;
}

static unsigned long flags_of(const struct op *ops, size_t count) {
    unsigned long flags = 0;
    namespace_flags(launch_find(ops, count, "namespaces"), &flags);
    return flags;
}

const char *namespaces_check(const struct op *ops, size_t count) {
    unsigned long flags;
    return namespace_flags(launch_find(ops, count, "namespaces"), &flags) ? NULL : "a namespace of the plan is not known";
}

static int clone_tree(const char *source, unsigned bind) {
    unsigned flags = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | (bind & BIND_ALONE ? 0 : AT_RECURSIVE);
    if (!(bind & BIND_STRAIGHT))
        return open_tree(AT_FDCWD, source, flags);
    /* What others may change must not lead elsewhere by a link that was not there when the path was looked at. */
    struct open_how how = {.flags = O_PATH | O_CLOEXEC, .resolve = RESOLVE_NO_SYMLINKS};
    int fd = (int)syscall(SYS_openat2, AT_FDCWD, source, &how, sizeof how);
    int tree = fd < 0 ? -1 : open_tree(fd, "", flags | AT_EMPTY_PATH);
    int saved = errno;
    if (fd >= 0)
        close(fd);
    errno = saved;
    return tree;
}

void namespaces_release(struct prepared *prepared, size_t count) {
    for (size_t i = 0; i < TREES * count; i++)
        if (prepared[i / TREES].tree[i % TREES] >= 0)
            close(prepared[i / TREES].tree[i % TREES]);
}

/* Whether the parent opens an operation's sources: what they are (NULL: none), and how. */
static bool sources_of(const struct op *op, const char *sources[TREES], unsigned *bind) {
    uint64_t attributes;
    sources[0] = sources[1] = sources[2] = NULL;
    if (!strcmp(op->words[0], "bind") && parse_flags(op->words[3], &attributes, bind)) {
        sources[0] = op->words[1];
        return true;
    }
    if (strcmp(op->words[0], "overlay"))
        return false;
    *bind = BIND_ALONE | (strstr(op->words[3], "idmap") ? BIND_IDMAP : 0);
    sources[0] = op->words[1];
    sources[1] = strncmp(op->words[2], LAYER_RAM, strlen(LAYER_RAM)) ? op->words[2] : NULL;
    sources[2] = overlay_above(op);
    return true;
}

/* user: the plan's, as whose the files of a bind's owner are shown, if it asks for that. */
static int open_source(const char *source, unsigned bind, const struct op *user) {
    if (!strncmp(source, LAYER_DISK, strlen(LAYER_DISK)))
        return disk_tree(source);
    int tree = clone_tree(source, bind);
    if (tree >= 0 && user && bind & BIND_OWNER && owner_shown_as(tree, user->words[1], user->words[2]) < 0) {
        int saved = errno;
        close(tree);
        errno = saved;
        return -1;
    }
    return tree;
}

bool namespaces_prepare(const struct op *ops, size_t count, struct prepared *prepared) {
    for (size_t i = 0; i < count; i++)
        prepared[i] = (struct prepared){{-1, -1, -1}};
    /* Anyone but root can clone mounts only in the child, who is then the same user as here. */
    if (geteuid() != 0)
        return true;
    const struct op *user = launch_find(ops, count, "user");
    bool all = flags_of(ops, count) & CLONE_NEWUSER;
    for (size_t i = 0; i < count; i++) {
        const char *sources[TREES];
        unsigned bind = 0;
        if (!sources_of(&ops[i], sources, &bind) || !(all || (user && bind & BIND_OWNER)))
            continue;
        for (size_t k = 0; k < TREES; k++) {
            if (!sources[k])
                continue;
            prepared[i].tree[k] = open_source(sources[k], bind, user);
            /* EPERM: root, but of a container that may not mount: the child tries for itself. */
            if (prepared[i].tree[k] < 0 && errno != EPERM) {
                int saved = errno;
                namespaces_release(prepared, count);
                errno = saved;
                return false;
            }
        }
    }
    return true;
}

int launch_tree(const struct launch *l, const struct op *op, int which, const char *source, unsigned bind) {
    const struct prepared *p = l->prepared ? &l->prepared[op - l->ops] : NULL;
    return p && p->tree[which] >= 0 ? p->tree[which] : clone_tree(source, bind);
}

/* Ids on the mount's disk are taken for the same ids inside. Of an overlay only what is read: the writable layer
 * holds ids of the machine's own range, which mean nothing to the host, setuid files among them. */
static bool map_ids(int user_ns, const struct op *ops, size_t count, const struct prepared *prepared) {
    struct mount_attr attr = {.attr_set = MOUNT_ATTR_IDMAP, .userns_fd = (uint64_t)user_ns};
    for (size_t i = 0; i < count; i++) {
        const char *sources[TREES];
        unsigned bind = 0;
        if (!sources_of(&ops[i], sources, &bind) || !(bind & BIND_IDMAP))
            continue;
        for (size_t k = 0; k < TREES; k += 2)
            if (sources[k] && mount_setattr(prepared[i].tree[k], "", AT_EMPTY_PATH | AT_RECURSIVE, &attr, sizeof attr) < 0)
                return false;
    }
    return true;
}

static int open_proc(pid_t pid, const char *name, int flags) {
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/%s", (int)pid, name);
    return open(path, flags | O_CLOEXEC);
}

static bool write_all(int fd, const char *text, size_t size) {
    bool good = fd >= 0 && write(fd, text, size) == (ssize_t)size;
    int saved = errno;
    if (fd >= 0)
        close(fd);
    errno = saved;
    return good;
}

static int plan_fd(const char *word) {
    long long fd;
    return plan_number(word, 0, 65535, &fd) ? (int)fd : -1;
}

static bool is_v2(int folder) {
    struct statfs fs;
    return fstatfs(folder, &fs) == 0 && fs.f_type == CGROUP2_SUPER_MAGIC;
}

/* One fork; into `cgroup` (-1: none) from its first moment, which spares a migration. */
static pid_t clone_into(unsigned long flags, int cgroup) {
    struct clone_args args = {.flags = flags, .exit_signal = SIGCHLD};
    if (cgroup >= 0) {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = (uint64_t)cgroup;
        return (pid_t)syscall(SYS_clone3, &args, sizeof args);
    }
    return (pid_t)syscall(SYS_clone, flags | SIGCHLD, NULL, NULL, NULL, NULL);
}

/* Which of the plan's cgroups the clone goes into by itself: that of version 2. */
static int born_in(const struct op *ops, size_t count) {
    const struct op *cgroup = launch_find(ops, count, "cgroup");
    for (size_t i = 1; cgroup && i < cgroup->count; i++)
        if (is_v2(plan_fd(cgroup->words[i])))
            return plan_fd(cgroup->words[i]);
    return -1;
}

/* A sysfs shows the network namespace that it is mounted in, and only that namespace's owner may mount it: we, not the child. */
static bool prepare_sysfs(const struct op *ops, size_t count, struct prepared *prepared) {
    for (size_t i = 0; i < count; i++)
        if (!strcmp(ops[i].words[0], "mount") && !strcmp(ops[i].words[1], "sysfs") &&
            (prepared[i].tree[0] = new_filesystem("sysfs", "sysfs", "")) < 0)
            return false;
    return true;
}

pid_t namespaces_clone(const struct op *ops, size_t count, struct prepared *prepared, bool *moved) {
    /* A cgroup namespace begins where its maker is, and a time namespace takes only children: both later. */
    unsigned long flags = flags_of(ops, count) & ~(unsigned long)(CLONE_NEWCGROUP | CLONE_NEWTIME);
    const struct op *join = launch_find(ops, count, "netns");
    int home = join ? open_proc(getpid(), "ns/net", O_RDONLY) : -1;
    if (join && (home < 0 || setns(plan_fd(join->words[1]), CLONE_NEWNET) < 0))
        return -1;
    int cgroup = born_in(ops, count);
    bool ready = !join || !(flags & CLONE_NEWUSER) || prepare_sysfs(ops, count, prepared);
    pid_t pid = ready ? clone_into(flags, cgroup) : -1;
    /* No clone3: a filter of whoever contains us. It is moved afterwards. */
    *moved = pid >= 0 && cgroup >= 0;
    if (ready && pid < 0 && cgroup >= 0)
        pid = clone_into(flags, -1);
    if (home >= 0 && pid != 0) {
        int saved = errno;
        if (setns(home, CLONE_NEWNET) < 0)
            _exit(1); /* we would serve from another network */
        close(home);
        errno = saved;
    }
    return pid;
}

/* Version 2, if the child was not born there: to move another process waits for an RCU grace period. */
static bool move_into_cgroup(pid_t pid, const struct op *ops, size_t count) {
    int folder = born_in(ops, count);
    char text[16];
    size_t size = (size_t)snprintf(text, sizeof text, "%d", (int)pid);
    return folder < 0 || write_all(openat(folder, "cgroup.procs", O_WRONLY | O_CLOEXEC), text, size);
}

/* Version 1: a process with one thread that moves itself by `tasks` waits for nobody. */
static bool join_cgroups(const struct op *ops, size_t count) {
    const struct op *cgroup = launch_find(ops, count, "cgroup");
    for (size_t i = 1; cgroup && i < cgroup->count; i++) {
        int folder = plan_fd(cgroup->words[i]);
        if (!is_v2(folder) && !write_all(openat(folder, "tasks", O_WRONLY | O_CLOEXEC), "0", 1))
            return false;
    }
    return true;
}

/* Run newuidmap(1) or newgidmap(1): they may write what root let this user have (subuid(5)). */
static bool run_helper(const char *helper, pid_t pid, const struct op *ops, size_t count, const char *kind) {
    char number[16], *argv[3 + MAP_WORDS + 1] = {(char *)helper, number};
    size_t n = 2;
    snprintf(number, sizeof number, "%d", (int)pid);
    for (size_t i = 0; i < count; i++)
        for (size_t k = 1; k < 4 && n < 2 + MAP_WORDS && !strcmp(ops[i].words[0], kind); k++)
            argv[n++] = ops[i].words[k];
    pid_t child = fork();
    if (child == 0) {
        sigset_t none;
        sigemptyset(&none);
        sigprocmask(SIG_SETMASK, &none, NULL);
        execvp(helper, argv);
        _exit(127);
    }
    int status = -1;
    while (child > 0 && waitpid(child, &status, 0) < 0 && errno == EINTR)
        ;
    errno = status == 127 << 8 ? ENOENT : EPERM;
    return child > 0 && status == 0;
}

static size_t lines_of(const struct op *ops, size_t count, const char *kind) {
    size_t n = 0;
    for (size_t i = 0; i < count; i++)
        n += !strcmp(ops[i].words[0], kind);
    return n;
}

static bool write_map(pid_t pid, const char *file, const char *kind, const struct op *ops, size_t count) {
    char text[MAP_TEXT];
    size_t used = 0;
    for (size_t i = 0; i < count && used < sizeof text - 128; i++)
        if (!strcmp(ops[i].words[0], kind))
            used += (size_t)snprintf(text + used, 128, "%.30s %.30s %.30s\n", ops[i].words[1], ops[i].words[2], ops[i].words[3]);
    return used == 0 || write_all(open_proc(pid, file, O_WRONLY), text, used);
}

/* Alone, a user may map one id, its own, and must give up setgroups for it. More is for the helpers to write. */
static bool write_maps(pid_t pid, const struct op *ops, size_t count) {
    size_t users = lines_of(ops, count, "map-user"), groups = lines_of(ops, count, "map-group");
    if (geteuid() != 0 && (users > 1 || groups > 1))
        return run_helper("newuidmap", pid, ops, count, "map-user") && run_helper("newgidmap", pid, ops, count, "map-group");
    if (geteuid() != 0 && groups && !write_all(open_proc(pid, "setgroups", O_WRONLY), "deny", 4))
        return false;
    return write_map(pid, "uid_map", "map-user", ops, count) && write_map(pid, "gid_map", "map-group", ops, count);
}

const char *namespaces_settle(pid_t pid, bool moved, const struct op *ops, size_t count, const struct prepared *prepared) {
    if (!moved && !move_into_cgroup(pid, ops, count))
        return "a cgroup cannot be joined";
    if (!write_maps(pid, ops, count))
        return "the id maps cannot be written";
    const struct op *adopt = launch_find(ops, count, "adopt");
    if (adopt && !adopt_interface(plan_fd(adopt->words[1]), adopt->words[2], pid))
        return "the interface cannot be adopted";
    int user_ns = open_proc(pid, "ns/user", O_RDONLY);
    bool good = user_ns >= 0 && map_ids(user_ns, ops, count, prepared);
    int saved = errno;
    if (user_ns >= 0)
        close(user_ns);
    errno = saved;
    return good ? NULL : "the ids of a mount cannot be mapped";
}

/* Clocks that count from now: how long the host has been up is not the machine's business. */
static bool enter_time(void) {
    struct timespec up, monotonic;
    char text[96];
    if (unshare(CLONE_NEWTIME) < 0)
        return false;
    clock_gettime(CLOCK_BOOTTIME, &up);
    clock_gettime(CLOCK_MONOTONIC, &monotonic);
    int size = snprintf(text, sizeof text, "monotonic -%lld 0\nboottime -%lld 0\n", (long long)monotonic.tv_sec, (long long)up.tv_sec);
    if (!write_all(open("/proc/self/timens_offsets", O_WRONLY | O_CLOEXEC), text, (size_t)size))
        return false;
    int fd = open("/proc/self/ns/time_for_children", O_RDONLY | O_CLOEXEC);
    bool good = fd >= 0 && setns(fd, CLONE_NEWTIME) == 0;
    int saved = errno;
    if (fd >= 0)
        close(fd);
    errno = saved;
    return good;
}

static bool maps_root(const struct op *ops, size_t count) {
    for (size_t i = 0; i < count; i++)
        if (!strcmp(ops[i].words[0], "map-user") && !strcmp(ops[i].words[1], "0"))
            return true;
    return false;
}

const char *namespaces_enter(const struct op *ops, size_t count) {
    unsigned long flags = flags_of(ops, count);
    if (!join_cgroups(ops, count))
        return "a cgroup cannot be joined";
    if (flags & CLONE_NEWCGROUP && unshare(CLONE_NEWCGROUP) < 0)
        return "a cgroup namespace cannot be made";
    if (flags & CLONE_NEWTIME && !enter_time())
        return "a time namespace cannot be made";
    if (!maps_root(ops, count))
        return NULL;
    /* Where setgroups is denied the groups of whoever started us stay, and mean nothing inside. */
    if ((setgroups(0, NULL) < 0 && errno != EPERM) || setresgid(0, 0, 0) < 0 || setresuid(0, 0, 0) < 0)
        return "root of the machine cannot be become";
    /* A session keyring of its own: the host's would be inherited. Its quota may be used up; then the filter alone
     * keeps the machine from keys. */
    (void)!syscall(SYS_keyctl, JOIN_SESSION_KEYRING, NULL);
    return NULL;
}
