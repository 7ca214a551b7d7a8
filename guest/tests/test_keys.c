/* The keys of a terminal that signal, on a kernel that would do it by itself: its master is written to past it. */
#include <errno.h>
#include <fcntl.h>
#include <pty.h>
#include <signal.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

#include "check.h"
#include "keys.h"

static void test_words_pass_and_keys_do_not(void) {
    int master, slave, told[2];
    char seen[16];
    uint8_t number = 0;
    CHECK(openpty(&master, &slave, NULL, NULL, NULL) == 0 && pipe2(told, O_NONBLOCK) == 0);
    const uint8_t *typed = (const uint8_t *)"ab\003c\n\034";
    CHECK(keys_write(master, told[1], typed, 6) == 2);
    CHECK(read(told[0], &number, 1) < 0 && errno == EAGAIN);
    CHECK(keys_write(master, told[1], typed + 2, 4) == 1);
    CHECK(read(told[0], &number, 1) == 1 && number == SIGINT);
    CHECK(keys_write(master, told[1], typed + 3, 3) == 2);
    CHECK(keys_write(master, told[1], typed + 5, 1) == 1);
    CHECK(read(told[0], &number, 1) == 1 && number == SIGQUIT);
    CHECK(read(slave, seen, sizeof seen) == 4 && !memcmp(seen, "abc\n", 4));

    struct termios raw;
    CHECK(tcgetattr(master, &raw) == 0);
    raw.c_lflag &= ~(tcflag_t)(ISIG | ICANON);
    CHECK(tcsetattr(slave, TCSANOW, &raw) == 0);
    CHECK(keys_write(master, told[1], (const uint8_t *)"\003", 1) == 1);
    CHECK(read(slave, seen, sizeof seen) == 1 && seen[0] == 3);
    CHECK(keys_signal()); /* Linux does */

    /* Nobody takes them: they are lost, and typing goes on. */
    while (write(told[1], "x", 1) == 1) {
    }
    raw.c_lflag |= ISIG;
    CHECK(tcsetattr(slave, TCSANOW, &raw) == 0);
    CHECK(keys_write(master, told[1], (const uint8_t *)"\003", 1) == 1);
    close(master);
    close(slave);
    close(told[0]);
    close(told[1]);
}

static void test_the_foreground_is_told(void) {
    int master, slave, told[2], ready[2], status = 0;
    char byte;
    CHECK(openpty(&master, &slave, NULL, NULL, NULL) == 0 && pipe2(told, O_CLOEXEC) == 0 && pipe2(ready, O_CLOEXEC) == 0);
    pid_t leader = fork();
    if (leader == 0) {
        setsid();
        if (ioctl(slave, TIOCSCTTY, 0) < 0 || keys_listen(slave, told[0]) < 0)
            _exit(1);
        signal(SIGTTOU, SIG_IGN);
        signal(SIGINT, SIG_DFL); /* a shell that starts something in the background has it ignored */
        pid_t job = fork();
        if (job == 0) {
            setpgid(0, 0);
            tcsetpgrp(slave, getpid());
            (void)!write(ready[1], "r", 1);
            pause();
            _exit(2);
        }
        waitpid(job, &status, 0);
        _exit(WIFSIGNALED(status) ? 100 + WTERMSIG(status) : 3);
    }
    uint8_t number = SIGINT;
    CHECK(read(ready[0], &byte, 1) == 1);
    CHECK(write(told[1], &number, 1) == 1);
    CHECK(waitpid(leader, &status, 0) == leader && WIFEXITED(status) && WEXITSTATUS(status) == 100 + SIGINT);
    close(told[1]); /* who listens ends */
    close(master);
    close(slave);
    close(told[0]);
    close(ready[0]);
    close(ready[1]);
}

int main(void) {
    test_words_pass_and_keys_do_not();
    test_the_foreground_is_told();
    return 0;
}
