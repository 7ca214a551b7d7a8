/* Runs in a machine: what root there can do to the line that PID 1 holds open.
 *
 *   port_writer BYTES MODE    take a copy of PID 1's descriptor and write to it: random, frames, or header (of a frame without its payload)
 *   port_writer BYTES steal   read from it instead, so that PID 1 misses what the host says
 *
 * BYTES 0: without end. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/syscall.h>
#include <unistd.h>

static int port(void) {
    int self = (int)syscall(SYS_pidfd_open, 1, 0);
    for (int fd = 0; fd < 64; fd++) {
        char name[64], target[256] = "";
        snprintf(name, sizeof name, "/proc/1/fd/%d", fd);
        if (readlink(name, target, sizeof target - 1) > 0 && strstr(target, "vport"))
            return (int)syscall(SYS_pidfd_getfd, self, fd, 0);
    }
    return -1;
}

/* A frame whose header is right and whose type, stream and payload are whatever comes. */
static size_t frame(uint8_t *at) {
    static const uint8_t types[] = {0x02, 0x03, 0x06, 0x07, 0x0a, 0x0b, 0x0d, 0x11, 0x12, 0x13, 0x14, 0x40, 0x42, 0xff};
    uint8_t dice[6];
    getrandom(dice, sizeof dice, 0);
    uint32_t length = dice[0] % 64, stream = (uint32_t)(dice[1] % 8) << 16 | dice[2] % 8;
    at[0] = 0x54;
    at[1] = types[dice[3] % (dice[4] % 8 ? 12 : sizeof types)];
    at[2] = at[3] = 0;
    memcpy(at + 4, &length, 4);
    memcpy(at + 8, &stream, 4);
    getrandom(at + 12, length, 0);
    return 12 + length;
}

int main(int argc, char **argv) {
    if (argc != 3)
        return 2;
    unsigned long bytes = strtoul(argv[1], NULL, 10), done = 0;
    int fd = port();
    if (fd < 0) {
        perror("port");
        return 1;
    }
    static uint8_t block[4096];
    while (!bytes || done < bytes) {
        size_t size = bytes && bytes - done < sizeof block ? bytes - done : sizeof block;
        if (!strcmp(argv[2], "frames"))
            size = frame(block);
        else if (!strcmp(argv[2], "header"))
            memcpy(block, "\x54\x13\0\0\0\x10\0\0\1\0\1\0", size = 12);
        else
            getrandom(block, size, 0);
        ssize_t n = strcmp(argv[2], "steal") ? write(fd, block, size) : read(fd, block, sizeof block);
        if (n < 0 && errno == EAGAIN) {
            struct pollfd p = {.fd = fd, .events = strcmp(argv[2], "steal") ? POLLOUT : POLLIN};
            poll(&p, 1, 100);
            continue;
        }
        if (n <= 0) {
            perror("line");
            return 1;
        }
        done += (unsigned long)n;
    }
    return 0;
}
