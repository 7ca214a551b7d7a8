/* Names of machines: a small part of DNS (RFC 1035), asked over UDP by one machine.
 *
 * NAME and NAME.trivisor are looked up as files of the network's folder, so a machine that starts later is known at once and
 * nobody is told anything. Everything else goes to the host's resolvers, all of them, and the first answer wins. Questions
 * come from the guest and answers from the network: both are hostile. */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <unistd.h>

#include "relay.h"

#define HEADER 12
#define LABEL 63
#define TYPE_A 1
#define CLASS_IN 1
#define TTL 5

static uint16_t get16(const uint8_t *at) {
    return (uint16_t)(at[0] << 8 | at[1]);
}

static void put16(uint8_t *at, unsigned value) {
    at[0] = (uint8_t)(value >> 8);
    at[1] = (uint8_t)value;
}

static int is_letter(uint8_t c) {
    return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '-';
}

/* Reads the question's name: at most two labels are kept. Returns where its type is, 0 if it is malformed. */
static size_t question(const uint8_t *query, size_t size, char labels[2][LABEL + 1], int *count) {
    size_t at = HEADER;
    *count = 0;
    while (at < size && query[at]) {
        size_t length = query[at++];
        if (length > LABEL || at + length >= size || at > HEADER + 255)
            return 0;
        if (*count < 2) {
            for (size_t i = 0; i < length; i++) {
                uint8_t c = query[at + i];
                labels[*count][i] = (char)(c >= 'A' && c <= 'Z' ? c + 32 : c);
            }
            labels[*count][length] = 0;
        }
        (*count)++;
        at += length;
    }
    return at + 5 <= size ? at + 1 : 0;
}

/* Looks up a machine. The name becomes a file's name only if it is nothing but a DNS label. */
static int find(int folder, const char *label, uint8_t address[4]) {
    char text[INET_ADDRSTRLEN + 1] = "";
    for (const char *c = label; *c; c++)
        if (!is_letter((uint8_t)*c))
            return 0;
    int fd = *label ? openat(folder, label, O_RDONLY | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK) : -1;
    if (fd < 0)
        return 0;
    ssize_t n = read(fd, text, sizeof text - 1);
    close(fd);
    text[n > 0 ? n : 0] = 0;
    text[strcspn(text, "\n")] = 0;
    return inet_pton(AF_INET, text, address) == 1;
}

int names_answer(int folder, const uint8_t *query, size_t size, uint8_t *out) {
    char labels[2][LABEL + 1];
    int count;
    if (size < HEADER || size > NAMES_MESSAGE - 16 || query[2] & 0xf8 || get16(query + 4) != 1)
        return -1; /* not a plain question */
    size_t end = question(query, size, labels, &count);
    if (!end)
        return -1;
    int ours = count == 2 && !strcmp(labels[1], "trivisor");
    if (folder < 0 || (!ours && count != 1))
        return 0;
    uint8_t address[4];
    int known = find(folder, labels[0], address);
    if (!known && !ours)
        return 0;
    int give = known && get16(query + end) == TYPE_A && get16(query + end + 2) == CLASS_IN;
    size_t length = end + 4;
    memcpy(out, query, length);
    out[2] = (uint8_t)(0x84 | (query[2] & 1)); /* an answer, with authority */
    out[3] = (uint8_t)(0x80 | (known ? 0 : 3));
    put16(out + 6, (unsigned)give);
    memset(out + 8, 0, 4);
    if (give) {
        const uint8_t record[] = {0xc0, HEADER, 0, TYPE_A, 0, CLASS_IN, 0, 0, 0, TTL, 0, 4};
        memcpy(out + length, record, sizeof record);
        memcpy(out + length + sizeof record, address, 4);
        length += sizeof record + 4;
    }
    return (int)length;
}

/* Passes a question on, under a number of our own that nobody can guess. */
static void ask(struct names *names, uint8_t *query, size_t size, const struct sockaddr_in *from) {
    struct pending *slot = &names->pending[names->next++ % NAMES_PENDING];
    uint16_t number;
    if (getrandom(&number, sizeof number, 0) != sizeof number)
        return;
    *slot = (struct pending){.from = *from, .theirs = get16(query), .ours = number, .used = 1};
    put16(query, number);
    for (int i = 0; i < names->upstreams; i++)
        if (send(names->upstream[i], query, size, MSG_DONTWAIT) < 0)
            continue; /* one that does not answer is what the others are for */
}

static void answered(struct names *names, uint8_t *answer, size_t size) {
    if (size < HEADER || !(answer[2] & 0x80))
        return;
    for (int i = 0; i < NAMES_PENDING; i++) {
        struct pending *slot = &names->pending[i];
        if (!slot->used || slot->ours != get16(answer))
            continue;
        slot->used = 0;
        put16(answer, slot->theirs);
        sendto(names->fd, answer, size, MSG_DONTWAIT, (struct sockaddr *)&slot->from, sizeof slot->from);
        return;
    }
}

void names_serve(struct names *names, int which) {
    uint8_t message[NAMES_MESSAGE], out[NAMES_MESSAGE];
    if (which >= 0) {
        ssize_t n = recv(names->upstream[which], message, sizeof message, MSG_DONTWAIT);
        if (n > 0)
            answered(names, message, (size_t)n);
        return;
    }
    struct sockaddr_in from;
    socklen_t length = sizeof from;
    ssize_t n = recvfrom(names->fd, message, sizeof message, MSG_DONTWAIT, (struct sockaddr *)&from, &length);
    if (n <= 0 || length != sizeof from || from.sin_family != AF_INET)
        return;
    int made = names_answer(names->folder, message, (size_t)n, out);
    if (made > 0)
        sendto(names->fd, out, (size_t)made, MSG_DONTWAIT, (struct sockaddr *)&from, sizeof from);
    else if (made == 0)
        ask(names, message, (size_t)n, &from);
}
