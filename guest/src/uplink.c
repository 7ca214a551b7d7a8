/* The way out of a machine whose host gives us no interface: one of the machine's own namespace (a veth), whose other end is not
 * another interface of the host but a packet socket, which is handed to a helper outside (fence.c).
 *
 * Not a tap: its device is closed to ordinary users on some hosts and is not there at all in most containers. The other end lies
 * in a namespace with nothing else in it, that lives as long as the socket: inside nobody can name it. */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/ethtool.h>
#include <linux/if_ether.h>
#include <linux/if_link.h>
#include <linux/if_packet.h>
#include <linux/sockios.h>
#include <linux/veth.h>
#include <net/if.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "launch.h"
#include "netlink.h"

#ifndef PACKET_IGNORE_OUTGOING
#define PACKET_IGNORE_OUTGOING 23
#endif

enum { QUEUE = 4 << 20 };
#define FAR "far"

static void setting(const char *path, const char *value) {
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0)
        return; /* a kernel without it */
    (void)!write(fd, value, strlen(value)); /* ids that the machine has not: the wider range is tried first */
    close(fd);
}

static bool make_pair(const char *near, const unsigned char *mac, uint32_t mtu, int near_ns) {
    struct netlink_request r = netlink_new(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL);
    uint32_t ns = (uint32_t)near_ns;
    netlink_put(&r, IFLA_IFNAME, FAR, sizeof FAR);
    netlink_put(&r, IFLA_MTU, &mtu, sizeof mtu);
    size_t link = netlink_open(&r, IFLA_LINKINFO, 0);
    netlink_put(&r, IFLA_INFO_KIND, "veth", 4);
    size_t data = netlink_open(&r, IFLA_INFO_DATA, 0);
    size_t peer = netlink_open(&r, VETH_INFO_PEER, sizeof(struct ifinfomsg));
    netlink_put(&r, IFLA_IFNAME, near, strlen(near) + 1);
    netlink_put(&r, IFLA_MTU, &mtu, sizeof mtu);
    netlink_put(&r, IFLA_ADDRESS, mac, ETH_ALEN);
    netlink_put(&r, IFLA_NET_NS_FD, &ns, sizeof ns);
    netlink_close(&r, peer);
    netlink_close(&r, data);
    netlink_close(&r, link);
    return netlink_ask_here(&r);
}

/* A socket that sees what comes out of the far end, and sends into it. */
static int far_end(void) {
    struct ifreq request = {.ifr_name = FAR};
    int one = 1, size = QUEUE, fd = socket(AF_PACKET, SOCK_RAW | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return -1;
    bool good = ioctl(fd, SIOCGIFFLAGS, &request) == 0;
    request.ifr_flags |= IFF_UP;
    good = good && ioctl(fd, SIOCSIFFLAGS, &request) == 0 && ioctl(fd, SIOCGIFINDEX, &request) == 0;
    struct sockaddr_ll at = {.sll_family = AF_PACKET, .sll_protocol = htons(ETH_P_ALL), .sll_ifindex = request.ifr_ifindex};
    setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &size, sizeof size); /* as much of it as the host allows */
    setsockopt(fd, SOL_PACKET, PACKET_IGNORE_OUTGOING, &one, sizeof one);
    if (good && bind(fd, (struct sockaddr *)&at, sizeof at) == 0)
        return fd;
    int saved = errno;
    close(fd);
    errno = saved;
    return -1;
}

/* What leaves the near end is whole: nobody further on makes its checksums or cuts it into frames. */
static bool plain_frames(const char *near) {
    static const uint32_t OFF[] = {ETHTOOL_STXCSUM, ETHTOOL_SSG, ETHTOOL_STSO, ETHTOOL_SGSO};
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    bool good = fd >= 0;
    for (size_t i = 0; good && i < sizeof OFF / sizeof *OFF; i++) {
        struct ethtool_value value = {.cmd = OFF[i]};
        struct ifreq request = {.ifr_data = (char *)&value};
        snprintf(request.ifr_name, sizeof request.ifr_name, "%s", near);
        good = ioctl(fd, SIOCETHTOOL, &request) == 0 || errno == EOPNOTSUPP;
    }
    int saved = errno;
    if (fd >= 0)
        close(fd);
    errno = saved;
    return good;
}

/* The socket, and the hardware address of the machine at its other end. */
static bool send_far(int to, int fd, unsigned char *mac) {
    union { struct cmsghdr header; char room[CMSG_SPACE(sizeof(int))]; } control = {{0}};
    struct iovec data = {.iov_base = mac, .iov_len = ETH_ALEN};
    struct msghdr message = {.msg_iov = &data, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
    control.header = (struct cmsghdr){.cmsg_len = CMSG_LEN(sizeof fd), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS};
    memcpy(CMSG_DATA(&control.header), &fd, sizeof fd);
    return sendmsg(to, &message, MSG_NOSIGNAL) == ETH_ALEN;
}

/* uplink FD IF MAC MTU */
int op_uplink(struct launch *l, const struct op *op) {
    (void)l;
    long long to, mtu;
    unsigned char mac[ETH_ALEN];
    int used = 0, far = -1;
    if (!plan_number(op->words[1], 0, 65535, &to) || strlen(op->words[2]) >= IFNAMSIZ || !plan_number(op->words[4], 68, 65535, &mtu) ||
        sscanf(op->words[3], "%2hhx:%2hhx:%2hhx:%2hhx:%2hhx:%2hhx%n", mac, mac + 1, mac + 2, mac + 3, mac + 4, mac + 5, &used) != 6 ||
        op->words[3][used])
        return errno = EINVAL, -1;
    int home = open("/proc/thread-self/ns/net", O_RDONLY | O_CLOEXEC);
    if (home < 0 || unshare(CLONE_NEWNET) < 0)
        return -1; /* all that is open is closed when the launch fails */
    /* Nobody is to be met at the far end, not even by IPv6's neighbour discovery. */
    setting("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1");
    setting("/proc/sys/net/ipv4/ip_forward", "0");
    bool made = make_pair(op->words[2], mac, (uint32_t)mtu, home) && (far = far_end()) >= 0;
    int saved = errno;
    if (setns(home, CLONE_NEWNET) < 0)
        return -1;
    close(home);
    errno = saved;
    if (!made || !plain_frames(op->words[2]) || !send_far((int)to, far, mac))
        return -1;
    close(far);
    /* As on the links that root makes: low ports and pings are open to all inside. */
    setting("/proc/sys/net/ipv4/ip_unprivileged_port_start", "0");
    setting("/proc/sys/net/ipv4/ping_group_range", "0 0");
    setting("/proc/sys/net/ipv4/ping_group_range", "0 65535");
    return 0;
}
