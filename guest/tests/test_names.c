/* Names: questions that a machine asks of its relay, honest and not. */
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "check.h"
#include "relay.h"

static char place[] = "/tmp/names-XXXXXX";
static int folder;

static void write_file(const char *name, const char *text) {
    int fd = openat(folder, name, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    CHECK(fd >= 0 && write(fd, text, strlen(text)) == (ssize_t)strlen(text));
    close(fd);
}

/* A question of one type for dotted `name`, into `query`. */
static size_t ask(uint8_t *query, const char *name, int type) {
    size_t at = 12;
    memset(query, 0, 12);
    query[0] = 0xab;
    query[1] = 0xcd;
    query[2] = 1;
    query[5] = 1;
    for (const char *label = name; *label;) {
        size_t length = strcspn(label, ".");
        query[at++] = (uint8_t)length;
        memcpy(query + at, label, length);
        at += length;
        label += length + (label[length] == '.');
    }
    query[at++] = 0;
    query[at++] = 0;
    query[at++] = (uint8_t)type;
    query[at++] = 0;
    query[at++] = 1;
    return at;
}

static int answer(const char *name, int type, uint8_t *out) {
    uint8_t query[512];
    return names_answer(folder, query, ask(query, name, type), out);
}

static void known(void) {
    uint8_t out[NAMES_MESSAGE];
    static const char *const same[] = {"web", "WEB", "web.trivisor", "Web.TriVisor"};
    for (size_t i = 0; i < 4; i++) {
        int n = answer(same[i], 1, out);
        CHECK(n > 16 && out[0] == 0xab && out[1] == 0xcd && out[2] == 0x85 && out[3] == 0x80 && out[7] == 1);
        CHECK(!memcmp(out + n - 4, "\x0a\xd5\x00\x02", 4));
    }
    int n = answer("web", 28, out); /* it has no IPv6 address, but it is there */
    CHECK(n > 0 && out[3] == 0x80 && out[7] == 0);
}

static void unknown(void) {
    uint8_t out[NAMES_MESSAGE];
    CHECK(answer("nobody.trivisor", 1, out) > 0 && (out[3] & 15) == 3);
    CHECK(answer("nobody", 1, out) == 0 && answer("example.org", 1, out) == 0 && answer("web.example.org", 1, out) == 0);
    CHECK(answer("web.trivisor.org", 1, out) == 0);
    static const char *const files[] = {"damaged", "link", "sub", "fifo"};
    for (size_t i = 0; i < 4; i++)
        CHECK(answer(files[i], 1, out) == 0);
    uint8_t query[512];
    size_t size = ask(query, "web", 1);
    CHECK(names_answer(-1, query, size, out) == 0); /* of no network */
}

static void hostile(void) {
    uint8_t out[NAMES_MESSAGE], query[NAMES_MESSAGE];
    /* A label may hold any byte: none of these may become a path. */
    static const char *const paths[] = {"../web", "/etc/hostname", "sub/web", "..", ".hidden", "we\nb", "web "};
    for (size_t i = 0; i < sizeof paths / sizeof *paths; i++) {
        size_t length = strlen(paths[i]);
        memset(query, 0, 32);
        query[5] = 1;
        query[12] = (uint8_t)length;
        memcpy(query + 13, paths[i], length);
        query[13 + length + 2] = 1;
        query[13 + length + 4] = 1;
        CHECK(names_answer(folder, query, 13 + length + 5, out) == 0);
    }
    size_t size = ask(query, "web", 1);
    for (size_t cut = 0; cut < size; cut++)
        CHECK(names_answer(folder, query, cut, out) == -1);
    query[12] = 0xc0; /* a pointer, to itself */
    query[13] = 12;
    CHECK(names_answer(folder, query, size, out) == -1);
    size = ask(query, "web", 1);
    query[2] |= 0x80; /* an answer */
    CHECK(names_answer(folder, query, size, out) == -1);
    query[2] = 1;
    query[5] = 2; /* two questions */
    CHECK(names_answer(folder, query, size, out) == -1);
    memset(query + 12, 1, sizeof query - 12); /* a name without end */
    query[5] = 1;
    CHECK(names_answer(folder, query, sizeof query - 20, out) == -1);
}

int main(void) {
    CHECK(mkdtemp(place));
    folder = open(place, O_PATH | O_DIRECTORY | O_CLOEXEC);
    write_file("web", "10.213.0.2\n");
    write_file("damaged", "10.213.0\n");
    write_file(".hidden", "10.213.0.9\n");
    CHECK(mkdirat(folder, "sub", 0755) == 0 && mkfifoat(folder, "fifo", 0644) == 0 && symlinkat("web", folder, "link") == 0);
    known();
    unknown();
    hostile();
    static const char *const files[] = {"web", "damaged", ".hidden", "fifo", "link"};
    for (size_t i = 0; i < 5; i++)
        unlinkat(folder, files[i], 0);
    unlinkat(folder, "sub", AT_REMOVEDIR);
    rmdir(place);
    return 0;
}
