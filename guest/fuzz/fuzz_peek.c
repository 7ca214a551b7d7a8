/* What a machine's programs send first, and what its resolvers answer. The first byte says which. */
#include <stdlib.h>
#include <string.h>

#include "peek.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void stream(const uint8_t *data, size_t size) {
    struct peeked whole, part;
    enum peek found = peek_stream(data, size, &whole);
    if ((found == PEEK_NAMED) != (whole.name[0] != 0) || (found == PEEK_REFUSED) != (whole.why[0] != 0))
        abort();
    /* However the bytes come in pieces, the verdict is the same. */
    for (size_t i = 0; i < size && i < 600; i++) {
        enum peek before = peek_stream(data, i, &part);
        if (before == PEEK_MORE)
            continue;
        if (before != found || strcmp(part.name, whole.name))
            abort();
        break;
    }
}

static void answer(const uint8_t *data, size_t size) {
    char name[PEEK_NAME];
    uint8_t found[PEEK_ADDRESSES][4];
    size_t end = 0;
    uint32_t ttl;
    if (peek_question(data, size, name, &end) && (end > size || strlen(name) >= PEEK_NAME))
        abort();
    int count = peek_addresses(data, size, found, &ttl);
    if (count < -1 || count > PEEK_ADDRESSES)
        abort();
    for (int i = 0; i < count; i++)
        peek_private(found[i]);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (!size)
        return 0;
    if (data[0] % 3 == 0)
        stream(data + 1, size - 1);
    else if (data[0] % 3 == 1)
        answer(data + 1, size - 1);
    else
        peek_quic(data + 1, size - 1);
    return 0;
}
