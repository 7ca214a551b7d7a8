/* Frames: cut anywhere, malformed, and found again by SYNC. */
#include <string.h>

#include "check.h"
#include "frame.h"
#include "line.h"

static const uint8_t nonce[NONCE_SIZE] = {0x54, 1, 0, 0, 0x14, 0, 0, 0, 0x54, 0x54, 1, 2, 3, 4, 5, 6};

static size_t put(uint8_t *at, uint8_t type, uint32_t stream, const void *payload, size_t size) {
    frame_header(at, type, stream, (uint32_t)size);
    if (size)
        memcpy(at + FRAME_HEADER, payload, size);
    return FRAME_HEADER + size;
}

static void every_cut(void) {
    uint8_t bytes[256] = {0};
    size_t used = 3; /* padding first */
    used += put(bytes + used, F_PING, 7, "hello", 5);
    used += 5;
    used += put(bytes + used, F_GONE, 9 << 16, NULL, 0);
    for (size_t cut = 0; cut <= used; cut++) {
        static struct parser p;
        struct frame f;
        int frames = 0;
        p.used = 0;
        const uint8_t *at = bytes;
        for (size_t part = 0; part < 2; part++) {
            size_t left = part ? used - cut : cut;
            while (parser_feed(&p, &at, &left, &f) == PARSE_FRAME) {
                frames++;
                CHECK(frames == 1 ? f.type == F_PING && f.stream == 7 && f.length == 5 && !memcmp(f.payload, "hello", 5)
                                  : f.type == F_GONE && f.stream == 9 << 16 && f.length == 0);
            }
            CHECK(left == 0);
        }
        CHECK(frames == 2);
    }
}

static enum parse one(const uint8_t *bytes, size_t size) {
    static struct parser p;
    struct frame f;
    p.used = 0;
    return parser_feed(&p, &bytes, &size, &f);
}

static void malformed(void) {
    uint8_t bytes[FRAME_HEADER];
    frame_header(bytes, F_PING, 0, FRAME_MAX + 1);
    CHECK(one(bytes, sizeof bytes) == PARSE_BAD);
    frame_header(bytes, F_PING, 0, FRAME_MAX);
    CHECK(one(bytes, sizeof bytes) == PARSE_MORE);
    bytes[2] = 1;
    CHECK(one(bytes, sizeof bytes) == PARSE_BAD);
    CHECK(one((const uint8_t *)"x", 1) == PARSE_BAD);
}

/* Whatever came before, and wherever it was cut, zeros and SYNC are understood. */
static void resynchronises(void) {
    static uint8_t bytes[200000];
    static struct intake in;
    uint8_t payload[SYNC_SIZE];
    unsigned seed = 1;
    memcpy(payload, nonce, NONCE_SIZE);
    put_u32(payload + NONCE_SIZE, PROTOCOL_VERSION);
    for (int round = 0; round < 300; round++) {
        size_t used = 0, noise = (size_t)round * 7;
        for (size_t i = 0; i < noise; i++)
            bytes[used++] = round % 3 ? (uint8_t)(seed = seed * 1103515245 + 12345) >> 3 : sizeof payload;
        used += put(bytes + used, F_DATA, 5, payload, (size_t)round % SYNC_SIZE) - (size_t)round % 9;
        memset(bytes + used, 0, FRAME_RESYNC);
        used += FRAME_RESYNC;
        used += put(bytes + used, F_SYNC, 0, payload, sizeof payload);
        used += put(bytes + used, F_PING, 1, "x", 1);
        in.parser.used = in.resync.used = 0;
        in.skipping = false;
        bool synced = false, ping = false;
        const uint8_t *at = bytes;
        size_t left = used;
        struct frame f;
        while (intake_feed(&in, &at, &left, &f)) {
            synced |= f.type == F_SYNC && f.length == SYNC_SIZE && !memcmp(f.payload, payload, SYNC_SIZE);
            ping |= synced && f.type == F_PING && f.length == 1;
        }
        CHECK(synced && ping && !in.skipping);
    }
}

int main(void) {
    every_cut();
    malformed();
    resynchronises();
    return 0;
}
