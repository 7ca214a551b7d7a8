/* Ports: requests of a machine's owner to its relay, in order and not. */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "check.h"
#include "relay.h"

static struct ports ports = {.control = -1, .rules = -1};
static struct sockaddr_un place = {.sun_family = AF_UNIX};
static int ended_with = -1;

static void ended(int listener) {
    ended_with = listener;
}

/* Listens on a free port of the loopback, or of another address of it. */
static int listener(const char *address, int *port) {
    struct sockaddr_in at = {.sin_family = AF_INET};
    socklen_t size = sizeof at;
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    CHECK(inet_pton(AF_INET, address, &at.sin_addr) == 1);
    CHECK(fd >= 0 && bind(fd, (struct sockaddr *)&at, sizeof at) == 0 && listen(fd, 1) == 0);
    CHECK(getsockname(fd, (struct sockaddr *)&at, &size) == 0);
    *port = ntohs(at.sin_port);
    return fd;
}

/* Sends a request with a descriptor (-1: none), has it served, and returns the descriptor that came with the answer. */
static int ask(const char *request, size_t size, int fd, char answer[256]) {
    union {
        struct cmsghdr header;
        char space[CMSG_SPACE(sizeof(int))];
    } carried = {.header = {.cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS, .cmsg_len = CMSG_LEN(sizeof(int))}};
    int client = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0), got = -1;
    CHECK(connect(client, (struct sockaddr *)&place, sizeof place) == 0);
    struct iovec part = {(char *)(size_t)request, size};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
    if (fd >= 0) {
        memcpy(CMSG_DATA(&carried.header), &fd, sizeof fd);
        message.msg_control = &carried;
        message.msg_controllen = sizeof carried;
    }
    if (size)
        CHECK(sendmsg(client, &message, 0) == (ssize_t)size);
    ports_serve(&ports, ended);
    part = (struct iovec){answer, 255};
    message = (struct msghdr){.msg_iov = &part, .msg_iovlen = 1, .msg_control = &carried, .msg_controllen = sizeof carried};
    ssize_t n = recvmsg(client, &message, 0);
    answer[n > 0 ? n : 0] = 0;
    if (n > 0 && CMSG_FIRSTHDR(&message))
        memcpy(&got, CMSG_DATA(&carried.header), sizeof got);
    close(client);
    return got;
}

static int says(const char *request, int fd, const char *expected) {
    char answer[256];
    int got = ask(request, strlen(request), fd, answer);
    if (got >= 0)
        close(got);
    if (strcmp(answer, expected))
        fprintf(stderr, "%s: %s\n", request, answer);
    return !strcmp(answer, expected);
}

static void comes_and_goes(void) {
    char request[64];
    int port, fd = listener("127.0.0.1", &port);
    CHECK(says("publish 10.0.0.2 80", fd, "ok"));
    CHECK(ports.count == 1 && ports.listeners[0].to.sin_port == htons(80) && ports.listeners[0].fd != fd);
    int kept = ports.listeners[0].fd;
    CHECK(fcntl(kept, F_GETFL) & O_NONBLOCK);
    snprintf(request, sizeof request, "withdraw %d", port);
    CHECK(says(request, -1, "ok"));
    CHECK(ports.count == 0 && ended_with == kept && fcntl(kept, F_GETFD) < 0);
    CHECK(says(request, -1, strerror(ENOENT)));
    close(fd);
}

static void others_stay(void) {
    char request[64];
    int port, fd = listener("127.0.0.2", &port);
    CHECK(ports_add(&ports, fd, "10.0.0.2", "53") == 0);
    snprintf(request, sizeof request, "withdraw %d", port);
    CHECK(says(request, -1, strerror(ENOENT)) && ports.count == 1);
    close(ports.listeners[--ports.count].fd);
}

static void nonsense(void) {
    int port, fd = listener("127.0.0.1", &port), before = dup(fd);
    close(before);
    static const char *const WRONG[] = {"publish 10.0.0.2",     "publish 10.0.0.2 0",  "publish 10.0.0.2 65536", "publish ten 80", "publish 10.0.0.2 8x",
                                        "withdraw",             "withdraw 0 0",        "rules now",              "x",              " "};
    for (size_t i = 0; i < sizeof WRONG / sizeof *WRONG; i++) {
        char answer[256];
        CHECK(ask(WRONG[i], strlen(WRONG[i]), fd, answer) < 0);
        CHECK(answer[0] && strcmp(answer, "ok") && ports.count == 0);
    }
    CHECK(says("publish 10.0.0.2 80", -1, strerror(EINVAL)));
    char long_one[300], answer[256];
    memset(long_one, 'p', sizeof long_one);
    ask(long_one, sizeof long_one, -1, answer);
    CHECK(strcmp(answer, "ok"));
    ask("", 0, -1, answer); /* says nothing: is let go after a second */
    CHECK(!answer[0]);
    int after = dup(fd);
    CHECK(after == before); /* no descriptor was kept */
    close(after);
    close(fd);
}

static void as_many_as_there_may_be(void) {
    int port, fds[LISTENERS + 1];
    for (int i = 0; i <= LISTENERS; i++) {
        fds[i] = listener("127.0.0.1", &port);
        CHECK(says("publish 10.0.0.2 80", fds[i], i < LISTENERS ? "ok" : strerror(ENOSPC)));
        close(fds[i]);
    }
    while (ports.count)
        close(ports.listeners[--ports.count].fd);
}

static void the_rules_are_lent(void) {
    char answer[256];
    ports.rules = open("/dev/null", O_RDWR | O_CLOEXEC);
    int got = ask("rules", 5, -1, answer);
    CHECK(!strcmp(answer, "ok") && got >= 0 && got != ports.rules);
    close(got);
    close(ports.rules);
}

int main(void) {
    char folder[] = "/tmp/ports-XXXXXX";
    CHECK(mkdtemp(folder));
    snprintf(place.sun_path, sizeof place.sun_path, "%s/control", folder);
    ports.control = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    CHECK(bind(ports.control, (struct sockaddr *)&place, sizeof place) == 0 && listen(ports.control, 4) == 0);
    comes_and_goes();
    others_stay();
    nonsense();
    as_many_as_there_may_be();
    the_rules_are_lent();
    close(ports.control);
    unlink(place.sun_path);
    rmdir(folder);
    return 0;
}
