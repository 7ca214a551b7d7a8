/* connect HOST PORT: joins stdin and stdout to a TCP connection inside the machine. HOST is an IPv4 or IPv6
 * address or "localhost": names are not looked up, since a static program cannot ask the machine's resolver. */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "builtins.h"

static socklen_t address_of(const char *host, const char *port, struct sockaddr_storage *out) {
    char *end;
    unsigned long number = strtoul(port, &end, 10);
    struct sockaddr_in *four = (struct sockaddr_in *)out;
    struct sockaddr_in6 *six = (struct sockaddr_in6 *)out;
    if (*end || number < 1 || number > 65535)
        return 0;
    memset(out, 0, sizeof *out);
    if (inet_pton(AF_INET, strcmp(host, "localhost") ? host : "127.0.0.1", &four->sin_addr) == 1) {
        four->sin_family = AF_INET;
        four->sin_port = htons((uint16_t)number);
        return sizeof *four;
    }
    if (inet_pton(AF_INET6, host, &six->sin6_addr) == 1) {
        six->sin6_family = AF_INET6;
        six->sin6_port = htons((uint16_t)number);
        return sizeof *six;
    }
    return 0;
}

/* One read and its writes. 1: more may come, 0: end of file, -1: errno. */
static int pump(int from, int to) {
    static char buffer[65536];
    ssize_t n = read(from, buffer, sizeof buffer);
    if (n < 0)
        return errno == EINTR || errno == EAGAIN ? 1 : -1;
    int error = n ? write_all(to, buffer, (size_t)n) : 0;
    errno = error;
    return error ? -1 : n > 0;
}

int connect_main(char **argv) {
    struct sockaddr_storage address;
    socklen_t size = address_of(argv[1], argv[2], &address);
    if (!size)
        return errno = EINVAL, complain("connect");
    int fd = socket(address.ss_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0 || connect(fd, (struct sockaddr *)&address, size) < 0)
        return complain(argv[1]);
    struct pollfd polls[2] = {{.fd = STDIN_FILENO, .events = POLLIN}, {.fd = fd, .events = POLLIN}};
    while (polls[1].fd >= 0) {
        if (poll(polls, 2, -1) < 0 && errno != EINTR)
            return complain("poll");
        if (polls[0].revents) {
            int more = pump(STDIN_FILENO, fd);
            if (more < 0)
                return complain(argv[1]);
            if (!more) {
                shutdown(fd, SHUT_WR);
                polls[0].fd = -1;
            }
        }
        if (polls[1].revents) {
            int more = pump(fd, STDOUT_FILENO);
            if (more < 0)
                return complain(argv[1]);
            if (!more)
                polls[1].fd = -1;
        }
    }
    return 0;
}
