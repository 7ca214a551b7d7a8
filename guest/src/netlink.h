/* The few requests about interfaces that no ioctl makes (rtnetlink(7)). */
#ifndef TVINIT_NETLINK_H
#define TVINIT_NETLINK_H

#include <linux/netlink.h>
#include <linux/rtnetlink.h>
#include <stdbool.h>
#include <stddef.h>

struct netlink_request {
    struct nlmsghdr header;
    struct ifinfomsg info;
    char attributes[256];
};

/* A request of this type; flags beside NLM_F_REQUEST and NLM_F_ACK. */
struct netlink_request netlink_new(unsigned short type, unsigned short flags);

/* Append an attribute. `value` may be NULL where `size` is 0. What does not fit makes netlink_ask fail. */
void netlink_put(struct netlink_request *r, unsigned short type, const void *value, size_t size);

/* Begin an attribute that holds those put until netlink_close; returns what that takes. `extra` bytes of zeros come first. */
size_t netlink_open(struct netlink_request *r, unsigned short type, size_t extra);
void netlink_close(struct netlink_request *r, size_t at);

/* Send it on a NETLINK_ROUTE socket and wait, bounded, for the kernel's word. False with errno. */
bool netlink_ask(int fd, const struct netlink_request *r);

/* The same on a socket of our own network namespace. */
bool netlink_ask_here(const struct netlink_request *r);

#endif
