/* device NAME: a terminal at /dev/NAME whose other end is stdin and stdout, bytes as they are. The first line of stdout says that it is
 * there. It goes when this process does, however that ends, or when the name is removed; who has it open is hung up then. */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pty.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/inotify.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <termios.h>
#include <unistd.h>

#include "builtins.h"

enum { NAME_SIZE = 20, HELD = 64 * 1024 };

/* One direction: what was read and is not yet written. */
struct way {
    int from, to;
    size_t start, used;
    char data[HELD];
};

static struct way inward, outward;

static int unblock(int fd) {
    int flags = fcntl(fd, F_GETFL);
    return flags < 0 ? -1 : fcntl(fd, F_SETFL, flags | O_NONBLOCK);
}

/* 1: go on. 0: an end has gone. */
static int way_read(struct way *w) {
    ssize_t n = read(w->from, w->data, sizeof w->data);
    w->start = 0;
    w->used = n > 0 ? (size_t)n : 0;
    return n > 0 || (n < 0 && (errno == EAGAIN || errno == EINTR));
}

static int way_write(struct way *w) {
    ssize_t n = write(w->to, w->data + w->start, w->used);
    if (n < 0)
        return errno == EAGAIN || errno == EINTR;
    w->start += (size_t)n;
    w->used -= (size_t)n;
    return 1;
}

/* Whether /dev/NAME has been removed, or events were lost, which cannot be told from that. */
static bool removed(int news, const char *name) {
    char events[4096] __attribute__((aligned(__alignof__(struct inotify_event))));
    ssize_t n = read(news, events, sizeof events);
    for (char *at = events; n > 0 && at < events + n;) {
        const struct inotify_event *e = (const struct inotify_event *)at;
        if (e->mask & IN_Q_OVERFLOW ? access(name, F_OK) < 0 : e->len && !strcmp(e->name, name))
            return true;
        at += sizeof *e + e->len;
    }
    return false;
}

static void relay(int news, const char *name) {
    for (;;) {
        struct pollfd polls[] = {
            {inward.used ? -1 : inward.from, POLLIN, 0}, /* what has hung up is said again and again */
            {inward.to, (short)((inward.used ? POLLOUT : 0) | (outward.used ? 0 : POLLIN)), 0},
            {outward.to, outward.used ? POLLOUT : 0, 0},
            {news, POLLIN, 0},
        };
        if (poll(polls, 4, -1) < 0 && errno != EINTR)
            return;
        if (polls[3].revents && removed(news, name))
            return;
        if (polls[0].revents && !way_read(&inward))
            return;
        if (polls[1].revents & (POLLIN | POLLHUP) && !outward.used && !way_read(&outward))
            return;
        if (inward.used && !way_write(&inward))
            return;
        if ((outward.used && !way_write(&outward)) || polls[2].revents & POLLERR)
            return;
    }
}

/* Holds the terminal until it is hung up, so that its number is nobody else's while the name leads there, and takes the name away.
 * It is the terminal of this session, so it becomes that of no program that opens it, which the hang-up would kill. */
static void watch(int slave, int told, const char *terminal, const char *name) {
    char seen[64] = "";
    struct pollfd hangup = {.fd = STDIN_FILENO};
    signal(SIGHUP, SIG_IGN);
    if (setsid() < 0 || dup2(slave, STDIN_FILENO) < 0 || ioctl(STDIN_FILENO, TIOCSCTTY, 0) < 0 || write(told, "", 1) != 1)
        _exit(errno);
    syscall(SYS_close_range, 1, ~0U, 0);
    while (poll(&hangup, 1, -1) < 0 && errno == EINTR)
        ;
    if (readlink(name, seen, sizeof seen - 1) > 0 && !strcmp(seen, terminal))
        unlink(name);
    _exit(0);
}

int device_main(char **argv) {
    const char *name = argv[1];
    char terminal[64];
    struct termios raw;
    int master, slave, news, told[2];
    if (!*name || strlen(name) > NAME_SIZE || strchr(name, '/') || *name == '.')
        return errno = EINVAL, complain("device");
    if (chdir("/dev") < 0 || openpty(&master, &slave, NULL, NULL, NULL) < 0 || tcgetattr(slave, &raw) < 0)
        return complain("a terminal");
    cfmakeraw(&raw);
    errno = ttyname_r(slave, terminal, sizeof terminal - 1);
    if (errno || tcsetattr(slave, TCSANOW, &raw) < 0 || fchmod(slave, 0666) < 0)
        return complain("a terminal");
    news = inotify_init1(IN_CLOEXEC | IN_NONBLOCK);
    if (news < 0 || inotify_add_watch(news, ".", IN_DELETE | IN_MOVED_FROM) < 0 || pipe(told) < 0)
        return complain(name);
    pid_t pid = fork();
    if (pid == 0)
        watch(slave, told[1], terminal, name);
    close(told[1]);
    if (pid < 0 || read(told[0], terminal + sizeof terminal - 1, 1) != 1)
        return complain("a terminal");
    if (symlink(terminal, name) < 0)
        return complain(name);
    inward.from = STDIN_FILENO;
    inward.to = outward.from = master;
    outward.to = STDOUT_FILENO;
    if (unblock(STDIN_FILENO) < 0 || unblock(master) < 0 || write_all(STDOUT_FILENO, "there\n", 6) || unblock(STDOUT_FILENO) < 0)
        return complain(name);
    relay(news, name);
    return 0;
}
