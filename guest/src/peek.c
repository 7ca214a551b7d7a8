/* Whom a connection is for: the server name of a TLS client hello, or the host of an HTTP request. See peek.h. */
#include "peek.h"

#include <string.h>

#define RECORD 5
#define HANDSHAKE 22
#define CLIENT_HELLO 1
#define HELLO_MOST 16384
#define SERVER_NAME 0
#define ECH 0xfe0d
#define ESNI 0xffce

static enum peek refused(struct peeked *out, const char *why) {
    out->why = why;
    return PEEK_REFUSED;
}

static int is_letter(uint8_t c) {
    return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '-' || c == '_';
}

/* Takes over a host's name: labels of letters and digits, and not an address. Returns 0 if it is none. */
static int take_name(const uint8_t *text, size_t size, char name[PEEK_NAME]) {
    size_t label = 0, only_digits = 1;
    if (size && text[size - 1] == '.')
        size--;
    if (!size || size >= PEEK_NAME)
        return 0;
    for (size_t i = 0; i < size; i++) {
        uint8_t c = text[i] >= 'A' && text[i] <= 'Z' ? (uint8_t)(text[i] + 32) : text[i];
        if (c == '.' ? !label : !is_letter(c) || label == 63)
            return 0;
        only_digits = c == '.' ? 1 : only_digits && c >= '0' && c <= '9';
        label = c == '.' ? 0 : label + 1;
        name[i] = (char)c;
    }
    name[size] = 0;
    return !only_digits; /* the last label of an address is a number, that of a name is not */
}

/* A part of a message: what is left to read of it. `short_of` is set for good when something would reach beyond its end. */
struct part {
    const uint8_t *at;
    size_t left;
    int short_of;
};

static struct part take(struct part *from, size_t size) {
    struct part taken = {from->at, size, from->short_of};
    if (from->short_of || size > from->left) {
        from->short_of = 1;
        return (struct part){from->at, 0, 1};
    }
    from->at += size;
    from->left -= size;
    return taken;
}

static unsigned number(struct part *from, size_t bytes) {
    struct part taken = take(from, bytes);
    unsigned value = 0;
    for (size_t i = 0; i < taken.left; i++)
        value = value << 8 | taken.at[i];
    return value;
}

/* Reads the list of server names: one host name, and nothing else. */
static int server_name(struct part extension, char name[PEEK_NAME]) {
    struct part list = take(&extension, number(&extension, 2));
    unsigned type = number(&list, 1);
    struct part host = take(&list, number(&list, 2));
    return !extension.left && !list.left && !host.short_of && !list.short_of && type == 0 && take_name(host.at, host.left, name);
}

static enum peek hello(struct part body, struct peeked *out) {
    int named = 0;
    take(&body, 2 + 32);              /* version, random */
    take(&body, number(&body, 1));    /* session */
    take(&body, number(&body, 2));    /* ciphers */
    take(&body, number(&body, 1));    /* compression */
    struct part extensions = take(&body, number(&body, 2));
    if (body.short_of || body.left)
        return refused(out, "a malformed client hello");
    while (extensions.left && !extensions.short_of) {
        unsigned type = number(&extensions, 2);
        struct part one = take(&extensions, number(&extensions, 2));
        if (one.short_of)
            break;
        if (type == ECH || type == ESNI)
            return refused(out, "an encrypted client hello");
        if (type == SERVER_NAME && (named++ || !server_name(one, out->name)))
            return refused(out, "a server name that is none");
    }
    if (extensions.short_of)
        return refused(out, "a malformed client hello");
    return named ? PEEK_NAMED : refused(out, "a client hello without a server name");
}

/* Puts the hello together from its records: it may be cut anywhere. */
static enum peek tls(const uint8_t *data, size_t size, struct peeked *out) {
    uint8_t whole[HELLO_MOST];
    size_t have = 0, at = 0;
    while (size - at >= RECORD) {
        size_t length = (size_t)data[at + 3] << 8 | data[at + 4];
        if (data[at] != HANDSHAKE || data[at + 1] != 3 || !length || length > HELLO_MOST)
            return refused(out, "a malformed TLS record");
        size_t there = size - at - RECORD < length ? size - at - RECORD : length;
        if (there > sizeof whole - have)
            return refused(out, "a client hello that is too long");
        memcpy(whole + have, data + at + RECORD, there);
        have += there;
        at += RECORD + there;
        if (have && whole[0] != CLIENT_HELLO)
            return refused(out, "TLS that begins with something else than a client hello");
        if (have >= 4) {
            size_t body = (size_t)whole[1] << 16 | (size_t)whole[2] << 8 | whole[3];
            if (body > sizeof whole - 4)
                return refused(out, "a client hello that is too long");
            if (have - 4 >= body)
                return hello((struct part){whole + 4, body, 0}, out);
        }
        if (there < length)
            break;
    }
    return PEEK_MORE;
}

static int equals(const uint8_t *text, size_t size, const char *word) {
    if (size != strlen(word))
        return 0;
    for (size_t i = 0; i < size; i++)
        if ((text[i] >= 'A' && text[i] <= 'Z' ? text[i] + 32 : text[i]) != word[i])
            return 0;
    return 1;
}

/* Takes over the host of a Host field: a name, and a port if there is one. */
static int take_host(const uint8_t *text, size_t size, char name[PEEK_NAME]) {
    while (size && (*text == ' ' || *text == '\t'))
        text++, size--;
    while (size && (text[size - 1] == ' ' || text[size - 1] == '\t'))
        size--;
    const uint8_t *colon = memchr(text, ':', size);
    size_t host = colon ? (size_t)(colon - text) : size;
    for (size_t i = host + 1; i < size; i++)
        if (text[i] < '0' || text[i] > '9')
            return 0;
    return take_name(text, host, name);
}

/* Checks the first line: a method, a path (not a whole address, whose host would count instead), HTTP/1. */
static const char *request_line(const uint8_t *line, size_t size) {
    const uint8_t *space = memchr(line, ' ', size);
    if (!space || space == line)
        return "a malformed HTTP request";
    for (const uint8_t *c = line; c < space; c++)
        if (*c < 'A' || *c > 'Z')
            return "neither TLS nor HTTP";
    size_t left = size - (size_t)(space + 1 - line);
    const uint8_t *path = space + 1, *end = memchr(path, ' ', left);
    if (!end || (size_t)(path + left - end) != 9 || memcmp(end + 1, "HTTP/1.", 7) || (end[8] != '0' && end[8] != '1'))
        return "a malformed HTTP request";
    if (*path != '/' && !(end - path == 1 && *path == '*'))
        return "an HTTP request for a proxy";
    return NULL;
}

static enum peek http(const uint8_t *data, size_t size, struct peeked *out) {
    size_t at = 0;
    int lines = 0, named = 0;
    for (size_t i = 0; i < size && i < 16 && data[i] != ' '; i++)
        if (data[i] < 'A' || data[i] > 'Z' || i == 15)
            return refused(out, "neither TLS nor HTTP");
    while (at < size) {
        const uint8_t *line = data + at, *end = memchr(line, '\n', size - at);
        if (!end)
            break;
        size_t length = (size_t)(end - line);
        if (!length || line[length - 1] != '\r' || memchr(line, '\r', length - 1) || memchr(line, 0, length))
            return refused(out, "a malformed HTTP request");
        at += length-- + 1;
        if (!lines++) {
            const char *why = request_line(line, length);
            if (why)
                return refused(out, why);
            continue;
        }
        if (!length)
            return named ? PEEK_NAMED : refused(out, "an HTTP request without a host");
        const uint8_t *colon = memchr(line, ':', length);
        if (!colon || colon == line || colon[-1] == ' ' || colon[-1] == '\t' || *line == ' ' || *line == '\t')
            return refused(out, "a malformed HTTP request");
        size_t name = (size_t)(colon - line);
        if (equals(line, name, "host") && (named++ || !take_host(colon + 1, length - name - 1, out->name)))
            return refused(out, "an HTTP host that is none");
    }
    return PEEK_MORE;
}

enum peek peek_stream(const uint8_t *data, size_t size, struct peeked *out) {
    *out = (struct peeked){.why = ""};
    if (!size)
        return PEEK_MORE;
    enum peek found = data[0] == HANDSHAKE ? tls(data, size < PEEK_MOST ? size : PEEK_MOST, out) : http(data, size < PEEK_MOST ? size : PEEK_MOST, out);
    if (found == PEEK_MORE && size >= PEEK_MOST)
        found = refused(out, "a beginning that is too long");
    if (found != PEEK_NAMED)
        out->name[0] = 0;
    return found;
}

int peek_quic(const uint8_t *data, size_t size) {
    /* A long header bears a version, and every connection begins with one; of a short header nothing can be told but the fixed bit. */
    if (size < 7 || !(data[0] & 0x80))
        return 0;
    size_t to = data[5];
    return to <= 20 && size >= 7 + to && data[6 + to] <= 20 && size >= 7 + to + data[6 + to];
}
