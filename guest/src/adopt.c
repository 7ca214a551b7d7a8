/* An interface made for a machine before there was a namespace of the machine's own. It is moved in by whoever owns both: a program
 * that works on the interface itself, as a network stack in user space does, must own the namespace that it lies in. */
#include <errno.h>
#include <fcntl.h>
#include <linux/if_link.h>
#include <linux/netlink.h>
#include <linux/rtnetlink.h>
#include <poll.h>
#include <sched.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "launch.h"

enum { NAME_MAX_BYTES = 15, ACK_MS = 5000 };

struct request {
    struct nlmsghdr header;
    struct ifinfomsg info;
    char attributes[64];
};

static void put(struct request *r, unsigned short type, const void *value, size_t size) {
    struct rtattr *a = (struct rtattr *)((char *)r + NLMSG_ALIGN(r->header.nlmsg_len));
    a->rta_type = type;
    a->rta_len = (unsigned short)RTA_LENGTH(size);
    memcpy(RTA_DATA(a), value, size);
    r->header.nlmsg_len = (unsigned)(NLMSG_ALIGN(r->header.nlmsg_len) + RTA_ALIGN(a->rta_len));
}

/* A netlink socket of the namespace `net`; we are back in our own when it returns. */
static int open_netlink(int net) {
    int home = open("/proc/thread-self/ns/net", O_RDONLY | O_CLOEXEC);
    if (home < 0)
        return -1;
    int fd = setns(net, CLONE_NEWNET) < 0 ? -1 : socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE);
    int saved = errno;
    if (setns(home, CLONE_NEWNET) < 0)
        _exit(1); /* we would serve from another network */
    close(home);
    errno = saved;
    return fd;
}

static bool ask(int fd, const struct request *r) {
    struct { struct nlmsghdr header; struct nlmsgerr error; char rest[512]; } answer;
    struct pollfd readable = {.fd = fd, .events = POLLIN};
    if (send(fd, r, r->header.nlmsg_len, 0) < 0)
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

bool adopt_interface(int net, const char *name, pid_t pid) {
    struct request r = {.header = {.nlmsg_type = RTM_SETLINK, .nlmsg_flags = NLM_F_REQUEST | NLM_F_ACK}};
    r.header.nlmsg_len = NLMSG_LENGTH(sizeof r.info);
    size_t size = strlen(name);
    if (size == 0 || size > NAME_MAX_BYTES) {
        errno = EINVAL;
        return false;
    }
    uint32_t to = (uint32_t)pid;
    put(&r, IFLA_IFNAME, name, size + 1);
    put(&r, IFLA_NET_NS_PID, &to, sizeof to);
    int fd = open_netlink(net);
    bool good = fd >= 0 && ask(fd, &r);
    int saved = errno;
    if (fd >= 0)
        close(fd);
    errno = saved;
    return good;
}
