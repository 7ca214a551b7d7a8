/* What the tests of egress by name share: a policy, sockets of the loopback, and what was decided. */
#ifndef TVINIT_EGRESSING_H
#define TVINIT_EGRESSING_H

#include <arpa/inet.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>

#include "check.h"
#include "egress.h"

static struct egress egress;
static int ear; /* what is decided is said here */

static inline int take(const char *text) {
    return egress_take(&egress, text, strlen(text));
}

static inline int bound(int kind, struct sockaddr_in *at) {
    socklen_t size = sizeof *at;
    *at = (struct sockaddr_in){.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int fd = socket(AF_INET, kind | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    CHECK(fd >= 0 && bind(fd, (struct sockaddr *)at, sizeof *at) == 0 && getsockname(fd, (struct sockaddr *)at, &size) == 0);
    if (kind == SOCK_STREAM)
        CHECK(listen(fd, 600) == 0);
    return fd;
}

/* Whether the last decision that was said is this. */
static inline int said(const char *protocol, const char *verdict, const char *name, const char *why) {
    char line[EGRESS_LINE], last[EGRESS_LINE] = "", wanted[EGRESS_LINE];
    ssize_t n;
    while ((n = recv(ear, line, sizeof line - 1, MSG_DONTWAIT)) > 0) {
        line[n] = 0;
        memcpy(last, line, sizeof last);
    }
    char *tail = strchr(last, '\t');
    snprintf(wanted, sizeof wanted, "\t%s\t%s\t", verdict, protocol);
    if (!tail || strncmp(tail, wanted, strlen(wanted)))
        return fprintf(stderr, "%s\n", last), 0;
    snprintf(wanted, sizeof wanted, "\t%s\t%s\t", name, why);
    return strstr(tail, wanted) ? 1 : (fprintf(stderr, "%s\n", last), 0);
}

static inline void listen_to_decisions(void) {
    int ends[2];
    egress.notes = -1;
    for (int i = 0; i < EGRESS_EARS; i++)
        egress.ears[i] = -1;
    CHECK(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, ends) == 0 && egress_listen(&egress, ends[1]) == 0);
    ear = ends[0];
}

#endif
