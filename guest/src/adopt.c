/* An interface made for a machine before there was a namespace of the machine's own. It is moved in by whoever owns both: a program
 * that works on the interface itself, as a network stack in user space does, must own the namespace that it lies in. */
#include <errno.h>
#include <fcntl.h>
#include <linux/if_link.h>
#include <sched.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "launch.h"
#include "netlink.h"

enum { NAME_MAX_BYTES = 15 };

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

bool adopt_interface(int net, const char *name, pid_t pid) {
    struct netlink_request r = netlink_new(RTM_SETLINK, 0);
    size_t size = strlen(name);
    if (size == 0 || size > NAME_MAX_BYTES) {
        errno = EINVAL;
        return false;
    }
    uint32_t to = (uint32_t)pid;
    netlink_put(&r, IFLA_IFNAME, name, size + 1);
    netlink_put(&r, IFLA_NET_NS_PID, &to, sizeof to);
    int fd = open_netlink(net);
    bool good = fd >= 0 && netlink_ask(fd, &r);
    int saved = errno;
    if (fd >= 0)
        close(fd);
    errno = saved;
    return good;
}
