#include "trace.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "tracer.h"

enum { PIPE_SIZE = 256 * 1024, RECORDS = 3 };
/* Far more turns than any tracer takes to come: half a minute and more. */
#define TURNS_MAX (1ull << 32)

static void close_one(int *fd) {
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

/* The tracer holds no descriptor but 3, its end of the pipe, and /dev/null as 0 to 2. */
static _Noreturn void become_tracer(const struct asked *a, struct trace_meeting *m, int records, int null, const struct user *user) {
    setsid();
    prctl(PR_SET_NAME, "tvinit-trace");
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    prctl(PR_SET_TIMERSLACK, 1);
    for (int i = 0; i < 3; i++)
        dup2(null, i);
    if (records >= 0)
        dup2(records, RECORDS);
    syscall(SYS_close_range, records < 0 ? RECORDS : RECORDS + 1, INT_MAX, 0);
    tracer_main(a, m, records < 0 ? -1 : RECORDS, user);
}

static int open_all(struct tracing *t, int ends[2], int *null, bool recorded) {
    void *page = mmap(NULL, sizeof *t->meeting, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (page == MAP_FAILED)
        return errno;
    t->meeting = page;
    if ((*null = open("/dev/null", O_RDWR | O_CLOEXEC)) < 0 || (recorded && pipe2(ends, O_CLOEXEC | O_NONBLOCK) < 0))
        return errno;
    if (recorded)
        fcntl(ends[1], F_SETPIPE_SZ, PIPE_SIZE); /* past the user's limit it stays as it is */
    return 0;
}

int trace_open(struct tracing *t, char *const *words, bool no_vdso, const struct user *user) {
    int ends[2] = {-1, -1}, null = -1;
    *t = (struct tracing){.tracer = -1, .records = -1};
    struct asked *a = calloc(1, sizeof *a);
    if (!a)
        return ENOMEM;
    a->no_vdso = no_vdso;
    int error = asked_parse(a, words) ? open_all(t, ends, &null, words) : EINVAL;
    if (!error && (t->tracer = fork()) == 0)
        become_tracer(a, t->meeting, ends[1], null, user);
    if (!error && t->tracer < 0)
        error = errno;
    free(a);
    close_one(&null);
    close_one(&ends[1]);
    t->records = ends[0];
    if (error) {
        close_one(&t->records);
        trace_parent(t, -1);
    }
    return error;
}

void trace_parent(struct tracing *t, pid_t command) {
    if (!t->meeting)
        return;
    atomic_store(&t->meeting->command, command);
    munmap(t->meeting, sizeof *t->meeting);
    t->meeting = NULL;
}

void trace_child(struct tracing *t) {
    close_one(&t->records);
    prctl(PR_SET_PTRACER, t->tracer); /* where there is Yama */
}

int trace_ready(struct tracing *t) {
    /* What has its memory from PID 1 of a container cannot be looked into; from here on it is as any other command. */
    if (prctl(PR_GET_DUMPABLE) != 1 && prctl(PR_SET_DUMPABLE, 1) < 0)
        return errno;
    atomic_store(&t->meeting->state, TRACE_MEETING_WAITS);
    for (uint64_t turns = 0; atomic_load(&t->meeting->state) != TRACE_MEETING_GO; turns++)
        if (turns == TURNS_MAX)
            return ETIMEDOUT;
    return t->meeting->error;
}
