/* A guest that is honest until it is told not to be: linked over tvinit (--wrap), it takes a command whose argv names one of
 * these as its cue. With SILENT it never answers at all, from the start.
 */
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "frame.h"
#include "line.h"

int __real_line_open(int fd);
void __real_exec_frame(const struct frame *f);
void __real_line_synced(const uint8_t nonce[NONCE_SIZE]);
int __wrap_line_open(int fd);
void __wrap_exec_frame(const struct frame *f);
void __wrap_line_synced(const uint8_t nonce[NONCE_SIZE]);

static int line = -1;

int __wrap_line_open(int fd) {
    int opened = __real_line_open(fd);
    line = fd;
    return opened;
}

void __wrap_line_synced(const uint8_t nonce[NONCE_SIZE]) {
#ifdef SILENT
    (void)nonce;
#else
    __real_line_synced(nonce);
#endif
}

static int put(const void *data, size_t size) {
    const uint8_t *at = data;
    while (size) {
        ssize_t done = write(line, at, size);
        if (done < 0 && errno != EAGAIN)
            return -1;
        if (done < 0) {
            struct pollfd wait = {line, POLLOUT, 0};
            poll(&wait, 1, 1000);
            continue;
        }
        at += done;
        size -= (size_t)done;
    }
    return 0;
}

static int frame(uint8_t type, uint32_t stream, const void *payload, uint32_t claimed, uint32_t real) {
    uint8_t header[FRAME_HEADER];
    frame_header(header, type, stream, claimed);
    return put(header, sizeof header) || put(payload, real);
}

static void endless(uint8_t type, uint32_t stream, const void *payload, uint32_t size) {
    while (!frame(type, stream, payload, size, size)) {
    }
}

void __wrap_exec_frame(const struct frame *f) {
    static uint8_t much[FRAME_MAX];
    uint8_t started[4] = {7};
#define TOLD(word) memmem(f->payload, f->length, "hostile " word, sizeof "hostile " word - 1)
    if (TOLD("garbage")) {
        for (size_t i = 0; i < sizeof much; i++)
            much[i] = (uint8_t)(rand() | 1);
        put(much, sizeof much);
    } else if (TOLD("endless garbage")) {
        memset(much, 0xff, sizeof much);
        while (!put(much, sizeof much)) {
        }
    } else if (TOLD("oversized")) {
        frame(F_DATA, f->stream, much, 0xffffffff, sizeof much);
    } else if (TOLD("half a frame")) {
        frame(F_DATA, f->stream, much, FRAME_MAX, 10);
    } else if (TOLD("too much data")) {
        frame(F_STARTED, f->stream, started, sizeof started, sizeof started);
        much[0] = CH_STDOUT;
        endless(F_DATA, f->stream, much, FRAME_MAX);
    } else if (TOLD("nobody's stream")) {
        endless(F_DATA, f->stream + 0x10001, much, 100);
    } else if (TOLD("its own kind")) {
        frame(F_KEEPER_INFO, f->stream, much, 100, 100);
    } else if (TOLD("request")) {
        frame(F_EXEC, f->stream, much, 100, 100);
    } else if (TOLD("short end")) {
        frame(F_STARTED, f->stream, started, sizeof started, sizeof started);
        frame(F_EXITED, f->stream, much, 3, 3);
    } else if (TOLD("wrong end")) {
        memset(much, 0xff, sizeof much);
        frame(F_EXITED, f->stream, much, 29, 29);
    } else if (TOLD("endless log")) {
        memset(much, 'x', sizeof much);
        endless(F_LOG, 0, much, FRAME_MAX);
    } else if (TOLD("endless bye")) {
        memset(much, 0, sizeof much);
        endless(F_BYE, 0, much, 4);
    } else if (TOLD("endless synced")) {
        endless(F_SYNCED, 0, much, SYNC_SIZE);
    } else if (TOLD("silence")) {
        for (;;)
            pause();
    } else {
        __real_exec_frame(f);
    }
}
