/* Owners of handlers: attached before and after, refused, dying with calls held, or never coming. */
#include "answering.h"

#include <pthread.h>
#include <sys/mman.h>

static int new_page(uint64_t **ids) {
    int fd = memfd_create("ids", MFD_CLOEXEC);
    CHECK(fd >= 0 && ftruncate(fd, 4096) == 0);
    *ids = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    CHECK(*ids != MAP_FAILED);
    return fd;
}

static int see_owner(void) {
    CHECK(ppid() == 100);
    CHECK(ppid() == 77); /* handed off */
    CHECK(opened("/etc/passwd") == ENOENT); /* given back */
    CHECK(ppid() < 0 && errno == EPERM); /* its owner went */
    CHECK(ppid() < 0 && errno == EPERM);
    return opened("/etc/passwd"); /* no handler is for that: it goes on */
}

static void hand_off(int sock, uint8_t flags, const struct seccomp_notif *call) {
    uint8_t message[2 + sizeof *call] = {'H', flags};
    memcpy(message + 2, call, sizeof *call);
    CHECK(send(sock, message, sizeof message, 0) == sizeof message);
}

static void owners(void) {
    struct seccomp_notif call;
    uint64_t *ids, id;
    uint8_t b[64];
    int sock, other, none, page = new_page(&ids);
    /* The attach comes before the listener. */
    const char *text = with("rule 1 %d return=77 times=1\nhandler %d", SYS_getppid, SYS_getppid);
    sock = call_answerer(token, page);
    usleep(100000);
    pid_t pid = program(text, OPENS, see_owner);
    int listener;
    CHECK(hear(sock, b, sizeof b, &listener) == 1 && b[0] == 'O' && listener >= 0);
    CHECK(attach(token, page, &other) == -EBUSY);
    close(other);
    CHECK(receive(listener, &call) && call.data.nr == SYS_getppid);
    respond(listener, call.id, 100, 0);
    CHECK(receive(listener, &call));
    hand_off(sock, 0, &call);
    CHECK(receive(listener, &call) && call.data.nr == SYS_openat);
    hand_off(sock, 1, &call);
    CHECK(hear(sock, b, sizeof b, &none) == 9 && b[0] == 'B' && (memcpy(&id, b + 1, 8), id == call.id));
    respond(listener, call.id, 0, -ENOENT);
    CHECK(receive(listener, &call));
    ids[0] = ids[1] = call.id;
    close(sock); /* with the call held; the listener stays open here, as in an owner's other children */
    close(page);
    munmap(ids, 4096);
    CHECK(ends_within(pid, 3) && result_of(pid) == 0);
    close(listener);
}

/* -- an owner that is killed ------------------------------------------------------------------- */

static int see_killed_owner(void) {
    pthread_t t[64];
    long got[64];
    for (int i = 0; i < 64; i++)
        CHECK(pthread_create(&t[i], NULL, ask, &got[i]) == 0);
    int refused = 0;
    for (int i = 0; i < 64; i++) {
        pthread_join(t[i], NULL);
        refused += got[i] == -1;
    }
    CHECK(ppid() < 0 && errno == EPERM);
    return refused == 64 ? 0 : 1;
}

/* Receives all it can and answers nothing. `note`: how it keeps its page. */
static pid_t bad_owner(int note) {
    pid_t pid = fork();
    if (pid)
        return pid;
    uint64_t *ids;
    int sock, page = new_page(&ids), listener = attach(token, page, &sock);
    struct seccomp_notif call;
    CHECK(listener >= 0);
    for (int i = 0; i < 64; i++) {
        CHECK(receive(listener, &call));
        if (note == 0 || (note == 1 && i < 32)) { /* all, or it lags */
            ids[0] = call.id;
            ids[1] = i ? ids[1] : call.id;
        } else if (note == 2) { /* lowest is nonsense */
            ids[0] = call.id;
            ids[1] = call.id + 1234567;
        }
    }
    kill(getpid(), SIGKILL);
    _exit(1);
}

static void killed_owner(void) {
    /* The last kind never said what it has: it is found out from the next call's id. */
    for (int note = 0; note < 3; note++) {
        pid_t pid = program(with("handler %d", SYS_getppid, 0), PPID, see_killed_owner);
        CHECK(result_of(bad_owner(note)) == -SIGKILL);
        CHECK(ends_within(pid, 5) && result_of(pid) == 0);
    }
}

static int see_silent_owner(void) {
    pthread_t t;
    long got;
    CHECK(pthread_create(&t, NULL, ask, &got) == 0);
    usleep(500000); /* the owner is dead by now, and never said which call it had */
    CHECK(ppid() < 0 && errno == EPERM);
    pthread_join(t, NULL);
    return got == -1 ? 0 : 1;
}

static void silent_owner(void) {
    pid_t pid = program(with("handler %d", SYS_getppid, 0), PPID, see_silent_owner), owner = fork();
    if (owner == 0) {
        uint64_t *ids;
        int sock, listener = attach(token, new_page(&ids), &sock);
        struct seccomp_notif call;
        CHECK(listener >= 0 && receive(listener, &call));
        kill(getpid(), SIGKILL);
    }
    CHECK(result_of(owner) == -SIGKILL);
    CHECK(ends_within(pid, 5) && result_of(pid) == 0);
}

/* -- nobody comes ------------------------------------------------------------------------------ */

static int see_nobody(void) {
    double begun = seconds();
    CHECK(ppid() < 0 && errno == EPERM);
    double took = seconds() - begun;
    return took > 4 && took < 9 ? 0 : 1;
}

static void nobody(void) {
    uint64_t *ids;
    int sock, page = new_page(&ids);
    pid_t pid = program(with("handler %d", SYS_getppid, 0), PPID, see_nobody);
    double begun = seconds();
    CHECK(attach("22222222222222222222222222222222", page, &sock) == -ENOENT && seconds() - begun > 4);
    CHECK(result_of(pid) == 0);
    close(sock);
    /* Its listener has been: that is said at once. */
    begun = seconds();
    int r;
    while ((r = attach(token, page, &sock)) >= 0 && seconds() - begun < 3) { /* its last task may go only now */
        close(r);
        close(sock);
    }
    CHECK(r == -ESRCH && seconds() - begun < 3);
    close(sock);
    close(page);
}

int main(void) {
    if (!able()) {
        puts("test_owners: skipped: no seccomp listener can be had here");
        return 0;
    }
    begin(true);
    owners();
    killed_owner();
    silent_owner();
    nobody();
    end();
    puts("test_owners: ok");
    return 0;
}
