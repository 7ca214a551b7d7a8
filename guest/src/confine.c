/* Giving up power: limits, ids, capabilities, descriptors, Landlock, seccomp. */
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/capability.h>
#include <linux/close_range.h>
#include <linux/seccomp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "launch.h"

static int invalid(void) {
    errno = EINVAL;
    return -1;
}

int op_rlimit(struct launch *l, const struct op *op) {
    static const struct { const char *name; int which; } LIMITS[] = {
        {"as", RLIMIT_AS},         {"core", RLIMIT_CORE},       {"cpu", RLIMIT_CPU},     {"data", RLIMIT_DATA},
        {"fsize", RLIMIT_FSIZE},   {"memlock", RLIMIT_MEMLOCK}, {"nofile", RLIMIT_NOFILE},
        {"nproc", RLIMIT_NPROC},   {"stack", RLIMIT_STACK},     {"msgqueue", RLIMIT_MSGQUEUE},
        {"sigpending", RLIMIT_SIGPENDING},
    };
    (void)l;
    rlim_t value[2];
    for (int i = 0; i < 2; i++) {
        long long n = 0;
        if (!strcmp(op->words[2 + i], "unlimited"))
            value[i] = RLIM_INFINITY;
        else if (plan_number(op->words[2 + i], 0, INT64_MAX, &n))
            value[i] = (rlim_t)n;
        else
            return invalid();
    }
    struct rlimit limit = {.rlim_cur = value[0], .rlim_max = value[1]};
    for (size_t i = 0; i < sizeof LIMITS / sizeof *LIMITS; i++)
        if (!strcmp(LIMITS[i].name, op->words[1]))
            return setrlimit((__rlimit_resource_t)LIMITS[i].which, &limit);
    return invalid();
}

int op_groups(struct launch *l, const struct op *op) {
    gid_t list[64];
    size_t n = op->count - 1;
    (void)l;
    if (n > sizeof list / sizeof *list)
        return invalid();
    for (size_t i = 0; i < n; i++) {
        long long gid;
        if (!plan_number(op->words[i + 1], 0, UINT32_MAX - 1, &gid))
            return invalid();
        list[i] = (gid_t)gid;
    }
    return setgroups(n, list);
}

int op_user(struct launch *l, const struct op *op) {
    long long uid, gid;
    if (!plan_number(op->words[1], 0, UINT32_MAX - 1, &uid) || !plan_number(op->words[2], 0, UINT32_MAX - 1, &gid))
        return invalid();
    /* `caps` decides what stays, and dropping from the bounding set needs CAP_SETPCAP after this. */
    if (l->keep_caps && prctl(PR_SET_KEEPCAPS, 1) < 0)
        return -1;
    return setresgid((gid_t)gid, (gid_t)gid, (gid_t)gid) < 0 ? -1 : setresuid((uid_t)uid, (uid_t)uid, (uid_t)uid);
}

static const char *const CAPS[] = {
    "chown", "dac_override", "dac_read_search", "fowner", "fsetid", "kill", "setgid", "setuid", "setpcap",
    "linux_immutable", "net_bind_service", "net_broadcast", "net_admin", "net_raw", "ipc_lock", "ipc_owner",
    "sys_module", "sys_rawio", "sys_chroot", "sys_ptrace", "sys_pacct", "sys_admin", "sys_boot", "sys_nice",
    "sys_resource", "sys_time", "sys_tty_config", "mknod", "lease", "audit_write", "audit_control", "setfcap",
    "mac_override", "mac_admin", "syslog", "wake_alarm", "block_suspend", "audit_read", "perfmon", "bpf",
    "checkpoint_restore",
};

static int set_caps(uint64_t permitted, uint64_t inheritable) {
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct data[2];
    for (int i = 0; i < 2; i++) {
        uint32_t p = (uint32_t)(permitted >> 32 * i);
        data[i] = (struct __user_cap_data_struct){.effective = p, .permitted = p, .inheritable = (uint32_t)(inheritable >> 32 * i)};
    }
    return (int)syscall(SYS_capset, &header, data);
}

static int get_permitted(uint64_t *out) {
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct data[2];
    if (syscall(SYS_capget, &header, data) < 0)
        return -1;
    *out = (uint64_t)data[1].permitted << 32 | data[0].permitted;
    return 0;
}

int op_caps(struct launch *l, const struct op *op) {
    uint64_t kept = 0, have;
    for (size_t i = 1; i < op->count; i++) {
        size_t n = 0;
        while (n < sizeof CAPS / sizeof *CAPS && strcmp(CAPS[n], op->words[i]))
            n++;
        if (n == sizeof CAPS / sizeof *CAPS)
            return invalid();
        kept |= UINT64_C(1) << n;
    }
    if (get_permitted(&have) < 0)
        return -1;
    /* Where we hold nothing (no namespace, not root) the bounding set cannot be cut; nor does it
     * matter then: no_new_privs keeps an exec from raising anything. */
    bool setpcap = have & UINT64_C(1) << CAP_SETPCAP;
    if (setpcap && set_caps(have, 0) < 0)
        return -1;
    for (int cap = 0; setpcap && cap < 64; cap++)
        if (!(kept & UINT64_C(1) << cap) && prctl(PR_CAPBSET_READ, cap) == 1 && prctl(PR_CAPBSET_DROP, cap) < 0)
            return -1;
    /* A program that is not root keeps over its exec what is ambient. Root of a container has no need of it: there
     * the bounding set decides, and inheritable capabilities would only serve files that bear them. */
    if (prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) < 0 || set_caps(kept, l->guest ? 0 : kept) < 0)
        return -1;
    for (int cap = 0; cap < 64 && !l->guest; cap++)
        if (kept & UINT64_C(1) << cap && prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, cap, 0, 0) < 0)
            return -1;
    return 0;
}

static int by_target(const void *a, const void *b) {
    const int *x = a, *y = b; /* sorted copies of fds[].to */
    return (*x > *y) - (*x < *y);
}

int descriptors_apply(struct launch *l) {
    int to[LAUNCH_FDS + 3] = {0, 1, 2}, high[LAUNCH_FDS], base = 3;
    size_t n = 3;
    for (size_t i = 0; i < l->fd_count; i++)
        if (l->fds[i].to >= base)
            base = l->fds[i].to + 1;
    /* Everything is first moved above all targets, so that no target overwrites what is still needed. */
    int error_fd = fcntl(l->error_fd, F_DUPFD_CLOEXEC, base);
    if (error_fd < 0)
        return -1;
    l->error_fd = error_fd;
    for (size_t i = 0; i < l->fd_count; i++)
        if ((high[i] = fcntl(l->fds[i].from, F_DUPFD_CLOEXEC, base)) < 0)
            return -1;
    for (size_t i = 0; i < l->fd_count; i++) {
        if (dup2(high[i], l->fds[i].to) < 0)
            return -1;
        to[n++] = l->fds[i].to;
    }
    qsort(to, n, sizeof *to, by_target);
    unsigned next = 0;
    for (size_t i = 0; i < n; i++) {
        if ((unsigned)to[i] > next && syscall(SYS_close_range, next, to[i] - 1, CLOSE_RANGE_CLOEXEC) < 0)
            return -1;
        next = (unsigned)to[i] + 1;
    }
    return (int)syscall(SYS_close_range, next, ~0U, CLOSE_RANGE_CLOEXEC);
}

/* Landlock, from linux/landlock.h of newer kernels than the one we may be built on. */
enum {
    LL_EXECUTE = 1 << 0, LL_WRITE_FILE = 1 << 1, LL_READ_FILE = 1 << 2, LL_READ_DIR = 1 << 3,
    LL_REMOVE_DIR = 1 << 4, LL_REMOVE_FILE = 1 << 5, LL_MAKE_CHAR = 1 << 6, LL_MAKE_BLOCK = 1 << 11, LL_REFER = 1 << 13, LL_MAKE_DIR = 1 << 7, LL_MAKE_REG = 1 << 8,
    LL_MAKE_SOCK = 1 << 9, LL_MAKE_SYM = 1 << 12, LL_TRUNCATE = 1 << 14, LL_IOCTL_DEV = 1 << 15,
    LL_ABI_1 = (1 << 13) - 1,
    LL_FILE = LL_EXECUTE | LL_WRITE_FILE | LL_READ_FILE | LL_TRUNCATE | LL_IOCTL_DEV,
    LL_SCOPES = 3, /* abstract unix sockets, signals */
};
struct ll_ruleset { uint64_t fs, net, scoped; };
struct ll_path { uint64_t allowed; int32_t parent; } __attribute__((packed));

int op_landlock(struct launch *l, const struct op *op) {
    if (l->rule_count == LAUNCH_RULES)
        return invalid();
    l->rules[l->rule_count].path = op->words[1];
    l->rules[l->rule_count++].flags = op->words[2];
    return strspn(op->words[2], "rwx") == strlen(op->words[2]) ? 0 : invalid();
}

int op_landlock_domain(struct launch *l, const struct op *op) {
    (void)op;
    l->domain = true;
    return 0;
}

static int add_rule(int ruleset, int parent, uint64_t allowed) {
    struct ll_path rule = {.allowed = allowed, .parent = parent};
    return allowed ? (int)syscall(SYS_landlock_add_rule, ruleset, 1, &rule, 0) : 0;
}

static int landlock_rule(int ruleset, const char *path, const char *flags, uint64_t handled) {
    uint64_t allowed = 0;
    if (strchr(flags, 'r'))
        allowed |= LL_READ_FILE | LL_READ_DIR;
    if (strchr(flags, 'w'))
        allowed |= LL_WRITE_FILE | LL_REMOVE_FILE | LL_REMOVE_DIR | LL_MAKE_DIR | LL_MAKE_REG | LL_MAKE_SOCK | LL_MAKE_SYM | LL_TRUNCATE | LL_IOCTL_DEV;
    if (strchr(flags, 'x'))
        allowed |= LL_EXECUTE | LL_READ_FILE;
    int fd = open(path, O_PATH | O_CLOEXEC);
    struct stat st;
    if (fd < 0 || fstat(fd, &st) < 0)
        return -1;
    if (!S_ISDIR(st.st_mode))
        allowed &= LL_FILE;
    int r = add_rule(ruleset, fd, allowed & handled);
    close(fd);
    return r;
}

static int restrict_to(int ruleset, bool ruled) {
    int r = ruled ? (int)syscall(SYS_landlock_restrict_self, ruleset, 0) : -1;
    int saved = errno;
    close(ruleset);
    errno = saved;
    return r;
}

/* A domain that takes away nothing that a container's programs are meant to do: no mount may change, no device node be
 * made, nobody outside be traced (and from ABI 6 on be signalled, or met at an abstract socket). Files are as they were:
 * only renames and links between folders cost a walk. */
static int enter_domain(long abi) {
    struct ll_ruleset attr = {.fs = LL_MAKE_CHAR | LL_MAKE_BLOCK | LL_REFER, .scoped = abi >= 6 ? LL_SCOPES : 0};
    if (abi < 2)
        return 0; /* it would forbid renames between folders */
    int ruleset = (int)syscall(SYS_landlock_create_ruleset, &attr, abi >= 6 ? sizeof attr : sizeof attr.fs, 0);
    int root = open("/", O_PATH | O_CLOEXEC);
    bool ruled = ruleset >= 0 && root >= 0 && add_rule(ruleset, root, LL_REFER) == 0;
    if (root >= 0)
        close(root);
    return ruleset < 0 ? -1 : restrict_to(ruleset, ruled);
}

int landlock_apply(struct launch *l) {
    if (l->rule_count == 0 && !l->domain)
        return 0;
    long abi = syscall(SYS_landlock_create_ruleset, NULL, 0, 1);
    if (abi < 0)
        return errno == ENOSYS || errno == EOPNOTSUPP ? 0 : -1;
    if (l->domain && enter_domain(abi) < 0)
        return -1;
    if (l->rule_count == 0)
        return 0;
    struct ll_ruleset attr = {.fs = LL_ABI_1};
    if (abi >= 2)
        attr.fs |= LL_REFER;
    if (abi >= 3)
        attr.fs |= LL_TRUNCATE;
    if (abi >= 5)
        attr.fs |= LL_IOCTL_DEV;
    if (abi >= 6)
        attr.scoped = LL_SCOPES;
    size_t size = abi >= 6 ? sizeof attr : sizeof attr.fs;
    int ruleset = (int)syscall(SYS_landlock_create_ruleset, &attr, size, 0);
    if (ruleset < 0)
        return -1;
    bool ruled = true;
    for (size_t i = 0; ruled && i < l->rule_count; i++)
        ruled = landlock_rule(ruleset, l->rules[i].path, l->rules[i].flags, attr.fs) == 0;
    return restrict_to(ruleset, ruled);
}

static int hex(char c) {
    return c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

int op_seccomp(struct launch *l, const struct op *op) {
    const char *text = op->words[1];
    size_t size = strlen(text) / 2;
    if (strlen(text) % 2 || size == 0 || size % sizeof(struct sock_filter) || size / sizeof(struct sock_filter) > BPF_MAXINSNS)
        return invalid();
    uint8_t *bytes = malloc(size);
    if (!bytes)
        return -1;
    for (size_t i = 0; i < size; i++) {
        int high = hex(text[2 * i]), low = hex(text[2 * i + 1]);
        if (high < 0 || low < 0) {
            free(bytes);
            return invalid();
        }
        bytes[i] = (uint8_t)(high << 4 | low);
    }
    l->filter = (struct sock_fprog){.len = (unsigned short)(size / sizeof(struct sock_filter)), .filter = (void *)bytes};
    return 0;
}

int seccomp_apply(struct launch *l) {
    return l->filter.len ? (int)syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &l->filter) : 0;
}
