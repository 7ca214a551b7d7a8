/* Questions from a machine to its relay. */
#include <fcntl.h>
#include <stdlib.h>

#include "relay.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static int folder = -1;
    uint8_t out[NAMES_MESSAGE];
    if (folder < 0)
        folder = open("/sys/class", O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (size > NAMES_MESSAGE)
        return 0;
    int made = names_answer(folder, data, size, out);
    if (made > NAMES_MESSAGE || made < -1)
        abort();
    return 0;
}
