#include "program.h"

#include <signal.h>
#include <stdio.h>
#include <sys/wait.h>

#include "builtins.h"

static struct {
    pid_t pid; /* 0: none yet */
    int stop, status;
    bool ended;
} program;

void program_begin(const struct request *r, pid_t pid) {
    if (!(r->flags & EXEC_PROGRAM))
        return;
    program.pid = pid;
    program.stop = (int)r->stop;
    program.ended = false;
}

bool program_runs(void) { return program.pid && !program.ended; }

void program_ended(pid_t pid, int status) {
    if (!program_runs() || pid != program.pid)
        return;
    program.ended = true;
    program.status = status;
}

bool program_stop(void) { return program_runs() && kill(program.pid, program.stop) == 0; }

void program_kill(void) {
    if (program_runs())
        kill(program.pid, SIGKILL);
}

/* A builtin is a fork of us: what we know, it does. */
int program_main(char **argv) {
    (void)argv;
    char text[64];
    int size = 0;
    if (program.pid)
        size = snprintf(text, sizeof text, "pid %d\n", (int)program.pid);
    if (program.ended)
        size += snprintf(text + size, sizeof text - (size_t)size, "%s %d\n", WIFSIGNALED(program.status) ? "signaled" : "exited",
                         WIFSIGNALED(program.status) ? WTERMSIG(program.status) : WEXITSTATUS(program.status));
    return write_all(1, text, (size_t)size);
}
