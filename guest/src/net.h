/* Interfaces, addresses and routes, by ioctl (netdevice(7)). Each returns 0 or errno. */
#ifndef TVINIT_NET_H
#define TVINIT_NET_H

int net_up(const char *interface);

/* IPv4. gateway NULL: no default route. */
int net_address(const char *interface, const char *address, const char *prefix, const char *gateway);

/* IPv4: to a network, by a gateway. */
int net_route(const char *interface, const char *network, const char *prefix, const char *gateway);

/* aa:bb:cc:dd:ee:ff */
int net_mac(const char *interface, const char *address);

#endif
