/* Whom a connection is for, said in every way that a server may understand otherwise. */
#include <stdio.h>
#include <string.h>

#include "check.h"
#include "peek.h"

static uint8_t bytes[40000];
static size_t size;

static void put(const void *data, size_t length) {
    memcpy(bytes + size, data, length);
    size += length;
}

static void put_number(unsigned long value, int length) {
    while (length--)
        bytes[size++] = (uint8_t)(value >> 8 * length);
}

/* Begins something with its length before it; `ended` fills it in. */
static size_t begun(int length) {
    size_t at = size;
    put_number(0, length);
    return at;
}

static void ended(size_t at, int length) {
    size_t all = size - at - (size_t)length;
    for (int i = 0; i < length; i++)
        bytes[at + (size_t)i] = (uint8_t)(all >> 8 * (length - 1 - i));
}

static void server_name(const char *name, unsigned type) {
    put_number(0, 2);
    size_t extension = begun(2), list = begun(2);
    put_number(type, 1);
    size_t host = begun(2);
    put(name, strlen(name));
    ended(host, 2), ended(list, 2), ended(extension, 2);
}

/* A client hello with a name (NULL: none), an extension of `other` (0: none), and the name once more with `twice`. */
static void make_hello(const char *name, unsigned other, int twice) {
    size = 0;
    put("\x16\x03\x01", 3);
    size_t record = begun(2);
    put_number(1, 1);
    size_t message = begun(3);
    put("\x03\x03", 2);
    put("0123456789abcdef0123456789abcdef", 32);
    put("\x00\x00\x04\x13\x01\x13\x02\x01\x00", 9);
    size_t extensions = begun(2);
    if (other) {
        put_number(other, 2);
        put("\x00\x03xyz", 5);
    }
    if (name)
        server_name(name, 0);
    if (twice)
        server_name(name, 0);
    ended(extensions, 2), ended(message, 3), ended(record, 2);
}

static struct peeked peeked;

static int named(const char *name) {
    /* Before its last byte nothing is said of it. */
    for (size_t i = 0; i < size; i++)
        CHECK(peek_stream(bytes, i, &peeked) == PEEK_MORE);
    return peek_stream(bytes, size, &peeked) == PEEK_NAMED && !strcmp(peeked.name, name);
}

static int refused(const char *why) {
    if (peek_stream(bytes, size, &peeked) != PEEK_REFUSED || strcmp(peeked.why, why))
        return fprintf(stderr, "%s, not %s\n", peeked.why ? peeked.why : "", why), 0;
    return !peeked.name[0];
}

static void hellos(void) {
    make_hello("Files.Example.org", 0, 0);
    CHECK(named("files.example.org"));
    make_hello("example.org.", 0x0017, 0);
    CHECK(named("example.org"));
    make_hello(NULL, 0x0017, 0);
    CHECK(refused("a client hello without a server name"));
    make_hello("example.org", 0xfe0d, 0);
    CHECK(refused("an encrypted client hello"));
    make_hello("example.org", 0xffce, 0);
    CHECK(refused("an encrypted client hello"));
    make_hello("example.org", 0, 1);
    CHECK(refused("a server name that is none"));
    static const char *const NAMES[] = {"", ".", "a..b", ".a", "192.0.2.7", "a b", "a/b", "a\nb", "a%b", "[::1]", "b\xc3\xbc.de",
                                        "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa.org"};
    for (size_t i = 0; i < sizeof NAMES / sizeof *NAMES; i++) {
        make_hello(NAMES[i], 0, 0);
        CHECK(refused("a server name that is none"));
    }
}

static void hellos_in_pieces(void) {
    uint8_t whole[400];
    make_hello("example.org", 0, 0);
    size_t body = size - 5;
    CHECK(body < sizeof whole);
    memcpy(whole, bytes + 5, body);
    size = 0;
    for (size_t i = 0; i < body; i++) { /* a record for each byte */
        put("\x16\x03\x03\x00\x01", 5);
        put(whole + i, 1);
    }
    CHECK(named("example.org"));
    bytes[6 * 4] = 23; /* application data between them */
    CHECK(refused("a malformed TLS record"));
}

static void hellos_that_are_none(void) {
    make_hello("example.org", 0, 0);
    bytes[5] = 2;
    CHECK(refused("TLS that begins with something else than a client hello"));
    make_hello("example.org", 0, 0);
    bytes[8]--; /* the message ends before its extensions do */
    CHECK(refused("a malformed client hello"));
    make_hello("example.org", 0, 0);
    bytes[6] = 1; /* 64 KiB */
    CHECK(refused("a client hello that is too long"));
    make_hello("example.org", 0, 0);
    bytes[1] = 2;
    CHECK(refused("a malformed TLS record"));
    for (size_t i = 5; i < 120; i++) /* whatever byte is another: a verdict, and no name but a plain one */
        for (int value = 0; value < 256; value += 5) {
            make_hello("example.org", 0x0017, 0);
            bytes[i] = (uint8_t)value;
            if (i < size && peek_stream(bytes, size, &peeked) == PEEK_NAMED)
                CHECK(strspn(peeked.name, "abcdefghijklmnopqrstuvwxyz0123456789-_.") == strlen(peeked.name));
        }
}

static void request(const char *text) {
    size = 0;
    put(text, strlen(text));
}

static void requests(void) {
    request("GET / HTTP/1.1\r\nHost: Example.org\r\n\r\n");
    CHECK(named("example.org"));
    request("POST /a?b HTTP/1.0\r\nAccept: */*\r\nhOsT:\texample.org:8080 \r\nX: y\r\n\r\n");
    CHECK(named("example.org"));
    request("OPTIONS * HTTP/1.1\r\nHost: a.b\r\n\r\n");
    CHECK(named("a.b"));
    static const char *const WRONG[][2] = {
        {"GET / HTTP/1.1\r\n\r\n", "an HTTP request without a host"},
        {"GET / HTTP/1.1\r\nHost: a.org\r\nHost: b.org\r\n\r\n", "an HTTP host that is none"},
        {"GET / HTTP/1.1\r\nHost: 192.0.2.7\r\n\r\n", "an HTTP host that is none"},
        {"GET / HTTP/1.1\r\nHost: a.org, b.org\r\n\r\n", "an HTTP host that is none"},
        {"GET / HTTP/1.1\r\nHost: a.org:80:80\r\n\r\n", "an HTTP host that is none"},
        {"GET / HTTP/1.1\r\nHost : a.org\r\n\r\n", "a malformed HTTP request"},
        {"GET / HTTP/1.1\r\nX: y\r\n Host: a.org\r\n\r\n", "a malformed HTTP request"},
        {"GET / HTTP/1.1\nHost: a.org\n\n", "a malformed HTTP request"},
        {"GET / HTTP/1.1\r\nX: \rHost: a.org\r\n\r\n", "a malformed HTTP request"},
        {"GET / HTTP/2.0\r\nHost: a.org\r\n\r\n", "a malformed HTTP request"},
        {"GET /\r\nHost: a.org\r\n\r\n", "a malformed HTTP request"},
        {"GET http://b.org/ HTTP/1.1\r\nHost: a.org\r\n\r\n", "an HTTP request for a proxy"},
        {"CONNECT b.org:443 HTTP/1.1\r\nHost: a.org\r\n\r\n", "an HTTP request for a proxy"},
        {"SSH-2.0-OpenSSH_9.2\r\n", "neither TLS nor HTTP"},
        {"get / HTTP/1.1\r\n", "neither TLS nor HTTP"},
        {"AAAAAAAAAAAAAAAAAAAAAAAA", "neither TLS nor HTTP"},
    };
    for (size_t i = 0; i < sizeof WRONG / sizeof *WRONG; i++) {
        request(WRONG[i][0]);
        CHECK(refused(WRONG[i][1]));
    }
    request("GET / HTTP/1.1\r\nX: ");
    while (size < PEEK_MOST)
        put("x", 1);
    CHECK(refused("a beginning that is too long"));
}

static void datagrams(void) {
    const uint8_t initial[] = {0xc3, 0, 0, 0, 1, 2, 7, 7, 1, 9, 0, 0};
    CHECK(peek_quic(initial, sizeof initial));
    CHECK(!peek_quic(initial, 8));
    CHECK(!peek_quic((const uint8_t *)"\x12\x34\x01\x00\x00\x01\x00\x00", 8)); /* DNS */
    const uint8_t wide[] = {0xc3, 0, 0, 0, 1, 21, 0, 0};
    CHECK(!peek_quic(wide, sizeof wide));
}

/* The header of an answer with `answers` records, and its question. */
static void answer(const char *name, unsigned answers) {
    size = 0;
    put("\x12\x34\x81\x80\x00\x01", 6);
    put_number(answers, 2);
    put_number(0, 4);
    put(name, strlen(name) + 1);
    put("\x00\x01\x00\x01", 4);
}

static void record(const char *owner, size_t length, unsigned type, const char *data, size_t data_length) {
    put(owner, length);
    put_number(type, 2);
    put("\x00\x01\x00\x00\x00\x05", 6);
    put_number(data_length, 2);
    put(data, data_length);
}

static void answers(void) {
    uint8_t found[PEEK_ADDRESSES][4];
    char name[PEEK_NAME];
    size_t end;
    uint32_t ttl;
    answer("\3WWW\4test", 2);
    CHECK(peek_question(bytes, size, name, &end) == 1 && !strcmp(name, "www.test") && end == size);
    record("\xc0\x0c", 2, 1, "\x01\x02\x03\x04", 4);
    record("\3www\4TEST", 10, 1, "\x05\x06\x07\x08", 4);
    bytes[size - 7] = 4; /* of two, the one that holds less long */
    CHECK(peek_addresses(bytes, size, found, &ttl) == 2 && ttl == 4 && !memcmp(found, "\1\2\3\4\5\6\7\x8", 8));
    for (size_t i = 0; i < size; i++)
        CHECK(peek_addresses(bytes, i, found, &ttl) == -1);
    answer("\3www\4test", 3); /* an alias, in any order; an address of somebody else does not count */
    record("\1x\xc0\x10", 4, 1, "\x01\x02\x03\x04", 4);
    record("\5other\xc0\x10", 8, 1, "\x09\x09\x09\x09", 4);
    record("\xc0\x0c", 2, 5, "\1x\xc0\x10", 4);
    CHECK(peek_addresses(bytes, size, found, &ttl) == 1 && !memcmp(found, "\1\2\3\4", 4));
    answer("\3www\4test", 1); /* an alias of itself */
    record("\xc0\x0c", 2, 5, "\xc0\x0c", 2);
    CHECK(peek_addresses(bytes, size, found, &ttl) == -1);
    answer("\3www\4test", 1); /* a pointer to itself, and one to the end */
    size_t at = size;
    record("\xc0\x1a", 2, 1, "\x01\x02\x03\x04", 4);
    bytes[at + 1] = (uint8_t)at;
    CHECK(peek_addresses(bytes, size, found, &ttl) == -1);
    bytes[at + 1] = 0xff;
    CHECK(peek_addresses(bytes, size, found, &ttl) == -1);
    answer("\3www\4test", 0);
    CHECK(peek_addresses(bytes, size, found, &ttl) == 0);
    bytes[2] = 1; /* a question */
    CHECK(peek_addresses(bytes, size, found, &ttl) == -1);
    answer("\3w*w\4test", PEEK_ADDRESSES + 1);
    CHECK(peek_question(bytes, size, name, &end) == 1 && !strcmp(name, "w?w.test"));
    for (int i = 0; i <= PEEK_ADDRESSES; i++)
        record("\xc0\x0c", 2, 1, "\x01\x02\x03\x04", 4);
    CHECK(peek_addresses(bytes, size, found, &ttl) == -1);
}

static void private_ones(void) {
    static const uint8_t PRIVATE[][4] = {{10, 1, 2, 3}, {127, 0, 0, 1}, {172, 31, 0, 1}, {192, 168, 1, 1}, {169, 254, 169, 254}, {100, 127, 0, 1}, {0, 0, 0, 0}, {255, 255, 255, 255}};
    static const uint8_t PUBLIC[][4] = {{8, 8, 8, 8}, {172, 32, 0, 1}, {100, 128, 0, 1}, {192, 169, 0, 1}, {126, 0, 0, 1}, {223, 255, 255, 255}};
    for (size_t i = 0; i < sizeof PRIVATE / 4; i++)
        CHECK(peek_private(PRIVATE[i]));
    for (size_t i = 0; i < sizeof PUBLIC / 4; i++)
        CHECK(!peek_private(PUBLIC[i]));
}

int main(void) {
    hellos();
    hellos_in_pieces();
    hellos_that_are_none();
    requests();
    datagrams();
    answers();
    private_ones();
    return 0;
}
