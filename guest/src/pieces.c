#include "pieces.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/blkpg.h>
#include <linux/fs.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

enum { ALIGNED = 4096 };

static int mount_at(const char *device, const char *folder) {
    if (mkdir(folder, 0755) < 0 && errno != EEXIST)
        return -1;
    return mount(device, folder, "squashfs", MS_RDONLY, NULL);
}

/* One number of bytes after another, each larger. */
static int read_offsets(char **words, long long *starts, int *count) {
    for (; words[*count]; ++*count) {
        char *end;
        errno = 0;
        long long value = *count + 1 < PIECES_MOST ? strtoll(words[*count], &end, 10) : -1;
        if (value <= starts[*count] || errno || *end || value % ALIGNED)
            return errno = EINVAL, -1;
        starts[*count + 1] = value;
    }
    return 0;
}

/* A partition needs no table on the disk: the kernel is told. It, not the whole device, is mounted, so that each may have its own. */
static int add_partition(int disk, int number, long long start, long long end) {
    struct blkpg_partition part = {.start = start, .length = end - start, .pno = number};
    struct blkpg_ioctl_arg arg = {.op = BLKPG_ADD_PARTITION, .datalen = sizeof part, .data = &part};
    return end > start ? ioctl(disk, BLKPG, &arg) : (errno = EINVAL, -1);
}

int pieces_mount(const char *device, char **offsets, char *lowers, size_t size) {
    long long starts[PIECES_MOST + 1] = {0};
    int count = 0, result = 0;
    if (read_offsets(offsets, starts, &count) < 0)
        return -1;
    if (count == 0)
        return snprintf(lowers, size, "/lower") < (int)size ? mount_at(device, "/lower") : -1;
    uint64_t whole = 0;
    int disk = open(device, O_RDONLY | O_CLOEXEC);
    if (disk < 0 || ioctl(disk, BLKGETSIZE64, &whole) < 0)
        result = -1;
    size_t used = 0;
    for (int i = count; !result && i >= 0; i--) {
        char name[64], folder[24];
        long long end = i == count ? (long long)whole / ALIGNED * ALIGNED : starts[i + 1];
        snprintf(folder, sizeof folder, "/lower.%d", i);
        used += (size_t)snprintf(lowers + used, size - used, "%s%s", used ? ":" : "", folder);
        if (used >= size || snprintf(name, sizeof name, "%s%d", device, i + 1) >= (int)sizeof name)
            result = (errno = ENAMETOOLONG, -1);
        else
            result = add_partition(disk, i + 1, starts[i], end) < 0 || mount_at(name, folder) < 0 ? -1 : 0;
    }
    if (disk >= 0) {
        int error = errno;
        close(disk);
        errno = error;
    }
    return result;
}
