#include "power.h"

#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <unistd.h>

#include "answerer.h"
#include "command.h"
#include "exec.h"
#include "line.h"
#include "log.h"
#include "program.h"
#include "root.h"

enum { TERM_MS = 2000, KILL_MS = 2000, BYE_MS = 1000 };

bool power_contained;

static enum { NONE, STOPPING, TERMINATING, KILLING } phase;
static enum power end;
static int64_t deadline;

/* PID 1 reaches every process by -1; anyone else must name those it started, and may not be the machine's master. */
static void signal_all(int number) {
    if (getpid() == 1) {
        kill(-1, number);
        return;
    }
    command_kill_all(number);
    char path[64];
    snprintf(path, sizeof path, "/proc/self/task/%d/children", getpid());
    FILE *f = number == SIGKILL ? fopen(path, "re") : NULL;
    int pid;
    while (f && fscanf(f, "%d", &pid) == 1)
        kill(pid, number);
    if (f)
        fclose(f);
}

static void terminate(void) {
    phase = TERMINATING;
    deadline = now_ms() + TERM_MS;
    signal_all(SIGTERM);
}

void power_begin(enum power how, int64_t program_ms) {
    if (phase != NONE)
        return;
    log_line("%s", how == POWER_REBOOT ? "rebooting" : "powering off");
    end = how;
    exec_close();
    answerer_release();
    if (program_ms <= 0 || !program_stop()) {
        terminate();
        return;
    }
    phase = STOPPING;
    deadline = now_ms() + program_ms;
}

int power_wait(void) {
    if (phase == NONE)
        return -1;
    int64_t left = deadline - now_ms();
    return left > 0 ? (int)left : 0;
}

static void say_bye(void) {
    uint8_t status[4] = {0};
    line_send(F_BYE, 0, status, sizeof status);
    line_drain(BYE_MS);
}

bool power_turn(bool children) {
    if (phase == NONE)
        return false;
    if (phase == STOPPING && (power_wait() == 0 || !program_runs())) {
        program_kill();
        terminate();
    }
    if (children && power_wait() > 0)
        return false;
    if (children && phase == TERMINATING) {
        phase = KILLING;
        deadline = now_ms() + KILL_MS;
        signal_all(SIGKILL);
        return false;
    }
    bool master = getpid() == 1 && !power_contained;
    if (master)
        root_release();
    say_bye();
    if (master) {
        sync();
        reboot(end == POWER_REBOOT ? RB_AUTOBOOT : RB_POWER_OFF);
        log_line("reboot: %m");
    }
    return true;
}
