/* What a machine may talk to by name, and which addresses its names were given. See egress.h.
 *
 * A policy is text: "open", or "closed" and its rules, a line each:
 *
 *   name NAME FIRST LAST seen|plain    NAME may begin with "*.", and stands then for all names beneath
 *   address ADDRESS BITS
 *
 * Its author is the machine's owner. */
#include "egress.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

int64_t egress_now(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

static int number(const char *word, unsigned long most, unsigned long *value) {
    char *end;
    if (!word || *word < '0' || *word > '9')
        return 0;
    errno = 0;
    *value = strtoul(word, &end, 10);
    return !errno && !*end && *value <= most;
}

static int take_name_rule(struct policy *policy, char **rest) {
    char *name = strtok_r(NULL, " ", rest), *first = strtok_r(NULL, " ", rest), *last = strtok_r(NULL, " ", rest), *how = strtok_r(NULL, " ", rest);
    unsigned long from, to;
    if (policy->named == EGRESS_RULES || !how || !number(first, 65535, &from) || !number(last, 65535, &to) || from > to)
        return -1;
    struct name_rule *rule = &policy->names[policy->named];
    rule->wild = !strncmp(name, "*.", 2);
    name += rule->wild; /* the dot stays */
    if (!*name || strlen(name) >= sizeof rule->name || strspn(name, "abcdefghijklmnopqrstuvwxyz0123456789-_.") != strlen(name))
        return -1;
    memcpy(rule->name, name, strlen(name) + 1);
    rule->plain = !strcmp(how, "plain");
    if (!rule->plain && strcmp(how, "seen"))
        return -1;
    rule->first = (uint16_t)from;
    rule->last = (uint16_t)to;
    policy->named++;
    return 0;
}

static int take_range(struct policy *policy, char **rest) {
    char *address = strtok_r(NULL, " ", rest), *length = strtok_r(NULL, " ", rest);
    struct in_addr network;
    unsigned long bits;
    if (policy->ranged == EGRESS_RULES || !address || inet_pton(AF_INET, address, &network) != 1 || !number(length, 32, &bits))
        return -1;
    uint32_t mask = bits ? ~0u << (32 - bits) : 0;
    policy->ranges[policy->ranged++] = (struct range_rule){ntohl(network.s_addr) & mask, mask};
    return 0;
}

static int take_line(struct policy *policy, char *line) {
    char *rest, *word = strtok_r(line, " ", &rest);
    if (!word)
        return 0;
    if (!strcmp(word, "open") || !strcmp(word, "closed")) {
        policy->kind = *word == 'o' ? POLICY_OPEN : POLICY_CLOSED;
        return 0;
    }
    if (!strcmp(word, "name"))
        return take_name_rule(policy, &rest);
    return strcmp(word, "address") ? -1 : take_range(policy, &rest);
}

int egress_take(struct egress *egress, const char *text, size_t size) {
    struct policy *new = size < EGRESS_TEXT ? calloc(1, sizeof *new) : NULL;
    char *copy = new ? calloc(1, size + 1) : NULL, *rest;
    int failed = !copy;
    if (copy) {
        memcpy(copy, text, size);
        for (char *line = strtok_r(copy, "\n", &rest); line && !failed; line = strtok_r(NULL, "\n", &rest))
            failed = take_line(new, line) < 0;
    }
    if (!failed) {
        if (new->named)
            new->kind = POLICY_NAMES;
        egress->policy = *new;
        for (int i = 0; i < EGRESS_KNOWN; i++)
            if (egress->known[i].until && !egress_asks(egress, egress->known[i].name))
                egress->known[i].until = 0;
    }
    free(copy);
    free(new);
    return failed ? (errno = EINVAL, -1) : 0;
}

static int stands_for(const struct name_rule *rule, const char *name) {
    size_t whole = strlen(name), end = strlen(rule->name);
    if (!rule->wild)
        return !strcmp(rule->name, name);
    return whole > end && !strcmp(name + whole - end, rule->name);
}

int egress_asks(const struct egress *egress, const char *name) {
    for (int i = 0; i < egress->policy.named; i++)
        if (stands_for(&egress->policy.names[i], name))
            return 1;
    return 0;
}

int egress_allows(const struct egress *egress, const char *name, uint16_t port, int plain) {
    for (int i = 0; i < egress->policy.named; i++) {
        const struct name_rule *rule = &egress->policy.names[i];
        if (rule->first <= port && port <= rule->last && (rule->plain || !plain) && stands_for(rule, name))
            return 1;
    }
    return 0;
}

int egress_ranged(const struct egress *egress, const uint8_t address[4]) {
    uint32_t asked = (uint32_t)address[0] << 24 | (uint32_t)address[1] << 16 | (uint32_t)address[2] << 8 | address[3];
    for (int i = 0; i < egress->policy.ranged; i++)
        if ((asked & egress->policy.ranges[i].mask) == egress->policy.ranges[i].network)
            return 1;
    return 0;
}

void egress_learn(struct egress *egress, const char *name, const uint8_t address[4], int64_t now, int64_t until) {
    struct known *place = &egress->known[0];
    for (int i = 0; i < EGRESS_KNOWN; i++) {
        struct known *one = &egress->known[i];
        if (one->until > now && !memcmp(one->address, address, 4) && !strcmp(one->name, name)) {
            one->until = one->until > until ? one->until : until;
            return;
        }
        if (one->until < place->until)
            place = one;
    }
    memcpy(place->address, address, 4);
    snprintf(place->name, sizeof place->name, "%s", name);
    place->until = until;
}

int egress_knows(const struct egress *egress, const char *name, const uint8_t address[4], int64_t now) {
    for (int i = 0; i < EGRESS_KNOWN; i++) {
        const struct known *one = &egress->known[i];
        if (one->until > now && !memcmp(one->address, address, 4) && !strcmp(one->name, name))
            return 1;
    }
    return 0;
}

const char *egress_named(const struct egress *egress, const uint8_t address[4], uint16_t port, int64_t now, int *plain) {
    const char *found = NULL;
    *plain = 0;
    for (int i = 0; i < EGRESS_KNOWN && !*plain; i++) {
        const struct known *one = &egress->known[i];
        if (one->until <= now || memcmp(one->address, address, 4))
            continue;
        found = one->name;
        *plain = egress_allows(egress, found, port, 1);
    }
    return found;
}

int egress_listen(struct egress *egress, int fd) {
    char end;
    for (int i = 0; i < EGRESS_EARS; i++) {
        if (egress->ears[i] >= 0 && recv(egress->ears[i], &end, 1, MSG_DONTWAIT) == 0) { /* it listens no longer */
            close(egress->ears[i]);
            egress->ears[i] = -1;
        }
        if (egress->ears[i] < 0)
            return egress->ears[i] = fd, 0;
    }
    return errno = EBUSY, -1;
}

/* Keeps a refusal for who looks later, if there was none like it: of one name, or of one address without a name. */
static void note(struct egress *egress, const char *line, const char *kind) {
    uint64_t sum = 0xcbf29ce484222325; /* FNV-1a */
    for (const char *c = kind; *c; c++)
        sum = (sum ^ (uint8_t)*c) * 0x100000001b3;
    for (int i = 0; i < egress->notes_taken; i++)
        if (egress->noted[i] == sum)
            return;
    if (egress->notes_taken == EGRESS_NOTED)
        return;
    egress->noted[egress->notes_taken++] = sum;
    if (dprintf(egress->notes, "%s\n", line) < 0)
        egress->notes_taken = EGRESS_NOTED; /* a full disk */
}

void egress_say(struct egress *egress, int allowed, const char *protocol, const uint8_t *address, unsigned port, const char *name, const char *why) {
    char line[EGRESS_LINE], text[INET_ADDRSTRLEN] = "";
    struct timespec now;
    if (address)
        inet_ntop(AF_INET, address, text, sizeof text);
    clock_gettime(CLOCK_REALTIME, &now);
    int size = snprintf(line, sizeof line, "%lld.%06ld\t%s\t%s\t%s\t%u\t%s\t%s\t%llu", (long long)now.tv_sec, now.tv_nsec / 1000, allowed ? "allowed" : "refused",
                        protocol, text, port, name, why, (unsigned long long)egress->unheard);
    if (!allowed && egress->notes >= 0) {
        char kind[EGRESS_LINE];
        snprintf(kind, sizeof kind, "%s %s %s", protocol, *name ? name : text, why);
        note(egress, line, kind);
    }
    for (int i = 0; i < EGRESS_EARS; i++) {
        if (egress->ears[i] < 0 || send(egress->ears[i], line, (size_t)size, MSG_DONTWAIT | MSG_NOSIGNAL) >= 0)
            continue;
        if (errno == EAGAIN || errno == ENOBUFS) {
            egress->unheard++; /* who listens is told with the next */
            continue;
        }
        close(egress->ears[i]);
        egress->ears[i] = -1;
    }
}
