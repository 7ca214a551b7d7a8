/* egress: names that one machine may talk to. The host's kernel sends the machine's questions for names and its new TCP connections to us (own.py), and
 * nothing else out; we answer the names that are allowed (egress_dns.c), look at what a connection says first (egress_tcp.c), and splice it on. What is allowed
 * and which addresses were given for which name is in egress.c. Everything that comes from the machine, and what resolvers answer, is hostile. */
#ifndef TV_EGRESS_H
#define TV_EGRESS_H

#include <netinet/in.h>
#include <stddef.h>
#include <stdint.h>

#include "peek.h"
#include "relay.h"

#define EGRESS_RULES 256
#define EGRESS_TEXT (EGRESS_RULES * 320)
#define EGRESS_KNOWN 2048
#define EGRESS_EARS 4
#define EGRESS_LINE 512
#define EGRESS_NOTED 128

enum policy_kind {
    POLICY_OPEN,   /* there is none */
    POLICY_CLOSED, /* addresses only, which are the kernel's affair */
    POLICY_NAMES,
};

struct name_rule {
    char name[PEEK_NAME]; /* of a wildcard what follows the star, with its dot */
    uint8_t wild, plain;
    uint16_t first, last;
};

struct range_rule {
    uint32_t network, mask;
};

/* An address that was given for a name. */
struct known {
    char name[PEEK_NAME];
    uint8_t address[4];
    int64_t until;
};

struct policy {
    enum policy_kind kind;
    struct name_rule names[EGRESS_RULES];
    struct range_rule ranges[EGRESS_RULES];
    int named, ranged;
};

struct egress {
    struct policy policy;
    struct known known[EGRESS_KNOWN];
    int ears[EGRESS_EARS]; /* sockets of who listens to decisions, -1: none */
    uint64_t unheard;
    int notes; /* a file that takes the first refusal of each kind, so many in all; -1: none */
    uint64_t noted[EGRESS_NOTED];
    int notes_taken;
};

/* Takes over a policy (own.py writes it). Returns -1 and changes nothing if it is malformed. */
int egress_take(struct egress *egress, const char *text, size_t size);

/* Whether some connection to a name is allowed; to a port of it, of which we see the name (plain: do not). */
int egress_asks(const struct egress *egress, const char *name);
int egress_allows(const struct egress *egress, const char *name, uint16_t port, int plain);

/* Whether a rule allows an address itself. */
int egress_ranged(const struct egress *egress, const uint8_t address[4]);

/* Remembers that a name has an address until `until`; the one that would end first goes if there is no room. */
void egress_learn(struct egress *egress, const char *name, const uint8_t address[4], int64_t now, int64_t until);

/* Whether a name has an address. */
int egress_knows(const struct egress *egress, const char *name, const uint8_t address[4], int64_t now);

/* Returns a name that has this address and is allowed at `port` without being seen, else any that has it, else NULL. */
const char *egress_named(const struct egress *egress, const uint8_t address[4], uint16_t port, int64_t now, int *plain);

/* Says a decision to who listens: one line a datagram, whose parts have tabs between them. `address` may be NULL, `name` and `why` "". */
void egress_say(struct egress *egress, int allowed, const char *protocol, const uint8_t *address, unsigned port, const char *name, const char *why);

/* Takes over a socket that decisions go to. Returns -1 with errno set. */
int egress_listen(struct egress *egress, int fd);

int64_t egress_now(void); /* milliseconds */

/* The machine's questions for names while a policy names some. */
#define DNS_PENDING 256
#define DNS_CLIENTS 16
#define DNS_QUESTION 512 /* bytes: a question with a name of 255 and options has fewer */

struct asker {
    struct sockaddr_in from; /* over UDP */
    int client;              /* over TCP: index; -1: UDP */
    unsigned serial;         /* of that client */
};

struct question {
    struct asker asker;
    char name[PEEK_NAME];
    uint8_t head[DNS_QUESTION]; /* the machine's own header and question */
    size_t size;
    uint16_t ours;
    uint8_t used, left;
};

struct dns_client {
    int fd; /* -1: free */
    unsigned serial;
    size_t have;
    int64_t until;
    uint8_t data[2 + DNS_QUESTION];
};

struct dns {
    struct egress *egress;
    struct names *names; /* the sockets, and the machines of the network */
    struct question pending[DNS_PENDING];
    struct dns_client clients[DNS_CLIENTS];
    unsigned next, serial;
    char refused[PEEK_NAME]; /* the last that was said, and when: programs ask for two types of address at once, and again */
    int64_t refused_at;
    int64_t budget, spent; /* questions passed on: how many may be, in thousandths, and when that was reckoned */
};

void dns_begin(struct dns *dns, struct egress *egress, struct names *names);
void dns_asked(struct dns *dns);                  /* names->fd has a question */
void dns_answered(struct dns *dns, int which);    /* an upstream has an answer */
void dns_accepted(struct dns *dns, int fd);       /* a connection, taken over */
void dns_read(struct dns *dns, int client);       /* a connection has something to say */
void dns_expire(struct dns *dns, int64_t now);

/* The machine's connections. */
#define GATE_CONNECTIONS 512
#define GATE_PIECES 64
#define GATE_HELLO 10000
#define GATE_CONNECT 30000
#define GATE_CHUNK (1 << 20)

enum stage { GATE_FREE, GATE_SAYS, GATE_REACHES, GATE_CARRIES };

struct lane {
    int pipe[2]; /* -1: none yet */
    size_t held;
    uint8_t ended; /* 1: its reader has seen the end; 2: passed on */
};

struct passage {
    enum stage stage;
    int fd[2]; /* the machine, beyond */
    struct sockaddr_in to;
    char name[PEEK_NAME];
    uint8_t plain, again;
    int pieces;
    unsigned serial;
    int64_t until;
    struct lane lane[2]; /* 0: from the machine */
};

struct gate {
    struct egress *egress;
    int listener, epoll;
    int count, busy; /* passages; those that have more to carry at once */
    unsigned serial;
    struct passage passages[GATE_CONNECTIONS];
    /* What the kernel says that a connection was for; how the world beyond is reached. Tests have others. */
    int (*meant)(int fd, struct sockaddr_in *to);
    int (*reach)(const struct sockaddr_in *to, const char **why);
};

int gate_begin(struct gate *gate, struct egress *egress, int listener);
void gate_serve(struct gate *gate);  /* gate->epoll is readable, or gate->busy */
void gate_changed(struct gate *gate); /* the policy is another: what it does not allow ends */
void gate_expire(struct gate *gate, int64_t now);

#endif
