#include "net.h"

#include <arpa/inet.h>
#include <errno.h>
#include <net/if.h>
#include <net/if_arp.h>
#include <net/route.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

static bool request_of(const char *interface, struct ifreq *r) {
    memset(r, 0, sizeof *r);
    if (!*interface || strlen(interface) >= sizeof r->ifr_name)
        return false;
    strcpy(r->ifr_name, interface);
    return true;
}

/* Open a socket, apply one change, close it. */
static int control(unsigned long what, void *argument) {
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return errno;
    int error = ioctl(fd, what, argument) < 0 ? errno : 0;
    close(fd);
    return error;
}

static int set_up(struct ifreq *r, bool up) {
    int error = control(SIOCGIFFLAGS, r);
    if (error)
        return error;
    r->ifr_flags = (short)(up ? r->ifr_flags | IFF_UP : r->ifr_flags & ~IFF_UP);
    return control(SIOCSIFFLAGS, r);
}

int net_up(const char *interface) {
    struct ifreq r;
    return request_of(interface, &r) ? set_up(&r, true) : EINVAL;
}

static bool ipv4(const char *text, struct sockaddr *out) {
    struct sockaddr_in a = {.sin_family = AF_INET};
    if (inet_pton(AF_INET, text, &a.sin_addr) != 1)
        return false;
    memcpy(out, &a, sizeof a);
    return true;
}

static struct sockaddr netmask(unsigned long bits) {
    struct sockaddr_in mask = {.sin_family = AF_INET, .sin_addr.s_addr = bits ? htonl(~0U << (32 - bits)) : 0};
    struct sockaddr out;
    memcpy(&out, &mask, sizeof out);
    return out;
}

int net_route(const char *interface, const char *network, const char *prefix, const char *gateway) {
    struct rtentry route = {.rt_flags = RTF_UP | RTF_GATEWAY, .rt_dev = (char *)interface};
    char *end;
    unsigned long bits = strtoul(prefix, &end, 10);
    if (!*prefix || *end || bits > 32 || !ipv4(network, &route.rt_dst) || !ipv4(gateway, &route.rt_gateway))
        return EINVAL;
    route.rt_genmask = netmask(bits);
    int error = control(SIOCADDRT, &route);
    return error == EEXIST ? 0 : error;
}

int net_address(const char *interface, const char *address, const char *prefix, const char *gateway) {
    struct ifreq r;
    char *end;
    unsigned long bits = strtoul(prefix, &end, 10);
    if (!request_of(interface, &r) || !*prefix || *end || bits > 32 || !ipv4(address, &r.ifr_addr))
        return EINVAL;
    int error = control(SIOCSIFADDR, &r);
    if (error)
        return error;
    r.ifr_netmask = netmask(bits);
    if ((error = control(SIOCSIFNETMASK, &r)) || (error = set_up(&r, true)) || !gateway)
        return error;
    return net_route(interface, "0.0.0.0", "0", gateway);
}

int net_mac(const char *interface, const char *address) {
    struct ifreq r;
    unsigned char mac[6];
    int used = 0;
    if (!request_of(interface, &r))
        return EINVAL;
    if (sscanf(address, "%2hhx:%2hhx:%2hhx:%2hhx:%2hhx:%2hhx%n", mac, mac + 1, mac + 2, mac + 3, mac + 4, mac + 5, &used) != 6 ||
        address[used])
        return EINVAL;
    int error = control(SIOCGIFFLAGS, &r);
    bool up = !error && r.ifr_flags & IFF_UP;
    /* Most drivers take an address only while the interface is down. */
    if (error || (up && (error = set_up(&r, false))))
        return error;
    r.ifr_hwaddr.sa_family = ARPHRD_ETHER;
    memcpy(r.ifr_hwaddr.sa_data, mac, sizeof mac);
    error = control(SIOCSIFHWADDR, &r);
    int again = up ? set_up(&r, true) : 0;
    return error ? error : again;
}
