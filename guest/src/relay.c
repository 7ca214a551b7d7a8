/* tvinit relay: published ports and names of one machine, on the host, under its keeper.
 *
 *   tvinit relay [tcp:FD:ADDRESS:PORT]... [names:FD] [questions:FD] [gate:FD] [policy:FD] [notes:FD] [folder:PATH] [upstream:ADDRESS]...
 *               [control:FD:RULES]
 *
 * FD of tcp is a listening socket, whose connections go to ADDRESS:PORT; FD of names a bound UDP socket (names.c). Both were made by who
 * started us, so that a port that is taken is that one's error, and so that we need no privilege. A published port is free
 * again in the instant that the machine ends, and goes on when the process that started it does not. FD of control is a listening socket,
 * for ports that come and go while the machine runs (ports.c). FDs of questions and gate are listening, too: for questions for names over TCP, and for the
 * machine's connections while a policy names whom it may talk to (egress.h); FD of policy is a file that says so from the beginning, FD of notes one that
 * refusals are written to. */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include "egress.h"
#include "modes.h"
#include "relay.h"

#define CONNECTIONS 512
#define CHUNK 16384
#define SWEEP 1000 /* milliseconds between looks at what has waited too long */

/* One way of a connection. */
struct way {
    size_t start, end; /* what of the buffer is still to be written */
    int ended;         /* 1: its reader has seen the end; 2: passed on */
    char data[CHUNK];
};

struct connection {
    int fd[2]; /* client, machine */
    int connecting;
    int listener; /* that it came through: a descriptor */
    struct way *way[2]; /* 0: client to machine */
};

static struct ports ports = {.control = -1, .rules = -1};
static struct connection connections[CONNECTIONS];
static int connected;
static struct names names = {.fd = -1, .folder = -1};
static struct listener questions = {.fd = -1}; /* over TCP: to the first resolver, or answered by us */
static int gate_listener = -1;
static struct egress egress = {.ears = {-1, -1, -1, -1}, .notes = -1};
static struct dns dns;
static struct gate gate = {.epoll = -1};

static void end_connection(int at) {
    for (int i = 0; i < 2; i++) {
        close(connections[at].fd[i]);
        free(connections[at].way[i]);
    }
    connections[at] = connections[--connected];
}

/* Begins a connection to the machine for one that was accepted. */
static void begin_connection(const struct listener *from, int client) {
    struct connection new = {.fd = {client, -1}, .connecting = 1, .listener = from->fd};
    new.fd[1] = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    new.way[0] = calloc(1, sizeof *new.way[0]);
    new.way[1] = calloc(1, sizeof *new.way[1]);
    connections[connected++] = new;
    int begun = new.fd[1] >= 0 && connect(new.fd[1], (const struct sockaddr *)&from->to, sizeof from->to);
    if (new.fd[1] < 0 || (begun && errno != EINPROGRESS) || !new.way[0] || !new.way[1])
        end_connection(connected - 1);
}

/* Ends the connections that came through a listener, which is to go. */
static void end_connections(int listener) {
    for (int i = connected - 1; i >= 0; i--)
        if (connections[i].listener == listener)
            end_connection(i);
}

/* Moves what can be moved from `from` to `to`. Returns -1 when the connection is broken. */
static int move(struct way *way, int from, int to) {
    if (way->start == way->end && !way->ended) {
        ssize_t n = read(from, way->data, CHUNK);
        if (n < 0)
            return errno == EAGAIN || errno == EINTR ? 0 : -1;
        way->start = 0;
        way->end = (size_t)n;
        way->ended = n == 0;
    }
    if (way->start < way->end) {
        ssize_t n = send(to, way->data + way->start, way->end - way->start, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n < 0)
            return errno == EAGAIN || errno == EINTR ? 0 : -1;
        way->start += (size_t)n;
    }
    if (way->ended == 1 && way->start == way->end) {
        way->ended = 2;
        shutdown(to, SHUT_WR);
    }
    return 0;
}

static short wanted(const struct connection *one, int side) {
    if (one->connecting)
        return side ? POLLOUT : 0;
    const struct way *in = one->way[side], *out = one->way[!side];
    return (short)((in->start == in->end && !in->ended ? POLLIN : 0) | (out->start < out->end ? POLLOUT : 0));
}

/* Returns 1 when the connection has ended. */
static int serve(struct connection *one, short client, short machine) {
    if (one->connecting) {
        int error = 0;
        socklen_t size = sizeof error;
        if (!machine && !(client & (POLLHUP | POLLERR)))
            return 0;
        if (!machine || getsockopt(one->fd[1], SOL_SOCKET, SO_ERROR, &error, &size) || error)
            return 1;
        one->connecting = 0;
        return 0;
    }
    if (!client && !machine)
        return 0;
    for (int side = 0; side < 2; side++)
        if (move(one->way[side], one->fd[side], one->fd[!side]) < 0)
            return 1;
    return (one->way[0]->ended == 2 && one->way[1]->ended == 2) || ((client | machine) & POLLERR);
}

static void accept_question(void) {
    int client = accept4(questions.fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (client < 0)
        return;
    if (egress.policy.kind == POLICY_NAMES)
        dns_accepted(&dns, client);
    else if (connected < CONNECTIONS && questions.to.sin_family)
        begin_connection(&questions, client);
    else
        close(client);
}

/* The machine's owner has another policy: what it does not allow ends. */
static int changed(const char *text, size_t size) {
    if (egress_take(&egress, text, size) < 0)
        return -1;
    if (egress.policy.kind != POLICY_OPEN)
        end_connections(questions.fd);
    gate_changed(&gate);
    return 0;
}

/* Serves those who ask for names, and who connects beyond. `polls` are as egress_polls made them. */
static void serve_egress(const struct pollfd *polls) {
    static int64_t expires;
    int64_t now = egress_now();
    for (int i = -1; i < names.upstreams; i++) {
        if (!polls[1 + i].revents)
            continue;
        if (egress.policy.kind != POLICY_NAMES)
            names_serve(&names, i);
        else if (i < 0)
            dns_asked(&dns);
        else
            dns_answered(&dns, i);
    }
    polls += 1 + names.upstreams;
    if (polls[0].revents)
        accept_question();
    if (polls[1].revents || gate.busy)
        gate_serve(&gate);
    for (int i = 0; i < DNS_CLIENTS; i++)
        if (polls[2 + i].revents && polls[2 + i].fd == dns.clients[i].fd)
            dns_read(&dns, i);
    if (now < expires)
        return;
    expires = now + SWEEP;
    dns_expire(&dns, now);
    gate_expire(&gate, now);
}

static int egress_polls(struct pollfd *polls) {
    int n = 0;
    polls[n++] = (struct pollfd){.fd = names.fd, .events = POLLIN};
    for (int i = 0; i < names.upstreams; i++)
        polls[n++] = (struct pollfd){.fd = names.upstream[i], .events = POLLIN};
    polls[n++] = (struct pollfd){.fd = questions.fd, .events = POLLIN};
    polls[n++] = (struct pollfd){.fd = gate.epoll, .events = POLLIN};
    for (int i = 0; i < DNS_CLIENTS; i++)
        polls[n++] = (struct pollfd){.fd = dns.clients[i].fd, .events = POLLIN};
    return n;
}

static int patience(void) {
    return gate.busy ? 0 : gate.count || egress.policy.kind == POLICY_NAMES ? SWEEP : -1;
}

static int loop(void) {
    static struct pollfd polls[LISTENERS + 4 + NAMES_UPSTREAMS + DNS_CLIENTS + 2 * CONNECTIONS];
    for (;;) {
        int n = 0, there = connected;
        for (int i = 0; i < there; i++)
            for (int side = 0; side < 2; side++) {
                short events = wanted(&connections[i], side);
                /* A hang-up cannot be masked: one that nothing is wanted of any more is not looked at. */
                polls[n++] = (struct pollfd){.fd = events || connections[i].connecting ? connections[i].fd[side] : -1, .events = events};
            }
        int first = n, listening = ports.count;
        for (int i = 0; i < listening; i++)
            polls[n++] = (struct pollfd){.fd = connected < CONNECTIONS ? ports.listeners[i].fd : -1, .events = POLLIN};
        n += egress_polls(polls + n);
        polls[n++] = (struct pollfd){.fd = ports.control, .events = POLLIN};
        if (poll(polls, (nfds_t)n, patience()) < 0) {
            if (errno == EINTR)
                continue;
            return perror("relay: poll"), 1;
        }
        for (int i = there - 1; i >= 0; i--)
            if (serve(&connections[i], polls[2 * i].revents, polls[2 * i + 1].revents))
                end_connection(i);
        for (int i = 0; i < listening && connected < CONNECTIONS; i++)
            if (polls[first + i].revents) {
                int client = accept4(ports.listeners[i].fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
                if (client >= 0)
                    begin_connection(&ports.listeners[i], client);
            }
        serve_egress(polls + first + listening);
        if (polls[n - 1].revents) /* last: it changes what the others stand for */
            ports_serve(&ports, end_connections);
    }
}

static int add_listener(char *word) {
    char *fd = strtok(word, ":"), *address = strtok(NULL, ":"), *port = strtok(NULL, ":");
    if (!fd || !address || !port)
        return errno = EINVAL, -1;
    return ports_add(&ports, atoi(fd), address, port);
}

static int add_control(char *word) {
    char *fd = strtok(word, ":"), *rules = strtok(NULL, ":");
    if (!fd || !rules)
        return errno = EINVAL, -1;
    ports.control = atoi(fd);
    ports.rules = atoi(rules);
    return 0;
}

static int add_upstream(const char *address) {
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(53)};
    if (names.upstreams == NAMES_UPSTREAMS)
        return 0;
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0 || inet_pton(AF_INET, address, &to.sin_addr) != 1)
        return -1;
    if (connect(fd, (struct sockaddr *)&to, sizeof to) < 0) {
        close(fd); /* a resolver that cannot be reached now: the others answer */
        return 0;
    }
    if (!questions.to.sin_family)
        questions.to = to;
    names.upstream[names.upstreams++] = fd;
    return 0;
}

/* Reads the policy that holds from the beginning. */
static int add_policy(int fd) {
    static char text[EGRESS_TEXT];
    ssize_t n = pread(fd, text, sizeof text, 0);
    close(fd);
    return n < 0 ? -1 : egress_take(&egress, text, (size_t)n);
}

static int understand(char *word) {
    if (!strncmp(word, "tcp:", 4))
        return add_listener(word + 4);
    if (!strncmp(word, "upstream:", 9))
        return add_upstream(word + 9);
    if (!strncmp(word, "questions:", 10))
        return questions.fd = atoi(word + 10), fcntl(questions.fd, F_SETFL, O_NONBLOCK);
    if (!strncmp(word, "gate:", 5))
        return gate_listener = atoi(word + 5), 0;
    if (!strncmp(word, "notes:", 6))
        return egress.notes = atoi(word + 6), 0;
    if (!strncmp(word, "policy:", 7))
        return add_policy(atoi(word + 7));
    if (!strncmp(word, "names:", 6))
        return names.fd = atoi(word + 6), 0;
    if (!strncmp(word, "folder:", 7))
        return names.folder = open(word + 7, O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (!strncmp(word, "control:", 8))
        return add_control(word + 8);
    return errno = EINVAL, -1;
}

int relay_main(int argc, char **argv) {
    for (int i = 0; i < argc; i++)
        if (understand(argv[i]) < 0)
            return fprintf(stderr, "relay: %s: %s\n", argv[i], strerror(errno)), 1;
    struct rlimit files;
    if (getrlimit(RLIMIT_NOFILE, &files) == 0 && files.rlim_cur < files.rlim_max) {
        files.rlim_cur = files.rlim_max; /* each connection beyond has six at most */
        setrlimit(RLIMIT_NOFILE, &files);
    }
    signal(SIGPIPE, SIG_IGN); /* splice(2) knows no MSG_NOSIGNAL */
    dns_begin(&dns, &egress, &names);
    ports.egress = &egress;
    ports.changed = changed;
    if (gate_listener >= 0 && gate_begin(&gate, &egress, gate_listener) < 0)
        return perror("relay: gate"), 1;
    return loop();
}
