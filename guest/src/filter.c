#include "filter.h"

#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

static int digit(char c) {
    return c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

int filter_parse(const char *hex, struct sock_fprog *out) {
    size_t size = strlen(hex) / 2, each = sizeof(struct sock_filter);
    *out = (struct sock_fprog){0};
    errno = EINVAL;
    if (strlen(hex) % 2 || size == 0 || size % each || size / each > BPF_MAXINSNS)
        return -1;
    uint8_t *bytes = malloc(size);
    if (!bytes)
        return -1;
    for (size_t i = 0; i < size; i++) {
        int high = digit(hex[2 * i]), low = digit(hex[2 * i + 1]);
        if (high < 0 || low < 0) {
            free(bytes);
            errno = EINVAL;
            return -1;
        }
        bytes[i] = (uint8_t)(high << 4 | low);
    }
    *out = (struct sock_fprog){.len = (unsigned short)(size / each), .filter = (void *)bytes};
    return 0;
}
