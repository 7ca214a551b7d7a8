#include "behalf_ids.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/capability.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { STATUS = 64 * 1024 };

/* What stands behind `name` at the start of a line. */
static const char *field(const char *status, const char *name) {
    size_t n = strlen(name);
    for (const char *at = status; at; at = strchr(at, '\n') ? strchr(at, '\n') + 1 : NULL)
        if (!strncmp(at, name, n) && at[n] == ':')
            return at + n + 1;
    return NULL;
}

/* The nth number of a line, from 0; -1 for the last. */
static bool number(const char *line, int nth, int base, unsigned long long *out) {
    bool found = false;
    for (int i = 0; line && (nth < 0 || i <= nth); i++) {
        char *end;
        line += strspn(line, " \t");
        if (*line == '\n' || !*line)
            break;
        *out = strtoull(line, &end, base);
        if (end == line)
            return false;
        line = end;
        found = nth < 0 || i == nth;
    }
    return found;
}

static bool take_groups(const char *line, struct ids *out) {
    unsigned long long n;
    while (out->group_count < IDS_GROUPS && number(line, (int)out->group_count, 10, &n))
        out->groups[out->group_count++] = (gid_t)n;
    return out->group_count < IDS_GROUPS;
}

int ids_read(int proc, struct ids *out) {
    static char text[STATUS];
    unsigned long long uid, gid, mask, caps, process, thread;
    size_t used = 0;
    ssize_t n = -1;
    int fd = openat(proc, "status", O_RDONLY | O_CLOEXEC);
    while (fd >= 0 && used < sizeof text - 1 && (n = read(fd, text + used, sizeof text - 1 - used)) > 0)
        used += (size_t)n;
    if (fd >= 0)
        close(fd);
    if (n != 0) {
        errno = fd < 0 ? errno : EPERM;
        return -1;
    }
    text[used] = 0;
    memset(out, 0, sizeof *out);
    const char *groups = field(text, "Groups");
    errno = EPERM;
    if (!groups || !number(field(text, "Uid"), 3, 10, &uid) || !number(field(text, "Gid"), 3, 10, &gid) || !number(field(text, "Umask"), 0, 8, &mask) ||
        !number(field(text, "CapEff"), 0, 16, &caps) || !number(field(text, "NStgid"), -1, 10, &process) ||
        !number(field(text, "NSpid"), -1, 10, &thread) || !take_groups(groups, out))
        return -1;
    out->uid = (uid_t)uid;
    out->gid = (gid_t)gid;
    out->umask = (unsigned)mask;
    out->caps = caps;
    out->process = (long)process;
    out->thread = (long)thread;
    return 0;
}

/* Where groups may not be set (a rootless machine) the program has those that we have: it could not set its own either. */
static bool same_groups(const struct ids *ids) {
    static gid_t have[IDS_GROUPS];
    int n = getgroups(IDS_GROUPS, have);
    if (n < 0 || (size_t)n != ids->group_count)
        return false;
    for (int i = 0; i < n; i++)
        if (have[i] != ids->groups[i])
            return false;
    return true;
}

int ids_become(const struct ids *ids, uint64_t more) {
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct data[2];
    if (prctl(PR_SET_KEEPCAPS, 1) < 0 || (setgroups(ids->group_count, ids->groups) < 0 && !same_groups(ids)))
        return -1;
    if (setresgid(ids->gid, ids->gid, ids->gid) < 0 || setresuid(ids->uid, ids->uid, ids->uid) < 0)
        return -1;
    if (prctl(PR_SET_DUMPABLE, 0) < 0 || prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) < 0 || syscall(SYS_capget, &header, data) < 0)
        return -1;
    for (int i = 0; i < 2; i++) {
        uint32_t kept = (uint32_t)((ids->caps | more) >> 32 * i) & data[i].permitted;
        data[i] = (struct __user_cap_data_struct){.effective = kept, .permitted = kept};
    }
    return (int)syscall(SYS_capset, &header, data);
}
