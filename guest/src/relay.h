/* relay: what one machine's network needs of a process on the host (relay.c), the part of it that names machines (names.c), and its ports as
 * they come and go (ports.c). */
#ifndef TV_RELAY_H
#define TV_RELAY_H

#include <netinet/in.h>
#include <poll.h>
#include <stddef.h>
#include <stdint.h>

#define NAMES_UPSTREAMS 3
#define NAMES_PENDING 256
#define NAMES_MESSAGE 4096 /* the largest question or answer; EDNS asks for 1232 or 4096 at most */

/* A query that waits for an upstream's answer. */
struct pending {
    struct sockaddr_in from;
    uint16_t theirs; /* its number as the machine knows it */
    uint16_t ours;
    uint8_t used;
};

struct names {
    int fd;     /* bound UDP socket that the machine asks; -1: there are no names */
    int folder; /* a file for each machine of the network: its address as text; -1: of no network */
    int upstream[NAMES_UPSTREAMS];
    int upstreams;
    unsigned next;
    struct pending pending[NAMES_PENDING];
};

/* Answers a question about a machine of the network. `out` holds NAMES_MESSAGE bytes. Returns the answer's length, 0 if the
 * question is for others to answer, -1 if it is none. */
int names_answer(int folder, const uint8_t *query, size_t size, uint8_t *out);

/* Handles what poll(2) said of `names->fd` (which = -1) or of an upstream. */
void names_serve(struct names *names, int which);

#define LISTENERS 64

struct egress;

/* A listening socket, and where its connections go. */
struct listener {
    int fd;
    struct sockaddr_in to;
};

struct ports {
    int control; /* listening socket (SOCK_SEQPACKET) of who may change them; -1: they stay as they are */
    int rules;   /* the netlink socket that the machine's own table belongs to, kept for who changes it */
    struct listener listeners[LISTENERS];
    int count;
    struct egress *egress;                        /* whose decisions may be listened to; NULL: there is none */
    int (*changed)(const char *text, size_t size); /* takes over another policy */
};

/* Returns -1 with errno set. */
int ports_add(struct ports *ports, int fd, const char *address, const char *port);

/* Carries out one request at `ports->control`. `ended` is told of a listener before it goes. */
void ports_serve(struct ports *ports, void (*ended)(int listener));

#endif
