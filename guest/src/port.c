#include "port.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/netlink.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "loop.h"

#define PORTS "/sys/class/virtio-ports"

enum { RESCAN_MS = 100, KERNEL_EVENTS = 1 };

static int events_open(void) {
    struct sockaddr_nl address = {.nl_family = AF_NETLINK, .nl_groups = KERNEL_EVENTS};
    int fd = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC | SOCK_NONBLOCK, NETLINK_KOBJECT_UEVENT);
    if (fd >= 0 && bind(fd, (struct sockaddr *)&address, sizeof address) < 0) {
        close(fd);
        return -1;
    }
    return fd;
}

/* The number in the device's name moves when devices are added, so it is known by what the host called it. */
static int scan(const char *name) {
    DIR *d = opendir(PORTS);
    int found = -1;
    if (!d)
        return -1;
    for (struct dirent *e; found < 0 && (e = readdir(d));) {
        char path[320], text[128] = "";
        snprintf(path, sizeof path, PORTS "/%s/name", e->d_name);
        int fd = e->d_name[0] == '.' ? -1 : open(path, O_RDONLY | O_CLOEXEC);
        if (fd < 0)
            continue;
        if (read(fd, text, sizeof text - 1) > 0)
            text[strcspn(text, "\n")] = 0;
        close(fd);
        if (strcmp(text, name) != 0)
            continue;
        snprintf(path, sizeof path, "/dev/%s", e->d_name);
        found = open(path, O_RDWR | O_NONBLOCK | O_CLOEXEC | O_NOCTTY);
    }
    closedir(d);
    return found;
}

int port_open(const char *name, int ms) {
    /* Listen before looking, so that no port slips in between. The events are only a reason to look again. */
    int events = events_open(), found;
    int64_t end = now_ms() + ms;
    while ((found = scan(name)) < 0 && now_ms() < end) {
        struct pollfd p = {.fd = events, .events = POLLIN};
        char event[4096];
        poll(&p, 1, RESCAN_MS);
        while (events >= 0 && recv(events, event, sizeof event, 0) > 0) {
        }
    }
    if (events >= 0)
        close(events);
    if (found < 0)
        errno = ENODEV;
    return found;
}
