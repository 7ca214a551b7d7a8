/* The answerer: rules, delays, lies, too many of all, all against programs that really are held. */
#include "answering.h"

#include <pthread.h>
#include <stdatomic.h>
#include <sys/mman.h>

/* -- rules ------------------------------------------------------------------------------------- */

static int see_rules(void) {
    static char big[8192];
    memset(big, 'x', sizeof big);
    CHECK(chdir("/usr") == 0);
    CHECK(ppid() == 4242);
    CHECK(opened("/etc/passwd") == ENOSPC && opened("/etc/hostname") == 0 && opened("../etc/./passwd") == ENOSPC && opened("/proc") == 0);
    CHECK(opened(NULL) == EFAULT && opened((char *)1) == EFAULT && opened(big) == ENAMETOOLONG && opened("") == ENOENT);
    char *page = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    munmap(page + 4096, 4096);
    memcpy(page + 4096 - 11, "/etc/passwd", 11); /* its NUL is not there any more */
    CHECK(opened(page + 4096 - 11) == EFAULT);
    memcpy(page + 4096 - 12, "/etc/passwd", 12); /* the last byte of the last page */
    CHECK(opened(page + 4096 - 12) == ENOSPC);
    int etc = open("/usr/lib", O_PATH | O_DIRECTORY);
    CHECK(syscall(SYS_openat, etc, "../../etc/passwd", O_RDONLY) < 0 && errno == ENOSPC);
    CHECK(syscall(SYS_openat, 999, "passwd", O_RDONLY) < 0 && errno == EBADF);
    CHECK(syscall(SYS_fsync, etc) < 0 && errno == EIO && syscall(SYS_fsync, 0) < 0 && errno != EIO);
    return 7;
}

static void rule_by_rule(void) {
    char text[512];
    int n = snprintf(text, sizeof text, "%s", with("rule 1 %d return=4242\nrule 2 %d errno=28 path=*/passwd on=1p", SYS_getppid, SYS_openat));
    snprintf(text + n, sizeof text - (size_t)n, "\nrule 3 %d errno=5 path=/usr/* on=0f", SYS_fsync);
    const int calls[] = {SYS_openat, SYS_getppid, SYS_fsync, 0};
    CHECK(result_of(program(text, calls, see_rules)) == 7);
}

static int see_refusal(void) { return ppid() < 0 ? errno : 0; }

static void malformed_refuses(void) {
    CHECK(result_of(program("rule nonsense", PPID, see_refusal)) == EPERM);
    CHECK(result_of(program(with("rule 1 %d kill", SYS_getppid, 0), PPID, see_refusal)) == -SIGKILL);
    CHECK(result_of(program(with("rule 1 %d log", SYS_getppid, 0), PPID, see_refusal)) == 0);
}

/* Another thread changes the path all the time: what comes is one of the two answers. */
static char changing[2][16] = {"/etc/passwd", "/etc/group"};
static char shared_path[16];
static atomic_int stop_changing;

static void *change(void *arg) {
    for (unsigned i = 0; !stop_changing; i++)
        memcpy(shared_path, changing[i % 2], sizeof shared_path);
    return arg;
}

static int see_changing(void) {
    pthread_t t;
    int refused = 0;
    strcpy(shared_path, "/etc/group");
    CHECK(pthread_create(&t, NULL, change, NULL) == 0);
    for (int i = 0; i < 2000; i++) {
        int error = opened(shared_path);
        CHECK(error == 0 || error == ENOSPC || error == ENOENT); /* the last: half of one and half of the other */
        refused += error == ENOSPC;
    }
    stop_changing = 1;
    pthread_join(t, NULL);
    return refused ? 1 : 2;
}

static void changing_paths(void) {
    int r = result_of(program(with("rule 1 %d errno=28 path=/etc/passwd on=1p", SYS_openat, 0), OPENS, see_changing));
    CHECK(r == 1 || r == 2);
}

/* -- delays ------------------------------------------------------------------------------------ */

static int see_delays(void) {
    pthread_t t[64];
    long got[64];
    double begun = seconds();
    for (int i = 0; i < 64; i++)
        CHECK(pthread_create(&t[i], NULL, ask, &got[i]) == 0);
    for (int i = 0; i < 64; i++) {
        pthread_join(t[i], NULL);
        CHECK(got[i] == 9);
    }
    double took = seconds() - begun;
    return took >= 0.3 && took < 5 ? 0 : 1;
}

static int see_at_once(void) {
    double begun = seconds();
    for (int i = 0; i < 100; i++)
        CHECK(ppid() == 3);
    return seconds() - begun < 0.3 ? 0 : 1;
}

static void delays(void) {
    pid_t slow = program(with("rule 1 %d return=9 delay=300000000", SYS_getppid, 0), PPID, see_delays);
    usleep(50000);
    CHECK(result_of(program(with("rule 1 %d return=3", SYS_getppid, 0), PPID, see_at_once)) == 0);
    CHECK(result_of(slow) == 0);
}

static void on_alarm(int number) { (void)number; }

/* A signal during a held call: the program is not answered twice, nor lost. */
static int see_signal(void) {
    struct sigaction a = {.sa_handler = on_alarm};
    sigaction(SIGALRM, &a, NULL);
    ualarm(20000, 20000);
    for (int i = 0; i < 20; i++) {
        long r = ppid();
        CHECK(r == 9 || (r < 0 && errno == EINTR));
    }
    return 0;
}

static int see_forever(void) { return ppid() == 0; }

static void deaths(void) {
    CHECK(result_of(program(with("rule 1 %d return=9 delay=30000000", SYS_getppid, 0), PPID, see_signal)) == 0);
    pid_t pids[32];
    for (int i = 0; i < 32; i++)
        pids[i] = program(with("rule 1 %d return=9 delay=3600000000000", SYS_getppid, 0), PPID, see_forever);
    usleep(200000);
    for (int i = 0; i < 32; i++) {
        kill(pids[i], SIGKILL);
        CHECK(result_of(pids[i]) == -SIGKILL);
    }
    CHECK(result_of(program(with("rule 1 %d return=3", SYS_getppid, 0), PPID, see_at_once)) == 0);
}

/* -- lies -------------------------------------------------------------------------------------- */

static int descriptors(void) {
    char place[32];
    int n = 0;
    for (int fd = 0; fd < 2048; fd++) {
        struct stat st;
        char link[64];
        snprintf(place, sizeof place, "/proc/%d/fd", (int)answerer);
        snprintf(link, sizeof link, "%s/%d", place, fd);
        n += lstat(link, &st) == 0;
    }
    return n;
}

static void garbage(void) {
    static uint8_t noise[ANSWER_MESSAGE];
    int fd = open("/dev/null", O_RDWR), pipes[2], none;
    uint8_t b[64];
    CHECK(pipe(pipes) == 0);
    srand(1);
    for (int i = 0; i < 300; i++) {
        size_t n = 1 + (size_t)rand() % 200;
        for (size_t k = 0; k < n; k++)
            noise[k] = (uint8_t)rand();
        noise[0] = "LAHP\0"[i % 5];
        CHECK(send_with_fd(intake, noise, n, i % 3 == 0 ? -1 : i % 3 == 1 ? fd : pipes[0]));
    }
    CHECK(send_with_fd(intake, noise, sizeof noise, fd));
    for (int i = 0; i < 50; i++) {
        int sock = call_answerer(token, fd);
        noise[0] = "ALHPMNO"[i % 7];
        send(sock, noise, 1 + (size_t)rand() % 300, MSG_NOSIGNAL);
        if (i % 2)
            hear(sock, b, sizeof b, &none);
        close(sock);
    }
    CHECK(result_of(program(with("rule 1 %d return=3", SYS_getppid, 0), PPID, see_at_once)) == 0);
    close(fd);
    close(pipes[0]);
    close(pipes[1]);
}

static int see_one(void) { return (int)ppid(); }

static void many_come_and_go(void) {
    int before = descriptors();
    pid_t pids[40];
    for (int round = 0; round < 3; round++) {
        for (int i = 0; i < 40; i++)
            pids[i] = program(with("rule 1 %d return=5", SYS_getppid, 0), PPID, see_one);
        for (int i = 0; i < 40; i++)
            CHECK(result_of(pids[i]) == 5);
    }
    double until = seconds() + 5;
    while (descriptors() > before && seconds() < until)
        usleep(10000);
    CHECK(descriptors() <= before); /* a listener whose tasks are gone is gone */
}

/* More listeners than there is room for: the calls of those over it fail, and others' do not. */
static int see_and_stay(void) {
    long r = ppid();
    int error = errno;
    CHECK(write(1, r == 5 ? "5" : r < 0 && error == ENOSYS ? "e" : "?", 1) == 1);
    pause();
    return 0;
}

static void too_many(void) {
    enum { MOST = 512, OVER = 4 };
    static pid_t pids[MOST + OVER];
    static char said[MOST + OVER];
    int p[2], out = dup(1);
    CHECK(pipe(p) == 0);
    fflush(stdout);
    CHECK(dup2(p[1], 1) == 1);
    for (int i = 0; i < MOST + OVER; i++) {
        pids[i] = program(with("rule 1 %d return=5", SYS_getppid, 0), PPID, see_and_stay);
        struct pollfd heard = {.fd = p[0], .events = POLLIN};
        CHECK(poll(&heard, 1, 10000) == 1 && read(p[0], said + i, 1) == 1);
    }
    CHECK(dup2(out, 1) == 1);
    for (int i = 0; i < MOST + OVER; i++) {
        CHECK(said[i] == (i < MOST ? '5' : 'e'));
        kill(pids[i], SIGKILL);
        CHECK(result_of(pids[i]) == -SIGKILL);
    }
    close(p[0]), close(p[1]), close(out);
    CHECK(result_of(program(with("rule 1 %d return=3", SYS_getppid, 0), PPID, see_at_once)) == 0);
}

int main(void) {
    if (!able()) {
        puts("test_answer: skipped: no seccomp listener can be had here");
        return 0;
    }
    begin(true);
    rule_by_rule();
    malformed_refuses();
    changing_paths();
    delays();
    deaths();
    garbage();
    many_come_and_go();
    too_many();
    end();
    puts("test_answer: ok");
    return 0;
}
