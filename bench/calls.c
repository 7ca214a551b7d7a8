/* Makes system calls in a loop and prints, a line each, the nanoseconds that one took: calls WHAT ROUNDS COUNT [PATH]. What the last
 * one returned, or its errno less than 0, goes to stderr. bench/vos.py compiles it, static, and runs it in machines, under its
 * peers and without either. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static const char *path = "/etc/passwd";
static long result;

static long made(long returned) { return result = returned < 0 ? -errno : returned; }

static void parent(void) { made(syscall(SYS_getppid)); }

static void look(void) {
    if (made(syscall(SYS_openat, AT_FDCWD, path, O_RDONLY, 0)) >= 0)
        close((int)result);
}

static void file(void) {
    char text[64];
    int fd = open(path, O_RDONLY);
    if (fd < 0 || read(fd, text, sizeof text) < 0 || close(fd) < 0) {
        perror(path);
        exit(1);
    }
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e9 + (double)t.tv_nsec;
}

/* A program as one would trace it: it opens a few files and starts itself again once, reads much and computes. */
static void work(char **argv, int left) {
    static char zeros[4096];
    volatile unsigned sum = 0;
    int zero = open("/dev/zero", O_RDONLY | O_CLOEXEC);
    for (int i = 0; i < 25000; i++) {
        if (i % 5000 == 0)
            file();
        if (read(zero, zeros, sizeof zeros) < 0)
            exit(1);
        for (size_t k = 0; k < sizeof zeros; k++)
            sum += (unsigned)zeros[k] ^ (unsigned)k;
    }
    argv[2][0] = (char)('0' + left - 1);
    if (left > 1)
        execv("/proc/self/exe", argv);
}

int main(int argc, char **argv) {
    static const struct { const char *name; void (*call)(void); } known[] = {{"parent", parent}, {"look", look}, {"file", file}};
    int rounds = argc > 2 ? atoi(argv[2]) : 0, count = argc > 3 ? atoi(argv[3]) : 0;
    if (argc > 4)
        path = argv[4];
    if (argc > 2 && strcmp(argv[1], "work") == 0) {
        work(argv, rounds);
        return 0;
    }
    for (size_t k = 0; argc > 1 && k < sizeof known / sizeof *known; k++) {
        if (strcmp(argv[1], known[k].name) != 0)
            continue;
        for (int i = 0; i < count / 10 + 1; i++)
            known[k].call(); /* until somebody is there to answer */
        for (int round = 0; round < rounds; round++) {
            double began = now();
            for (int i = 0; i < count; i++)
                known[k].call();
            printf("%.1f\n", (now() - began) / count);
        }
        fprintf(stderr, "%ld\n", result);
        return 0;
    }
    return 2;
}
