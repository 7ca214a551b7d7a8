#include "keys.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pty.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

#define IN_CHILD __attribute__((no_sanitize("address", "undefined")))

bool keys_signal(void) {
    static enum { UNKNOWN, YES, NO } answer;
    int master, slave;
    char seen[4];
    if (answer == UNKNOWN && openpty(&master, &slave, NULL, NULL, NULL) == 0) {
        /* A line with a Ctrl-C and nothing else: what the reader gets of it is one byte, or two. */
        fcntl(slave, F_SETFL, O_RDWR | O_NONBLOCK);
        answer = write(master, "\003\n", 2) == 2 && read(slave, seen, sizeof seen) == 2 ? NO : YES;
        close(master);
        close(slave);
    }
    return answer != NO;
}

IN_CHILD static _Noreturn void listen_for_ever(int terminal, int told) {
    uint8_t number;
    pid_t group;
    setpgid(0, 0);
    dup2(terminal, 0);
    dup2(told, 1);
    syscall(SYS_close_range, 2, INT_MAX, 0);
    while (read(1, &number, 1) == 1)
        if (ioctl(0, TIOCGPGRP, &group) == 0 && group > 1)
            kill(-group, number);
    _exit(0);
}

IN_CHILD int keys_listen(int terminal, int told) {
    /* Twice, so that it is a child of PID 1 and not of the command. Not fork(3): we may share PID 1's memory. */
    pid_t pid = (pid_t)syscall(SYS_clone, SIGCHLD, NULL, NULL, NULL, NULL);
    if (pid == 0) {
        pid = (pid_t)syscall(SYS_clone, SIGCHLD, NULL, NULL, NULL, NULL);
        if (pid == 0)
            listen_for_ever(terminal, told);
        _exit(pid < 0 ? errno : 0);
    }
    int status = 0;
    while (pid > 0 && syscall(SYS_wait4, pid, &status, 0, NULL) < 0 && errno == EINTR)
        ;
    if (pid > 0 && status)
        errno = WEXITSTATUS(status);
    return pid < 0 || status ? -1 : 0;
}

static int signal_of(const struct termios *t, uint8_t key) {
    static const struct { int key, number; } SIGNALS[] = {{VINTR, SIGINT}, {VQUIT, SIGQUIT}, {VSUSP, SIGTSTP}};
    for (size_t i = 0; key != _POSIX_VDISABLE && i < sizeof SIGNALS / sizeof *SIGNALS; i++)
        if (t->c_cc[SIGNALS[i].key] == key)
            return SIGNALS[i].number;
    return 0;
}

ssize_t keys_write(int master, int tell, const uint8_t *data, size_t size) {
    struct termios t;
    if (tcgetattr(master, &t) < 0 || !(t.c_lflag & ISIG))
        return write(master, data, size);
    for (size_t i = 0; i < size; i++) {
        uint8_t number = (uint8_t)signal_of(&t, data[i]);
        if (number && i > 0)
            return write(master, data, i);
        if (number)
            /* Who types it faster than it is taken has said it often enough. */
            return write(tell, &number, 1) == 1 || errno == EAGAIN || errno == EPIPE ? 1 : -1;
    }
    return write(master, data, size);
}
