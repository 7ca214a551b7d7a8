/* The guest's intake: any bytes, in pieces of any size, and afterwards a SYNC is always understood. */
#include <stdlib.h>
#include <string.h>

#include "frame.h"
#include "line.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static volatile uint8_t sink; /* keeps the reads */

static void drink(struct intake *in, const uint8_t *data, size_t size, bool *synced) {
    struct frame f;
    while (intake_feed(in, &data, &size, &f)) {
        if (f.length > FRAME_MAX)
            abort();
        for (uint32_t i = 0; i < f.length; i++)
            sink ^= f.payload[i];
        *synced = f.type == F_SYNC && f.length == SYNC_SIZE && f.payload[0] == 0xa5;
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static struct intake in;
    static const uint8_t zeros[FRAME_RESYNC];
    in.parser.used = in.resync.used = 0;
    in.skipping = false;
    bool synced = false;
    size_t step = size ? data[0] % 64u + 1 : 1;
    for (size_t at = 0; at < size; at += step) {
        /* A piece of its own, so that a read past it is seen. */
        size_t n = size - at < step ? size - at : step;
        uint8_t *piece = malloc(n);
        memcpy(piece, data + at, n);
        drink(&in, piece, n, &synced);
        free(piece);
    }
    uint8_t sync[FRAME_HEADER + SYNC_SIZE];
    memset(sync, 0xa5, sizeof sync);
    frame_header(sync, F_SYNC, 0, SYNC_SIZE);
    drink(&in, zeros, sizeof zeros, &synced);
    synced = false;
    drink(&in, sync, sizeof sync, &synced);
    if (!synced)
        abort();
    return 0;
}
