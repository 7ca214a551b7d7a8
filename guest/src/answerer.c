#include "answerer.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "answer.h"
#include "fds.h"
#include "power.h"

static int end = -1;
static bool given;

pid_t answerer_fork(int intake, int listen, int said) {
    pid_t parent = getpid(), pid = fork();
    if (pid)
        return pid;
    if (prctl(PR_SET_PDEATHSIG, SIGKILL) < 0 || getppid() != parent)
        _exit(1);
    prctl(PR_SET_NAME, "tvinit-answer");
    sigset_t none;
    sigemptyset(&none);
    for (int s = 1; s < NSIG; s++)
        signal(s, SIG_DFL);
    sigprocmask(SIG_SETMASK, &none, NULL);
    if (said >= 0)
        dup2(said, 2);
    int kept[] = {intake, listen};
    close_all_but(kept, 2);
    _exit(answer_main(intake, listen));
}

void answerer_given(int fd) {
    end = fd;
    given = true;
}

/* Nobody but the answerer holds the other end. */
static bool gone(void) {
    struct pollfd news = {.fd = end};
    return end < 0 || (poll(&news, 1, 0) > 0 && news.revents & (POLLHUP | POLLERR));
}

int answerer_end(void) {
    if (given || !gone())
        return end;
    if (power_contained) { /* within its own walls it could be looked into */
        errno = EOPNOTSUPP;
        return -1;
    }
    int pair[2];
    if (end >= 0)
        close(end);
    end = -1;
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) < 0)
        return -1;
    pid_t pid = answerer_fork(pair[1], -1, -1);
    int saved = errno;
    close(pair[1]);
    if (pid > 0)
        end = pair[0];
    else
        close(pair[0]);
    errno = saved;
    return end;
}

void answerer_release(void) {
    if (given || end < 0)
        return;
    close(end);
    end = -1;
}
