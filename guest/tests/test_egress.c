/* Egress by name: what a policy means, what is remembered, and questions in order and not, with a resolver on the loopback. */
#include <stdlib.h>
#include <unistd.h>

#include "egressing.h"

static struct names names = {.fd = -1, .folder = -1};
static struct dns dns;
static int resolver, asking;
static struct sockaddr_in at_names;

static void policies(void) {
    CHECK(take("open\n") == 0 && egress.policy.kind == POLICY_OPEN);
    CHECK(take("closed\n") == 0 && egress.policy.kind == POLICY_CLOSED && !egress_asks(&egress, "a.b"));
    CHECK(take("closed\nname a.example 1 65535 seen\nname *.b.example 443 443 seen\nname c.example 22 22 plain\naddress 10.0.0.0 8\n") == 0);
    CHECK(egress.policy.kind == POLICY_NAMES && egress.policy.named == 3);
    CHECK(egress_asks(&egress, "a.example") && !egress_asks(&egress, "x.a.example") && !egress_asks(&egress, "aa.example"));
    CHECK(egress_asks(&egress, "x.b.example") && egress_asks(&egress, "y.x.b.example") && !egress_asks(&egress, "b.example") && !egress_asks(&egress, "xb.example") &&
          !egress_asks(&egress, ".b.example"));
    CHECK(egress_allows(&egress, "a.example", 1, 0) && egress_allows(&egress, "x.b.example", 443, 0) && !egress_allows(&egress, "x.b.example", 80, 0));
    CHECK(egress_allows(&egress, "c.example", 22, 1) && !egress_allows(&egress, "a.example", 22, 1) && !egress_allows(&egress, "c.example", 80, 1));
    CHECK(egress_ranged(&egress, (const uint8_t *)"\x0a\x01\x02\x03") && !egress_ranged(&egress, (const uint8_t *)"\x0b\x01\x02\x03"));
    static const char *const WRONG[] = {"shut",
                                        "name",
                                        "name a.b 1 2",
                                        "name a.b 2 1 seen",
                                        "name a.b 1 70000 seen",
                                        "name a.b x 2 seen",
                                        "name a.b 1 2 heard",
                                        "name A.b 1 2 seen",
                                        "name a.*.b 1 2 seen",
                                        "address 10.0.0.0",
                                        "address 10.0.0.0 33",
                                        "address x 8",
                                        "address 10.0.0.0 -1"};
    for (size_t i = 0; i < sizeof WRONG / sizeof *WRONG; i++)
        CHECK(take(WRONG[i]) < 0 && egress.policy.named == 3); /* as it was */
    static char many[EGRESS_TEXT + 1];
    for (int i = 0, at = 0; i <= EGRESS_RULES; i++)
        at += sprintf(many + at, "name a%d.b 1 2 seen\n", i);
    CHECK(take(many) < 0);
    memset(many, '\n', EGRESS_TEXT);
    CHECK(take(many) < 0);
}

static void memory(void) {
    const uint8_t one[4] = {1, 2, 3, 4}, two[4] = {1, 2, 3, 5};
    int plain;
    CHECK(take("closed\nname *.example 1 65535 seen\nname git.example 22 22 plain\n") == 0);
    egress_learn(&egress, "a.example", one, 1000, 2000);
    CHECK(egress_knows(&egress, "a.example", one, 1999) && !egress_knows(&egress, "a.example", one, 2000));
    CHECK(!egress_knows(&egress, "a.example", two, 1000) && !egress_knows(&egress, "b.example", one, 1000));
    egress_learn(&egress, "a.example", one, 1000, 1500); /* what was promised longer stays */
    CHECK(egress_knows(&egress, "a.example", one, 1999));
    CHECK(!strcmp(egress_named(&egress, one, 22, 1000, &plain), "a.example") && !plain);
    egress_learn(&egress, "git.example", one, 1000, 2000);
    CHECK(!strcmp(egress_named(&egress, one, 22, 1000, &plain), "git.example") && plain);
    CHECK(egress_named(&egress, one, 23, 1000, &plain) && !plain && !egress_named(&egress, two, 22, 1000, &plain));
    for (int i = 0; i < 2 * EGRESS_KNOWN; i++) { /* the oldest go */
        char name[32];
        sprintf(name, "n%d.example", i);
        egress_learn(&egress, name, two, 1000, 3000 + i);
    }
    CHECK(!egress_knows(&egress, "a.example", one, 1000) && !egress_knows(&egress, "n5.example", two, 1000));
    CHECK(egress_knows(&egress, "n4095.example", two, 1000));
    CHECK(take("closed\nname other.example 1 65535 seen\n") == 0);
    CHECK(!egress_knows(&egress, "n4095.example", two, 1000)); /* nobody may ask that any longer */
    memset(egress.known, 0, sizeof egress.known);
}

/* A question for `name`, in labels, of a type; returns its length. */
static size_t question(uint8_t *out, const char *name, unsigned type) {
    memcpy(out, "\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00", 12);
    memcpy(out + 12, name, strlen(name) + 1);
    size_t at = 12 + strlen(name) + 1;
    memcpy(out + at, (uint8_t[]){(uint8_t)(type >> 8), (uint8_t)type, 0, 1}, 4);
    return at + 4;
}

/* Asks over UDP; returns the length of what comes back at once. */
static ssize_t ask(const char *name, unsigned type, uint8_t answer[1024]) {
    uint8_t message[512];
    size_t size = question(message, name, type);
    CHECK(sendto(asking, message, size, 0, (struct sockaddr *)&at_names, sizeof at_names) == (ssize_t)size);
    dns_asked(&dns);
    return recv(asking, answer, 1024, MSG_DONTWAIT);
}

/* Has the resolver answer what it was asked with `count` addresses from `address` on, or with `code`, and a text of its own. */
static void resolve(int count, const uint8_t address[4], unsigned code) {
    uint8_t message[2048];
    struct sockaddr_in from;
    socklen_t length = sizeof from;
    ssize_t n = recvfrom(resolver, message, sizeof message, MSG_DONTWAIT, (struct sockaddr *)&from, &length);
    CHECK(n > 12 && message[5] == 1 && message[11] == 1);
    size_t at = (size_t)n - 11; /* without its options */
    message[2] |= 0x80;
    message[3] = (uint8_t)code;
    message[7] = (uint8_t)(count + 1);
    message[11] = 0;
    memcpy(message + at, "\xc0\x0c\x00\x10\x00\x01\x00\x00\x00\x05\x00\x03\x02hi", 15);
    at += 15;
    for (int i = 0; i < count; i++, at += 16) {
        memcpy(message + at, "\xc0\x0c\x00\x01\x00\x01\x00\x00\x00\x05\x00\x04", 12);
        memcpy(message + at + 12, (uint8_t[]){address[0], address[1], address[2], (uint8_t)(address[3] + i)}, 4);
    }
    CHECK(sendto(resolver, message, at, 0, (struct sockaddr *)&from, length) == (ssize_t)at);
    dns_answered(&dns, 0);
}

static void questions(void) {
    uint8_t answer[1024], public[4] = {1, 2, 3, 0}, private[4] = {10, 0, 0, 0};
    CHECK(take("closed\nname *.example 1 65535 seen\naddress 10.0.0.1 32\n") == 0);
    CHECK(ask("\4evil\4test", 1, answer) == 27 && (answer[3] & 15) == 3 && !memcmp(answer, "\x12\x34", 2));
    CHECK(said("dns", "refused", "evil.test", "no rule allows this name"));
    CHECK(ask("\4e.il\7example", 1, answer) > 0 && (answer[3] & 15) == 3); /* a dot within a label is no dot */
    static const unsigned EMPTY[] = {28, 65, 64, 16, 255, 12};
    for (size_t i = 0; i < sizeof EMPTY / sizeof *EMPTY; i++)
        CHECK(ask("\1A\7eXample", EMPTY[i], answer) == 27 && !(answer[3] & 15) && !answer[7]);
    CHECK(recv(resolver, answer, sizeof answer, MSG_DONTWAIT) < 0); /* nobody beyond was asked */
    CHECK(ask("\1A\7eXample", 1, answer) < 0);
    resolve(2, public, 0);
    CHECK(recv(asking, answer, sizeof answer, MSG_DONTWAIT) == 27 + 32 && answer[7] == 2 && !memcmp(answer + 12, "\1A\7eXample", 11));
    CHECK(!memcmp(answer + 27, "\xc0\x0c\x00\x01\x00\x01\x00\x00\x00\x05\x00\x04\x01\x02\x03\x00", 16) && said("dns", "allowed", "a.example", ""));
    CHECK(egress_knows(&egress, "a.example", public, egress_now()));
    CHECK(ask("\1b\7example", 1, answer) < 0);
    resolve(3, private, 0); /* of which a rule allows the second */
    CHECK(recv(asking, answer, sizeof answer, MSG_DONTWAIT) == 27 + 16 && !memcmp(answer + 39, "\x0a\x00\x00\x01", 4));
    CHECK(said("dns", "allowed", "b.example", "") && !egress_knows(&egress, "b.example", private, egress_now()));
    CHECK(ask("\1c\7example", 1, answer) < 0);
    resolve(60, public, 0); /* as many as go in */
    ssize_t n = recv(asking, answer, sizeof answer, MSG_DONTWAIT);
    CHECK(n == 27 + 30 * 16 && answer[7] == 30 && n <= 512);
    CHECK(ask("\1d\7example", 1, answer) < 0);
    resolve(0, public, 3);
    CHECK(recv(asking, answer, sizeof answer, MSG_DONTWAIT) == 27 && (answer[3] & 15) == 3);
    CHECK(ask("\1e\7example", 1, answer) < 0);
    CHECK(take("closed\nname other.example 1 65535 seen\n") == 0); /* meanwhile */
    resolve(1, public, 0);
    CHECK(recv(asking, answer, sizeof answer, MSG_DONTWAIT) < 0 && !egress_knows(&egress, "e.example", public, egress_now()));
    CHECK(take("closed\nname *.example 1 65535 seen\n") == 0);
    for (int i = 0; i < 600; i++) /* more than may be passed on */
        ask("\1f\7example", 1, answer);
    CHECK(said("dns", "refused", "f.example", "too many questions") && (answer[3] & 15) == 2);
    while (recv(resolver, answer, sizeof answer, MSG_DONTWAIT) > 0)
        continue;
    dns.budget = 200000;
}

static void questions_over_tcp(void) {
    uint8_t message[600], answer[600];
    int ends[2];
    CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, ends) == 0);
    dns_accepted(&dns, ends[1]);
    size_t size = question(message + 2, "\1a\7example", 1);
    message[0] = 0, message[1] = (uint8_t)size;
    for (size_t i = 0; i < size + 2; i++) { /* a byte at a time */
        CHECK(write(ends[0], message + i, 1) == 1);
        dns_read(&dns, 0);
    }
    resolve(1, (const uint8_t *)"\1\2\3\4", 0);
    CHECK(read(ends[0], answer, sizeof answer) == 2 + 27 + 16 && answer[1] == 43 && answer[9] == 1);
    CHECK(write(ends[0], "\x7f\xff", 2) == 2);
    dns_read(&dns, 0);
    CHECK(dns.clients[0].fd < 0 && read(ends[0], answer, 1) == 0);
    close(ends[0]);
    for (int i = 0; i < 3 * DNS_CLIENTS; i++) { /* as many as there may be, the oldest go */
        CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, ends) == 0);
        dns_accepted(&dns, ends[1]);
        close(ends[0]);
    }
    dns_expire(&dns, egress_now() + 11000);
    for (int i = 0; i < DNS_CLIENTS; i++)
        CHECK(dns.clients[i].fd < 0);
}

static void notes(void) {
    char text[EGRESS_LINE * 2 * EGRESS_NOTED];
    FILE *file = tmpfile();
    CHECK(file);
    egress.notes = fileno(file);
    for (int i = 0; i < 3; i++)
        egress_say(&egress, 0, "dns", NULL, 53, "a.test", "no rule allows this name");
    egress_say(&egress, 1, "dns", NULL, 53, "b.test", "");
    CHECK(pread(egress.notes, text, sizeof text, 0) > 0 && egress.notes_taken == 1);
    for (int i = 0; i < 2 * EGRESS_NOTED; i++) {
        char name[32];
        sprintf(name, "n%d.test", i);
        egress_say(&egress, 0, "dns", NULL, 53, name, "no rule allows this name");
    }
    ssize_t n = pread(egress.notes, text, sizeof text, 0), lines = 0;
    for (ssize_t i = 0; i < n; i++)
        lines += text[i] == '\n';
    CHECK(lines == EGRESS_NOTED);
    fclose(file);
    egress.notes = -1;
}

int main(void) {
    int ends[2];
    struct sockaddr_in at_resolver, at_asking;
    listen_to_decisions();
    resolver = bound(SOCK_DGRAM, &at_resolver);
    asking = bound(SOCK_DGRAM, &at_asking);
    names.fd = bound(SOCK_DGRAM, &at_names);
    names.upstream[names.upstreams++] = socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK, 0);
    CHECK(connect(names.upstream[0], (struct sockaddr *)&at_resolver, sizeof at_resolver) == 0);
    dns_begin(&dns, &egress, &names);
    policies();
    memory();
    questions();
    questions_over_tcp();
    notes();
    for (int i = 1; i < EGRESS_EARS; i++)
        CHECK(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, ends) == 0 && egress_listen(&egress, ends[1]) == 0 && close(ends[0]) == 0);
    CHECK(egress_listen(&egress, dup(ends[1])) == 0); /* those that have gone have left room */
    return 0;
}
