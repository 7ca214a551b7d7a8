/* Which frames of a guest pass on their way to passt, and that a stream of them is taken apart and put together right. */
#include "fence.h"

#include <arpa/inet.h>
#include <string.h>

#include "check.h"

static struct fence fence;
static uint8_t frame[64];

static uint32_t address(const char *text) {
    uint32_t a = 0;
    inet_pton(AF_INET, text, &a);
    return a;
}

static bool packet(const char *source, const char *target) {
    uint32_t from = address(source), to = address(target);
    memset(frame, 0, sizeof frame);
    frame[12] = 8;
    frame[14] = 0x45;
    memcpy(frame + 26, &from, 4);
    memcpy(frame + 30, &to, 4);
    return fence_passes(&fence, frame, 34);
}

static void addresses(void) {
    CHECK(packet("10.0.2.15", "192.0.2.1"));
    CHECK(packet("10.0.2.15", "10.0.2.3"));
    CHECK(!packet("10.0.2.15", "192.0.2.7")); /* the host's own */
    static const char *const denied[] = {"127.0.0.1", "127.255.255.255", "0.0.0.0", "0.1.2.3", "169.254.169.254", "224.0.0.1",
                                         "240.0.0.1", "255.255.255.255"};
    for (size_t i = 0; i < sizeof denied / sizeof *denied; i++)
        CHECK(!packet("10.0.2.15", denied[i]));
    CHECK(!packet("127.0.0.1", "192.0.2.1"));
    CHECK(!packet("10.0.2.16", "192.0.2.1"));
}

/* A published port's connections come from the gateway: they are answered, and that is all. */
static void gateway(void) {
    enum { SYN = 2, RST = 4, ACK = 16 };
    static const struct { uint8_t flags; bool passes; } TCP[] = {{SYN | ACK, true}, {ACK, true}, {RST, true}, {SYN, false}, {SYN | RST, false}};
    for (size_t i = 0; i < sizeof TCP / sizeof *TCP; i++) {
        CHECK(!packet("10.0.2.15", "10.0.2.2"));
        frame[23] = 6;
        frame[47] = TCP[i].flags;
        CHECK(fence_passes(&fence, frame, 54) == TCP[i].passes);
        CHECK(!fence_passes(&fence, frame, 53));
        frame[21] = 1; /* a later fragment, in which there are no flags */
        CHECK(!fence_passes(&fence, frame, 54));
        frame[21] = 0, frame[20] = 0x20;
        CHECK(!fence_passes(&fence, frame, 54));
        frame[20] = 0, frame[23] = 17;
        CHECK(!fence_passes(&fence, frame, 54));
        frame[23] = 6, frame[14] = 0x4f; /* more options than there is frame */
        CHECK(!fence_passes(&fence, frame, 54));
    }
}

static void shapes(void) {
    packet("10.0.2.15", "192.0.2.1");
    for (size_t size = 0; size < 34; size++)
        CHECK(!fence_passes(&fence, frame, size));
    frame[14] = 0x65; /* says that it is IPv6 */
    CHECK(!fence_passes(&fence, frame, 64));
    frame[12] = 0x86, frame[13] = 0xdd;
    CHECK(!fence_passes(&fence, frame, 64));
    frame[12] = 0x81, frame[13] = 0; /* a VLAN tag, behind which the addresses lie elsewhere */
    CHECK(!fence_passes(&fence, frame, 64));
    frame[12] = 8, frame[13] = 6;
    CHECK(fence_passes(&fence, frame, 42));
}

/* Good and bad frames in turns, in pieces of every size: what comes out is the good ones. */
static void stream(void) {
    static uint8_t whole[2048], expected[2048], got[2048], buffer[2048];
    size_t length = 0, wanted = 0;
    for (int i = 0; i < 20; i++) {
        bool good = packet("10.0.2.15", i % 3 ? "192.0.2.1" : "127.0.0.1");
        uint32_t size = 34 + (uint32_t)i % 5, header = htonl(size);
        CHECK(good == (i % 3 != 0));
        frame[33 + i % 5] ^= (uint8_t)(i % 5 ? i : 0);
        memcpy(whole + length, &header, 4);
        memcpy(whole + length + 4, frame, size);
        if (good) {
            memcpy(expected + wanted, whole + length, 4 + size);
            wanted += 4 + size;
        }
        length += 4 + size;
    }
    for (size_t piece = 1; piece < 200; piece++) {
        size_t held = 0, done = 0, out;
        for (size_t at = 0; at < length; at += piece) {
            size_t n = length - at < piece ? length - at : piece;
            memcpy(buffer + held, whole + at, n);
            held += n;
            CHECK(fence_sift(&fence, buffer, &held, &out));
            memcpy(got + done, buffer, out);
            done += out;
            memmove(buffer, buffer + out, held -= out);
        }
        CHECK(held == 0 && done == wanted && !memcmp(got, expected, wanted));
    }
    memcpy(buffer, "\x7f\xff\xff\xff", 4);
    size_t held = 4, out;
    CHECK(!fence_sift(&fence, buffer, &held, &out));
}

int main(void) {
    fence.own = address("10.0.2.15");
    fence.gateway = address("10.0.2.2");
    fence.denied[fence.count++] = address("192.0.2.7");
    addresses();
    gateway();
    shapes();
    stream();
    return 0;
}
