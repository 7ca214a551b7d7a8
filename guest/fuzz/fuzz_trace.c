/* The words of the operation `trace`: one word, then another. What is taken holds only what the tracer can do. */
#include <stdlib.h>
#include <string.h>

#include "tracer.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static struct asked a;
    char first[256] = "", second[256] = "";
    size_t half = size / 2;
    if (size > 500)
        return 0;
    memcpy(first, data, half);
    memcpy(second, data + half, size - half);
    memset(&a, 0, sizeof a);
    if (!asked_parse(&a, (char *[]){first, second, NULL}))
        return 0;
    if (a.bytes > TRACE_STRING)
        abort();
    for (size_t nr = 0; nr < TRACE_CALLS; nr++)
        for (int i = 0; i < a.calls[nr].count; i++)
            if (a.calls[nr].captures[i].arg > 5 || a.calls[nr].captures[i].size > TRACE_STRUCT || i > 5 || !a.calls[nr].wanted)
                abort();
    return 0;
}
