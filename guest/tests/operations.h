/* Operations as one text, words by spaces, operations by newlines, as they travel. */
#ifndef TVINIT_OPERATIONS_H
#define TVINIT_OPERATIONS_H

#include <stdio.h>
#include <string.h>

#include "wire.h"

static inline void write_operations(struct writer *w, const char *text) {
    size_t begin = w->used;
    uint32_t count = 0;
    char copy[8192], *line_state, *word_state;
    snprintf(copy, sizeof copy, "%s", text);
    write_u32(w, 0);
    for (char *line = strtok_r(copy, "\n", &line_state); line; line = strtok_r(NULL, "\n", &line_state), count++) {
        size_t at = w->used;
        uint32_t words = 0;
        write_u32(w, 0);
        for (char *word = strtok_r(line, " ", &word_state); word; word = strtok_r(NULL, " ", &word_state), words++)
            write_string(w, word);
        memcpy(w->data + at, &words, 4);
    }
    memcpy(w->data + begin, &count, 4);
}

#endif
