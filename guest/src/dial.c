#include "dial.h"

#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "line.h"
#include "loop.h"

enum { GIVE_UP_MS = 60000, FIRST_MS = 5, MOST_MS = 200, SOON_MS = 20, SOON_FOR_MS = 3000, DRAIN_MS = 1000 };

static const char *number;
static int64_t next, until, pause_ms;
static bool leaving;

static int call(void) {
    struct sockaddr_un to = {.sun_family = AF_UNIX};
    if (strlen(number) >= sizeof to.sun_path) {
        errno = ENAMETOOLONG;
        return -1;
    }
    strcpy(to.sun_path, number);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd >= 0 && connect(fd, (struct sockaddr *)&to, sizeof to) < 0) {
        int error = errno;
        close(fd);
        errno = error;
        return -1;
    }
    return fd;
}

int dial(const char *path) {
    number = path;
    return call();
}

bool dial_again(void) {
    int64_t now = now_ms();
    if (!number)
        return false;
    if (!until) {
        until = now + GIVE_UP_MS;
        pause_ms = FIRST_MS;
        next = now;
    }
    if (now < next)
        return true;
    int fd = call();
    if (fd >= 0 && line_open(fd) == 0) {
        until = next = 0;
        return true;
    }
    if (fd >= 0)
        close(fd);
    /* Nothing tells when a socket is listened on again. */
    next = now + pause_ms;
    int64_t most = until - now > GIVE_UP_MS - SOON_FOR_MS ? SOON_MS : MOST_MS;
    pause_ms = pause_ms * 2 < most ? pause_ms * 2 : most;
    return now < until;
}

int dial_away(void) {
    leaving = number != NULL;
    return leaving ? 0 : ENOTCONN;
}

void dial_leave(void) {
    if (!leaving)
        return;
    leaving = false;
    line_drain(DRAIN_MS);
    line_close();
}

int dial_wait(void) {
    int64_t left = next - now_ms();
    return !until ? -1 : left > 0 ? (int)left : 0;
}
