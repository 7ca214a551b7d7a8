/* Makes system calls by number, which libc would not let us: each argument is NR,ARG,... ; prints what it returned, or minus errno. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

int main(int argc, char **argv) {
    for (int i = 1; i < argc; i++) {
        unsigned long words[7] = {0};
        char *at = argv[i];
        for (int n = 0; n < 7 && *at; n++) {
            words[n] = strtoul(at, &at, 0);
            at += *at == ',';
        }
        long result = syscall((long)words[0], words[1], words[2], words[3], words[4], words[5], words[6]);
        printf("%s%ld", i > 1 ? " " : "", result < 0 ? -(long)errno : result);
    }
    puts("");
    return 0;
}
