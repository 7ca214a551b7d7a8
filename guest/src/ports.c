/* Published ports of one machine, changed while it runs. A request is one packet of its own connection, and so is the answer, "ok" or why not:
 *
 *   publish ADDRESS PORT   with a listening socket: its connections go to ADDRESS:PORT
 *   withdraw PORT          the host's port is free again, and its connections end
 *   rules                  the answer carries the socket that the machine's table belongs to
 *   policy                 with a file: what the machine may talk to from now on (egress.c)
 *   decisions              with a socket: what is decided is said there, until it is closed
 *
 * Whoever can connect is the machine's owner, on the host: nothing of the guest comes here. A request is waited for a second at
 * most, for nobody else is served meanwhile. */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#include "egress.h"
#include "relay.h"

#define REQUEST 128

union carried {
    struct cmsghdr header;
    char space[CMSG_SPACE(sizeof(int))];
};

int ports_add(struct ports *ports, int fd, const char *address, const char *port) {
    struct listener new = {.fd = fd, .to = {.sin_family = AF_INET}};
    char *end;
    unsigned long number = strtoul(port, &end, 10);
    if (inet_pton(AF_INET, address, &new.to.sin_addr) != 1 || *end || !number || number > 65535)
        return errno = EINVAL, -1;
    if (ports->count == LISTENERS)
        return errno = ENOSPC, -1;
    new.to.sin_port = htons((uint16_t)number);
    if (fcntl(fd, F_SETFL, O_NONBLOCK) < 0)
        return -1;
    ports->listeners[ports->count++] = new;
    return 0;
}

/* Takes a port of the host's loopback back: other sockets here are not ports that somebody published. */
static int withdraw(struct ports *ports, const char *port, void (*ended)(int)) {
    for (int i = 0; i < ports->count; i++) {
        struct sockaddr_in at = {0};
        socklen_t size = sizeof at;
        int fd = ports->listeners[i].fd;
        if (getsockname(fd, (struct sockaddr *)&at, &size) < 0 || at.sin_addr.s_addr != htonl(INADDR_LOOPBACK) || ntohs(at.sin_port) != atoi(port))
            continue;
        ended(fd);
        close(fd);
        ports->listeners[i] = ports->listeners[--ports->count];
        return 0;
    }
    return errno = ENOENT, -1;
}

/* Receives a request; the descriptor that came with it is in `given`, -1 if there was none. */
static ssize_t receive(int client, char text[REQUEST], int *given) {
    union carried carried;
    struct iovec part = {text, REQUEST - 1};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = &carried, .msg_controllen = sizeof carried};
    ssize_t n = recvmsg(client, &message, MSG_CMSG_CLOEXEC);
    *given = -1;
    if (n < 0)
        return n;
    text[n] = 0;
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    if (header && header->cmsg_type == SCM_RIGHTS && header->cmsg_len == CMSG_LEN(sizeof(int)))
        memcpy(given, CMSG_DATA(header), sizeof(int));
    return n;
}

static void answer(int client, const char *text, int fd) {
    union carried carried = {.header = {.cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS, .cmsg_len = CMSG_LEN(sizeof(int))}};
    char copy[REQUEST];
    struct iovec part = {copy, (size_t)snprintf(copy, sizeof copy, "%s", text)};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
    if (fd >= 0) {
        memcpy(CMSG_DATA(&carried.header), &fd, sizeof(int));
        message.msg_control = &carried;
        message.msg_controllen = sizeof carried;
    }
    if (sendmsg(client, &message, MSG_NOSIGNAL | MSG_DONTWAIT) < 0)
        perror("relay: answering");
}

/* Reads a policy of a file that may be of anybody's size. */
static int take_policy(struct ports *ports, int fd) {
    static char text[EGRESS_TEXT];
    ssize_t n = pread(fd, text, sizeof text, 0);
    return n < 0 ? -1 : ports->changed(text, (size_t)n);
}

/* Returns -1 with errno set. `given` is taken over if it is used. */
static int carry_out(struct ports *ports, char *text, int *given, void (*ended)(int)) {
    char *verb = strtok(text, " "), *first = strtok(NULL, " "), *second = strtok(NULL, " ");
    if (verb && !strcmp(verb, "publish") && *given >= 0 && second) {
        if (ports_add(ports, *given, first, second) < 0)
            return -1;
        *given = -1;
        return 0;
    }
    if (verb && !strcmp(verb, "withdraw") && first)
        return withdraw(ports, first, ended);
    if (verb && !strcmp(verb, "policy") && !first && ports->changed && *given >= 0)
        return take_policy(ports, *given);
    if (verb && !strcmp(verb, "decisions") && !first && ports->egress && *given >= 0) {
        if (egress_listen(ports->egress, *given) < 0)
            return -1;
        *given = -1;
        return 0;
    }
    return errno = EINVAL, -1;
}

void ports_serve(struct ports *ports, void (*ended)(int listener)) {
    char text[REQUEST];
    int given = -1;
    int client = accept4(ports->control, NULL, NULL, SOCK_CLOEXEC);
    if (client < 0)
        return;
    struct timeval second = {.tv_sec = 1};
    if (setsockopt(client, SOL_SOCKET, SO_RCVTIMEO, &second, sizeof second) == 0 && receive(client, text, &given) > 0) {
        if (!strcmp(text, "rules"))
            answer(client, "ok", ports->rules);
        else
            answer(client, carry_out(ports, text, &given, ended) < 0 ? strerror(errno) : "ok", -1);
    }
    if (given >= 0)
        close(given);
    close(client);
}
