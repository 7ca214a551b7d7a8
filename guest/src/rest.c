#include "rest.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <poll.h>
#include <stdint.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "root.h"

enum { BEGIN_MS = 30000 };

/* Ours of a pipe: who holds the other end lets them go on when this is closed. */
static int end_fd = -1;

/* In a process of its own, which writes nothing: whoever writes waits, and it must end whatever becomes of the host. */
static _Noreturn void hold(int upper, int said, int end, int ms) {
    struct pollfd over = {.fd = end};
    int error = ioctl(upper, FIFREEZE, 0) < 0 ? errno : 0;
    if (write(said, &error, sizeof error) < 0 || error)
        _exit(1);
    close(said);
    poll(&over, 1, ms);
    _exit(ioctl(upper, FITHAW, 0) < 0);
}

int rest_begin(int ms) {
    int said[2], end[2], error = 0;
    if (end_fd >= 0)
        return EBUSY;
    int upper = root_upper();
    if (upper < 0)
        return -upper;
    if (pipe2(said, O_CLOEXEC) < 0 || pipe2(end, O_CLOEXEC) < 0)
        return errno;
    pid_t pid = fork();
    if (pid == 0) {
        /* The line must not stay open in it. */
        int kept[] = {upper, said[1], end[0]};
        for (int i = 0; i < 3; i++)
            kept[i] = fcntl(kept[i], F_DUPFD, 256);
        for (int i = 0; i < 3; i++)
            if (dup2(kept[i], 3 + i) < 0)
                _exit(1);
        syscall(SYS_close_range, 6, ~0U, 0);
        hold(3, 4, 5, ms);
    }
    error = pid < 0 ? errno : 0;
    close(upper);
    close(said[1]);
    close(end[0]);
    /* It has to write all that waits to be written first. */
    if (!error && poll(&(struct pollfd){.fd = said[0], .events = POLLIN}, 1, BEGIN_MS) != 1)
        error = ETIMEDOUT;
    if (!error && read(said[0], &error, sizeof error) != sizeof error)
        error = EIO;
    close(said[0]);
    if (error)
        close(end[1]);
    else
        end_fd = end[1];
    return error == EOPNOTSUPP ? ENODEV : error;
}

int rest_end(void) {
    if (end_fd < 0)
        return 0;
    struct pollfd there = {.fd = end_fd};
    int error = poll(&there, 1, 0) == 1 && there.revents & POLLERR ? ETIMEDOUT : 0;
    close(end_fd);
    end_fd = -1;
    return error;
}
