#include "tear.h"

#include <linux/capability.h>
#include <stdbool.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "rules.h"
#include "target.h"

static uint8_t bytes[RULES_KEEP];

/* On a file system that has a size: so not the kernel's own files, which look at who writes, and not memory without bound, which
 * would not be the machine's but ours (memfd_create(2)). Anything but a regular file could make us wait. */
static bool is_kept(int file) {
    struct stat st;
    struct statfs fs;
    return fstat(file, &st) == 0 && S_ISREG(st.st_mode) && fstatfs(file, &fs) == 0 && fs.f_blocks > 0;
}

int tear_open(const struct seccomp_notif *call) {
    if (call->data.nr != SYS_write && call->data.nr != SYS_pwrite64)
        return -1;
    int pidfd = target_pidfd((pid_t)call->pid);
    int file = pidfd < 0 ? -1 : (int)syscall(SYS_pidfd_getfd, pidfd, (int)call->data.args[0], 0);
    if (pidfd >= 0)
        close(pidfd);
    if (file >= 0 && !is_kept(file)) {
        close(file);
        file = -1;
    }
    return file;
}

/* Without our capabilities: a write by who may all leaves setuid bits where they are, and passes over quotas. */
static ssize_t write_plainly(int file, const struct seccomp_notif *call, size_t size) {
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct all[2], none[2];
    if (syscall(SYS_capget, &header, all) < 0)
        return -1;
    for (int i = 0; i < 2; i++)
        none[i] = (struct __user_cap_data_struct){.permitted = all[i].permitted, .inheritable = all[i].inheritable};
    if (syscall(SYS_capset, &header, none) < 0)
        return -1;
    ssize_t n = call->data.nr == SYS_write ? write(file, bytes, size) : pwrite(file, bytes, size, (off_t)call->data.args[3]);
    return syscall(SYS_capset, &header, all) < 0 ? -1 : n;
}

void tear_write(int file, const struct seccomp_notif *call, uint32_t keep) {
    size_t size = call->data.args[2] < keep ? (size_t)call->data.args[2] : keep;
    ssize_t n = size ? target_read((pid_t)call->pid, call->data.args[1], bytes, size) : 0;
    if (n > 0)
        n = write_plainly(file, call, (size_t)n);
    (void)n; /* fewer is torn, too */
}
