/* A machine's connections while a policy names names, with the world beyond on the loopback. */
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <stdlib.h>
#include <unistd.h>

#include "egressing.h"

static struct gate gate;
static int listening, beyond;
static struct sockaddr_in at_listener, at_beyond, meant_for;

static int is_meant(int fd, struct sockaddr_in *to) {
    (void)fd;
    *to = meant_for;
    return 0;
}

static int is_reached(const struct sockaddr_in *to, const char **why) {
    (void)to;
    *why = "it cannot be reached";
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    CHECK(connect(fd, (struct sockaddr *)&at_beyond, sizeof at_beyond) == 0 || errno == EINPROGRESS);
    return fd;
}

static void turn(void) {
    for (int i = 0; i < 4; i++)
        gate_serve(&gate);
}

/* Connects as the machine does, for 1.2.3.4 and a port. */
static int machine(unsigned port) {
    meant_for = (struct sockaddr_in){.sin_family = AF_INET, .sin_port = htons((uint16_t)port), .sin_addr.s_addr = htonl(0x01020304)};
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), on = 1;
    CHECK(setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on) == 0);
    CHECK(connect(fd, (struct sockaddr *)&at_listener, sizeof at_listener) == 0 && fcntl(fd, F_SETFL, O_NONBLOCK) == 0);
    turn();
    return fd;
}

static int is_reset(int fd) {
    char byte;
    turn();
    int ended = read(fd, &byte, 1) < 0 && errno == ECONNRESET;
    close(fd);
    return ended;
}

static void say(int fd, const char *text) {
    CHECK(send(fd, text, strlen(text), MSG_NOSIGNAL) == (ssize_t)strlen(text));
    turn();
}

#define REQUEST "GET / HTTP/1.1\r\nHost: a.example\r\n\r\n"

static void connections(void) {
    char data[4096];
    uint8_t here[4] = {1, 2, 3, 4};
    CHECK(take("closed\nname *.example 80 80 seen\nname git.example 22 22 plain\n") == 0);
    memset(egress.known, 0, sizeof egress.known);
    CHECK(is_reset(machine(80)) && said("tcp", "refused", "", "an address that was not given for any name"));
    egress_learn(&egress, "a.example", here, egress_now(), egress_now() + 100000);
    int fd = machine(80), other;
    say(fd, "GET / HTTP/1.1\r\nHo");
    CHECK(accept(beyond, NULL, NULL) < 0 && gate.count == 1); /* nobody is reached before it is known for whom */
    say(fd, "st: a.example\r\n\r\nmore");
    other = accept4(beyond, NULL, NULL, SOCK_NONBLOCK);
    CHECK(other >= 0 && said("tcp", "allowed", "a.example", ""));
    turn();
    CHECK(read(other, data, sizeof data) == (ssize_t)strlen(REQUEST "more") && !memcmp(data, REQUEST, 20));
    say(other, "answer");
    CHECK(read(fd, data, sizeof data) == 6);
    shutdown(fd, SHUT_WR);
    turn();
    CHECK(read(other, data, 1) == 0);
    say(other, "last words");
    CHECK(read(fd, data, sizeof data) == 10);
    close(other);
    turn();
    CHECK(read(fd, data, 1) == 0 && gate.count == 0);
    close(fd);
    say(fd = machine(80), "GET / HTTP/1.1\r\nHost: b.example\r\n\r\n");
    CHECK(is_reset(fd) && said("tcp", "refused", "b.example", "an address that was not given for this name"));
    say(fd = machine(81), REQUEST);
    CHECK(is_reset(fd) && said("tcp", "refused", "a.example", "no rule allows this name and port"));
    say(fd = machine(80), "SSH-2.0\r\n");
    CHECK(is_reset(fd) && said("tcp", "refused", "", "neither TLS nor HTTP"));
    say(fd = machine(22), "SSH-2.0\r\n"); /* no name that may be plain was given this address */
    CHECK(is_reset(fd));
    egress_learn(&egress, "git.example", here, egress_now(), egress_now() + 100000);
    fd = machine(22);
    other = accept4(beyond, NULL, NULL, SOCK_NONBLOCK);
    CHECK(other >= 0 && said("tcp", "allowed", "git.example", ""));
    say(other, "SSH"); /* who is reached speaks first */
    CHECK(read(fd, data, sizeof data) == 3);
    CHECK(take("closed\nname a.example 80 80 seen\n") == 0);
    gate_changed(&gate);
    CHECK(is_reset(fd) && said("tcp", "refused", "git.example", "the policy has changed") && gate.count == 0);
    close(other);
}

static void floods(void) {
    uint8_t here[4] = {1, 2, 3, 4};
    static int fds[GATE_CONNECTIONS + 50];
    char byte;
    int fd, other;
    CHECK(take("closed\nname *.example 80 80 seen\n") == 0);
    egress_learn(&egress, "a.example", here, egress_now(), egress_now() + 100000);
    fd = machine(80);
    for (int i = 0; i < GATE_PIECES && gate.count; i++)
        say(fd, "G");
    CHECK(is_reset(fd) && said("tcp", "refused", "", "neither TLS nor HTTP"));
    fd = machine(80);
    say(fd, "GET / HTTP/1.1\r\n");
    for (int i = 0; i < 3000 && gate.count; i++) { /* what waits for an acknowledgement goes in one piece */
        say(fd, "X: y\r\n");
        usleep(500);
    }
    CHECK(is_reset(fd) && said("tcp", "refused", "", "a beginning in too many pieces"));
    for (int i = 0; i < GATE_CONNECTIONS + 50; i++)
        fds[i] = machine(80); /* that say nothing: the oldest go */
    CHECK(gate.count == GATE_CONNECTIONS && said("tcp", "refused", "", "too many connections"));
    CHECK(read(fds[0], &byte, 1) < 0 && errno == ECONNRESET);
    say(fds[GATE_CONNECTIONS + 49], REQUEST);
    CHECK((other = accept4(beyond, NULL, NULL, SOCK_NONBLOCK)) >= 0);
    gate_expire(&gate, egress_now() + GATE_HELLO + 1);
    CHECK(gate.count == 1 && said("tcp", "refused", "", "it did not say what it wants in time"));
    close(other);
    for (int i = 0; i < GATE_CONNECTIONS + 50; i++)
        close(fds[i]);
    turn();
    CHECK(gate.count == 0);
}

static void carries_much(void) {
    static char block[1 << 16], got[1 << 20];
    uint8_t here[4] = {1, 2, 3, 4};
    size_t in = 0, out = 0, total = 20u << 20;
    for (size_t i = 0; i < sizeof block; i++)
        block[i] = (char)(i * 7);
    egress_learn(&egress, "a.example", here, egress_now(), egress_now() + 100000);
    int fd = machine(80);
    say(fd, REQUEST);
    int other = accept4(beyond, NULL, NULL, SOCK_NONBLOCK);
    CHECK(other >= 0);
    turn();
    while (out < total) {
        ssize_t n = in < total ? send(other, block + in % sizeof block, sizeof block - in % sizeof block, MSG_NOSIGNAL) : 0;
        in += n > 0 ? (size_t)n : 0;
        gate_serve(&gate);
        if (in > total / 2 || out) { /* who reads begins late */
            n = recv(fd, got, sizeof got, 0);
            for (ssize_t i = 0; i < n; i += 4099)
                CHECK(got[i] == block[(out + (size_t)i) % sizeof block]);
            out += n > 0 ? (size_t)n : 0;
        } else if (n < 0)
            total = in; /* everything that lies between is full */
    }
    close(other);
    close(fd);
    turn();
    CHECK(gate.count == 0);
}

int main(void) {
    listen_to_decisions();
    listening = bound(SOCK_STREAM, &at_listener);
    beyond = bound(SOCK_STREAM, &at_beyond);
    CHECK(gate_begin(&gate, &egress, listening) == 0);
    gate.meant = is_meant;
    gate.reach = is_reached;
    connections();
    floods();
    carries_much();
    return 0;
}
