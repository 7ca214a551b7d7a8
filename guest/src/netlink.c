#include "netlink.h"

#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum { ACK_MS = 5000 };

struct netlink_request netlink_new(unsigned short type, unsigned short flags) {
    struct netlink_request r = {.header = {.nlmsg_type = type, .nlmsg_flags = (unsigned short)(NLM_F_REQUEST | NLM_F_ACK | flags)}};
    r.header.nlmsg_len = NLMSG_LENGTH(sizeof r.info);
    return r;
}

/* `size` zeroed bytes at the end, NULL if they do not fit: the request is then too long for good. */
static char *extend(struct netlink_request *r, size_t size) {
    size_t at = NLMSG_ALIGN(r->header.nlmsg_len);
    if (at + NLMSG_ALIGN(size) > sizeof *r) {
        r->header.nlmsg_len = sizeof *r + 1;
        return NULL;
    }
    r->header.nlmsg_len = (unsigned)(at + NLMSG_ALIGN(size));
    return (char *)r + at;
}

void netlink_put(struct netlink_request *r, unsigned short type, const void *value, size_t size) {
    struct rtattr head = {.rta_type = type, .rta_len = (unsigned short)RTA_LENGTH(size)};
    char *place = extend(r, RTA_LENGTH(size));
    if (!place)
        return;
    memcpy(place, &head, sizeof head);
    if (size)
        memcpy(place + RTA_LENGTH(0), value, size);
}

size_t netlink_open(struct netlink_request *r, unsigned short type, size_t extra) {
    size_t at = NLMSG_ALIGN(r->header.nlmsg_len);
    netlink_put(r, type, NULL, 0);
    if (extra)
        extend(r, extra);
    return at;
}

void netlink_close(struct netlink_request *r, size_t at) {
    if (r->header.nlmsg_len > sizeof *r)
        return;
    unsigned short size = (unsigned short)(r->header.nlmsg_len - at);
    memcpy((char *)r + at + offsetof(struct rtattr, rta_len), &size, sizeof size);
}

bool netlink_ask(int fd, const struct netlink_request *r) {
    struct { struct nlmsghdr header; struct nlmsgerr error; char rest[512]; } answer;
    struct pollfd readable = {.fd = fd, .events = POLLIN};
    errno = EMSGSIZE;
    if (r->header.nlmsg_len > sizeof *r || send(fd, r, r->header.nlmsg_len, 0) < 0)
        return false;
    errno = ETIMEDOUT;
    if (poll(&readable, 1, ACK_MS) != 1)
        return false;
    ssize_t n = recv(fd, &answer, sizeof answer, 0);
    if (n < (ssize_t)NLMSG_LENGTH(sizeof answer.error) || answer.header.nlmsg_type != NLMSG_ERROR) {
        errno = n < 0 ? errno : EPROTO;
        return false;
    }
    errno = -answer.error.error;
    return errno == 0;
}

bool netlink_ask_here(const struct netlink_request *r) {
    int fd = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE);
    bool good = fd >= 0 && netlink_ask(fd, r);
    int saved = errno;
    if (fd >= 0)
        close(fd);
    errno = saved;
    return good;
}
