/* Names, while a policy says which: the machine is told the addresses of those that are allowed, and nothing else that DNS carries. See egress.h.
 *
 * What goes to the host's resolvers is a question of our own making, and what comes back is read for addresses alone: so aliases, texts, keys of encrypted
 * hellos and whatever else could carry something are left out on both ways. There is no IPv6. */
#include <errno.h>
#include <string.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <unistd.h>

#include "egress.h"

#define HEADER 12
#define TYPE_A 1
#define PLAIN_MOST 512 /* of an answer over UDP, for who says nothing else */
#define RECORD 16
#define SERVFAIL 2
#define NXDOMAIN 3
#define NOTIMP 4
#define TOLD_MOST 300 /* seconds that an answer holds, at most, and that its addresses are remembered */
#define KEPT_LEAST 600
#define KEPT_MOST 3600
#define CLIENT_WAITS 10000
#define SAID_ONCE 1000 /* milliseconds */
#define QUESTIONS 100 /* a second, and twice as many at once, that are passed on */

static uint16_t get16(const uint8_t *at) {
    return (uint16_t)(at[0] << 8 | at[1]);
}

static void put16(uint8_t *at, unsigned value) {
    at[0] = (uint8_t)(value >> 8);
    at[1] = (uint8_t)value;
}

void dns_begin(struct dns *dns, struct egress *egress, struct names *names) {
    dns->egress = egress;
    dns->names = names;
    for (int i = 0; i < DNS_CLIENTS; i++)
        dns->clients[i].fd = -1;
}

static void hang_up(struct dns_client *client) {
    close(client->fd);
    client->fd = -1;
}

static void send_to(struct dns *dns, const struct asker *asker, uint8_t *message, size_t size) {
    if (asker->client < 0) {
        sendto(dns->names->fd, message + 2, size, MSG_DONTWAIT, (const struct sockaddr *)&asker->from, sizeof asker->from);
        return;
    }
    struct dns_client *client = &dns->clients[asker->client];
    if (client->fd < 0 || client->serial != asker->serial)
        return; /* it has gone */
    put16(message, (unsigned)size);
    if (send(client->fd, message, size + 2, MSG_DONTWAIT | MSG_NOSIGNAL) != (ssize_t)size + 2)
        hang_up(client);
}

/* Answers the question in `head`, of `size` bytes, with `count` addresses. */
static void answer(struct dns *dns, const struct asker *asker, const uint8_t *head, size_t size, unsigned code, const uint8_t addresses[][4], int count, unsigned ttl) {
    uint8_t whole[2 + PLAIN_MOST], *message = whole + 2;
    memcpy(message, head, size);
    message[2] = (uint8_t)(0x80 | (head[2] & 1)); /* an answer; recursion as it was asked for */
    message[3] = (uint8_t)(0x80 | code);
    put16(message + 4, 1);
    memset(message + 6, 0, 6);
    for (int i = 0; i < count && size + RECORD <= PLAIN_MOST; i++) {
        const uint8_t record[] = {0xc0, HEADER, 0, TYPE_A, 0, 1, 0, 0, (uint8_t)(ttl >> 8), (uint8_t)ttl, 0, 4};
        memcpy(message + size, record, sizeof record);
        memcpy(message + size + sizeof record, addresses[i], 4);
        size += RECORD;
        put16(message + 6, (unsigned)i + 1);
    }
    send_to(dns, asker, whole, size);
}

/* Writes our own question for the addresses of `name`. Returns its length. */
static size_t make_question(uint8_t *out, uint16_t id, const char *name) {
    static const uint8_t REST[] = {0, 0, TYPE_A, 0, 1, /* options: a message of 1232 bytes */ 0, 0, 41, 0x04, 0xd0, 0, 0, 0, 0, 0, 0};
    size_t at = HEADER;
    memset(out, 0, HEADER);
    put16(out, id);
    out[2] = 1;
    out[5] = out[11] = 1;
    while (*name) {
        size_t label = strcspn(name, ".");
        out[at++] = (uint8_t)label;
        memcpy(out + at, name, label);
        at += label;
        name += label + (name[label] == '.');
    }
    memcpy(out + at, REST, sizeof REST);
    return at + sizeof REST;
}

static int within_budget(struct dns *dns) {
    int64_t now = egress_now();
    dns->budget += (now - dns->spent) * QUESTIONS;
    dns->spent = now;
    if (dns->budget > 2 * QUESTIONS * 1000)
        dns->budget = 2 * QUESTIONS * 1000;
    return dns->budget >= 1000 ? (dns->budget -= 1000, 1) : 0;
}

static void pass_on(struct dns *dns, const struct asker *asker, const char *name, const uint8_t *head, size_t size) {
    uint8_t message[HEADER + PEEK_NAME + 32];
    struct question *slot = &dns->pending[dns->next++ % DNS_PENDING];
    slot->used = 0;
    if (!within_budget(dns)) {
        egress_say(dns->egress, 0, "dns", NULL, 53, name, "too many questions");
        answer(dns, asker, head, size, SERVFAIL, NULL, 0, 0);
        return;
    }
    if (getrandom(&slot->ours, sizeof slot->ours, 0) != sizeof slot->ours)
        return;
    slot->asker = *asker;
    memcpy(slot->name, name, sizeof slot->name);
    memcpy(slot->head, head, size);
    slot->size = size;
    slot->used = 1;
    slot->left = 0;
    size_t length = make_question(message, slot->ours, name);
    for (int i = 0; i < dns->names->upstreams; i++)
        if (send(dns->names->upstream[i], message, length, MSG_DONTWAIT | MSG_NOSIGNAL) >= 0)
            slot->left++;
    if (!slot->left) {
        slot->used = 0;
        answer(dns, asker, head, size, SERVFAIL, NULL, 0, 0);
    }
}

static void say_refused(struct dns *dns, const char *name) {
    int64_t now = egress_now();
    if (now < dns->refused_at + SAID_ONCE && !strcmp(dns->refused, name))
        return;
    memcpy(dns->refused, name, sizeof dns->refused);
    dns->refused_at = now;
    egress_say(dns->egress, 0, "dns", NULL, 53, name, "no rule allows this name");
}

static void handle(struct dns *dns, const uint8_t *message, size_t size, const struct asker *asker) {
    uint8_t made[2 + NAMES_MESSAGE];
    char name[PEEK_NAME] = "";
    size_t end = 0;
    int ours = names_answer(dns->names->folder, message, size, made + 2);
    if (ours > 0)
        send_to(dns, asker, made, (size_t)ours); /* a machine of its network */
    if (ours)
        return;
    unsigned type = peek_question(message, size, name, &end);
    if (!end || end > DNS_QUESTION)
        return;
    if (!type)
        answer(dns, asker, message, end, NOTIMP, NULL, 0, 0);
    else if (strchr(name, '?') || !egress_asks(dns->egress, name)) { /* '?' stands for a byte that no host's name has */
        say_refused(dns, name);
        answer(dns, asker, message, end, NXDOMAIN, NULL, 0, 0);
    } else if (type != TYPE_A)
        answer(dns, asker, message, end, 0, NULL, 0, 0);
    else
        pass_on(dns, asker, name, message, end);
}

void dns_asked(struct dns *dns) {
    uint8_t message[NAMES_MESSAGE];
    struct asker asker = {.client = -1};
    socklen_t length = sizeof asker.from;
    ssize_t n = recvfrom(dns->names->fd, message, sizeof message, MSG_DONTWAIT, (struct sockaddr *)&asker.from, &length);
    if (n > 0 && length == sizeof asker.from && asker.from.sin_family == AF_INET)
        handle(dns, message, (size_t)n, &asker);
}

/* Tells the machine the addresses that it may have, and remembers them. */
static void give(struct dns *dns, const struct question *asked, uint8_t found[][4], int count, uint32_t ttl) {
    int64_t now = egress_now(), kept = ttl < KEPT_LEAST ? KEPT_LEAST : ttl > KEPT_MOST ? KEPT_MOST : ttl;
    int given = 0;
    for (int i = 0; i < count; i++) {
        if (peek_private(found[i]) && !egress_ranged(dns->egress, found[i])) {
            egress_say(dns->egress, 0, "dns", found[i], 53, asked->name, "the name has a private address");
            continue;
        }
        if (asked->size + (size_t)(given + 1) * RECORD > PLAIN_MOST)
            break; /* what is not told is not remembered */
        egress_learn(dns->egress, asked->name, found[i], now, now + kept * 1000);
        memmove(found[given++], found[i], 4);
    }
    if (given)
        egress_say(dns->egress, 1, "dns", found[0], 53, asked->name, "");
    answer(dns, &asked->asker, asked->head, asked->size, 0, (const uint8_t(*)[4])found, given, ttl < TOLD_MOST ? ttl : TOLD_MOST);
}

void dns_answered(struct dns *dns, int which) {
    uint8_t message[NAMES_MESSAGE], found[PEEK_ADDRESSES][4];
    char name[PEEK_NAME];
    size_t end = 0;
    uint32_t ttl = 0;
    ssize_t n = recv(dns->names->upstream[which], message, sizeof message, MSG_DONTWAIT);
    if (n < HEADER || !(message[2] & 0x80) || peek_question(message, (size_t)n, name, &end) != TYPE_A)
        return;
    for (int i = 0; i < DNS_PENDING; i++) {
        struct question *asked = &dns->pending[i];
        if (!asked->used || asked->ours != get16(message) || strcmp(asked->name, name))
            continue;
        unsigned code = message[3] & 15;
        int count = code ? 0 : peek_addresses(message, (size_t)n, found, &ttl);
        if (((code && code != NXDOMAIN) || count < 0) && --asked->left)
            return; /* others may know better */
        asked->used = 0;
        if (code || count < 0)
            answer(dns, &asked->asker, asked->head, asked->size, code ? code : SERVFAIL, NULL, 0, 0);
        else if (egress_asks(dns->egress, name)) /* still */
            give(dns, asked, found, count, ttl);
        return;
    }
}

void dns_accepted(struct dns *dns, int fd) {
    struct dns_client *place = &dns->clients[0];
    for (int i = 0; i < DNS_CLIENTS && place->fd >= 0; i++)
        if (dns->clients[i].fd < 0 || dns->clients[i].until < place->until)
            place = &dns->clients[i];
    if (place->fd >= 0)
        hang_up(place);
    *place = (struct dns_client){.fd = fd, .serial = ++dns->serial, .until = egress_now() + CLIENT_WAITS};
}

void dns_read(struct dns *dns, int which) {
    struct dns_client *client = &dns->clients[which];
    ssize_t n = recv(client->fd, client->data + client->have, sizeof client->data - client->have, MSG_DONTWAIT);
    if (n < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (n <= 0) {
        hang_up(client);
        return;
    }
    client->have += (size_t)n;
    while (client->fd >= 0 && client->have >= 2) {
        size_t size = get16(client->data);
        if (size > DNS_QUESTION) {
            hang_up(client);
            return;
        }
        if (client->have < size + 2)
            return;
        struct asker asker = {.client = which, .serial = client->serial};
        handle(dns, client->data + 2, size, &asker);
        client->have -= size + 2;
        memmove(client->data, client->data + 2 + size, client->have);
    }
}

void dns_expire(struct dns *dns, int64_t now) {
    for (int i = 0; i < DNS_CLIENTS; i++)
        if (dns->clients[i].fd >= 0 && dns->clients[i].until <= now)
            hang_up(&dns->clients[i]);
}
