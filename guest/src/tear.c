#include "tear.h"

#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "rules.h"
#include "target.h"

static uint8_t bytes[RULES_KEEP];

int tear_open(const struct seccomp_notif *call) {
    struct stat st;
    if (call->data.nr != SYS_write && call->data.nr != SYS_pwrite64)
        return -1;
    int pidfd = target_pidfd((pid_t)call->pid);
    int file = pidfd < 0 ? -1 : (int)syscall(SYS_pidfd_getfd, pidfd, (int)call->data.args[0], 0);
    if (pidfd >= 0)
        close(pidfd);
    /* Anything else could make us wait. */
    if (file >= 0 && (fstat(file, &st) < 0 || !S_ISREG(st.st_mode))) {
        close(file);
        file = -1;
    }
    return file;
}

void tear_write(int file, const struct seccomp_notif *call, uint32_t keep) {
    size_t size = call->data.args[2] < keep ? (size_t)call->data.args[2] : keep;
    ssize_t n = size ? target_read((pid_t)call->pid, call->data.args[1], bytes, size) : 0;
    if (n <= 0)
        return;
    if (call->data.nr == SYS_write)
        n = write(file, bytes, (size_t)n);
    else
        n = pwrite(file, bytes, (size_t)n, (off_t)call->data.args[3]);
    (void)n; /* fewer is torn, too */
}
