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
#include <sys/syscall.h>
#include <unistd.h>

#include "filter.h"
#include "landlock.h"
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

static int restrict_to(int ruleset, bool ruled) {
    int r = ruled ? landlock_enter(ruleset) : -1;
    int saved = errno;
    close(ruleset);
    errno = saved;
    return r;
}

/* A domain that takes away nothing that a container's programs are meant to do: no mount may change, no device node be
 * made, nobody outside be traced (and from ABI 6 on be signalled, or met at an abstract socket). Files are as they were:
 * only renames and links between folders cost a walk. */
static int enter_domain(int abi) {
    struct ll_ruleset attr = {.fs = LL_MAKE_CHAR | LL_MAKE_BLOCK | LL_REFER, .scoped = abi >= 6 ? LL_SCOPES : 0};
    if (abi < 2)
        return 0; /* it would forbid renames between folders */
    int ruleset = landlock_make(abi, &attr);
    int root = open("/", O_PATH | O_CLOEXEC);
    bool ruled = ruleset >= 0 && root >= 0 && landlock_allow(ruleset, root, LL_REFER) == 0;
    if (root >= 0)
        close(root);
    return ruleset < 0 ? -1 : restrict_to(ruleset, ruled);
}

int landlock_apply(struct launch *l) {
    if (l->rule_count == 0 && !l->domain)
        return 0;
    int abi = landlock_abi();
    if (abi < 0)
        return errno == ENOSYS || errno == EOPNOTSUPP ? 0 : -1;
    if (l->domain && enter_domain(abi) < 0)
        return -1;
    if (l->rule_count == 0)
        return 0;
    struct ll_ruleset attr = {.fs = landlock_files(abi), .scoped = abi >= 6 ? LL_SCOPES : 0};
    int ruleset = landlock_make(abi, &attr);
    if (ruleset < 0)
        return -1;
    bool ruled = true;
    for (size_t i = 0; ruled && i < l->rule_count; i++) /* an engine has no use for the two */
        ruled = landlock_allow_path(ruleset, l->rules[i].path, l->rules[i].flags, attr.fs & ~(uint64_t)(LL_MAKE_FIFO | LL_REFER)) == 0;
    return restrict_to(ruleset, ruled);
}

int op_seccomp(struct launch *l, const struct op *op) { return filter_parse(op->words[1], &l->filter); }

int op_exec_seccomp(struct launch *l, const struct op *op) { return filter_parse(op->words[1], &l->exec_filter); }

int seccomp_apply(struct launch *l) {
    return l->filter.len ? (int)syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &l->filter) : 0;
}
