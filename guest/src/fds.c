#include "fds.h"

#include <limits.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

static int by_number(const void *a, const void *b) { return *(const int *)a - *(const int *)b; }

void close_all_but(int *kept, size_t count) {
    int next = 3;
    qsort(kept, count, sizeof *kept, by_number);
    for (size_t i = 0; i < count; i++) {
        if (kept[i] > next)
            syscall(SYS_close_range, next, kept[i] - 1, 0);
        if (kept[i] >= next)
            next = kept[i] + 1;
    }
    syscall(SYS_close_range, next, INT_MAX, 0); /* gVisor takes more than that for negative */
}
