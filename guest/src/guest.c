/* tvinit guest: PID 1 and agent of a machine (PROTOCOL.md).
 *
 * One thread, one loop. A turn: wait for news; take frames; reap; read what commands wrote as far as the line has
 * room; send. Nothing in it blocks but steps, which are bounded.
 */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/reboot.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <unistd.h>

#include "answerer.h"
#include "command.h"
#include "dial.h"
#include "exec.h"
#include "line.h"
#include "log.h"
#include "loop.h"
#include "modes.h"
#include "net.h"
#include "port.h"
#include "power.h"
#include "program.h"
#include "request.h"
#include "root.h"
#include "spawn.h"
#include "steps.h"
#include "stream.h"
#include "wire.h"

#define PORT_NAME "trivisor.line"

enum { PORT_MS = 60000, DESCRIPTORS = 4096, FRAMES_A_TURN = 64 };

static bool child_news;

static void signal_news(struct watch *w, uint32_t events) {
    (void)events;
    struct signalfd_siginfo info;
    while (read(w->fd, &info, sizeof info) == sizeof info) {
        if (info.ssi_signo == SIGCHLD)
            child_news = true;
        else
            power_begin(POWER_OFF, PROGRAM_MS);
    }
}

static struct watch signals = {.fd = -1, .on = signal_news};

/* Every signal is blocked, so that a child begins with all of them blocked too and spawn_enter unblocks them in one
 * call; a write to a pipe without a reader then fails instead of killing us. */
static int watch_signals(void) {
    /* Those but the first switch the machine off: kill 1, the power button, busybox's halt and poweroff. */
    static const int heard[] = {SIGCHLD, SIGTERM, SIGINT, SIGPWR, SIGUSR1, SIGUSR2};
    sigset_t all, ours;
    sigfillset(&all);
    sigemptyset(&ours);
    for (size_t i = 0; i < sizeof heard / sizeof *heard; i++)
        sigaddset(&ours, heard[i]);
    if (sigprocmask(SIG_BLOCK, &all, NULL) < 0 || (signals.fd = signalfd(-1, &ours, SFD_NONBLOCK | SFD_CLOEXEC)) < 0)
        return -1;
    return loop_add(&signals, EPOLLIN);
}

static void handle(const struct frame *f) {
    struct reader r = reader_of(f->payload, f->length);
    const uint8_t *nonce;
    enum power how;
    switch (f->type) {
    case F_SYNC:
        if ((nonce = read_bytes(&r, NONCE_SIZE))) {
            command_detach_all();
            exec_forget(0);
            line_synced(nonce);
        }
        break;
    case F_GONE:
        exec_forget(f->stream >> 16);
        command_gone(f->stream >> 16);
        break;
    case F_SHUTDOWN:
        how = read_u8(&r) == 1 ? POWER_REBOOT : POWER_OFF;
        power_begin(how, r.left ? read_u32(&r) : PROGRAM_MS);
        break;
    case F_STEPS:
        steps_frame(f);
        break;
    case F_PING:
        line_send(F_PONG, f->stream, f->payload, f->length);
        break;
    case F_EXEC:
        exec_frame(f);
        break;
    case F_DATA:
        command_data(f);
        break;
    case F_WINDOW:
        command_window(f);
        break;
    case F_SIGNAL:
        command_signal(f);
        break;
    case F_RESIZE:
        command_resize(f);
        break;
    default:
        line_error(f->stream, ENOSYS, "unknown frame type");
    }
}

static int run(void) {
    bool more = false;
    for (;;) {
        loop_wait(more || line_pending() ? 0 : source_wait(power_wait() >= 0 ? power_wait() : dial_wait()));
        struct frame f;
        for (int i = 0; i < FRAMES_A_TURN && line_next(&f); i++)
            handle(&f);
        bool children = true;
        if (child_news || power_wait() >= 0) {
            child_news = false;
            children = command_reap();
        }
        more = command_pump();
        command_bury();
        line_flush();
        dial_leave();
        if (line_lost() && power_wait() < 0) {
            if (dial_again())
                continue;
            power_begin(POWER_OFF, 0);
            more = true; /* see at once whether there is any child to wait for */
        } else if (power_turn(children)) {
            return 0;
        }
    }
}

/* Descriptors 0 to 2 exist, so that none of ours is ever one of them. */
static void open_standard(void) {
    int fd;
    while ((fd = open("/dev/null", O_RDWR)) >= 0 && fd <= 2) {
    }
    if (fd > 2)
        close(fd);
}

static void raise_limit(void) {
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) < 0)
        return;
    if (getpid() == 1 && !power_contained)
        limit.rlim_max = 1 << 20;
    if (limit.rlim_cur < DESCRIPTORS)
        limit.rlim_cur = limit.rlim_max < DESCRIPTORS ? limit.rlim_max : DESCRIPTORS;
    setrlimit(RLIMIT_NOFILE, &limit);
}

static int begin(int fd) {
    bool first = getpid() == 1 && !power_contained;
    umask(022);
    if (fd < 0 && root_begin() < 0) {
        fprintf(stderr, "tvinit: mounts: %s\n", strerror(errno));
        return -1;
    }
    open_standard();
    log_open(first);
    raise_limit();
    if (first)
        reboot(RB_DISABLE_CAD);
    else if (!power_contained)
        prctl(PR_SET_CHILD_SUBREAPER, 1);
    if (loop_open() < 0 || watch_signals() < 0 || exec_open() < 0)
        return -1;
    if (fd < 0) {
        modules_begin();
        net_up("lo");
        fd = port_open(PORT_NAME, PORT_MS);
    }
    return fd < 0 ? -1 : line_open(fd);
}

int guest_contained(int line, int answer, const struct sock_fprog *filter, bool hooks) {
    power_contained = true;
    answerer_given(answer);
    spawn_filter_set(filter);
    if (begin(line) < 0) {
        log_line("cannot begin: %m");
        return 1;
    }
    if (hooks)
        steps_hooks();
    return run();
}

/* PID 1 that calls its keeper was configured by who started it. What it was given beyond that, its commands get. */
static int called_begin(void) {
    for (char **pair = environ; *pair; pair++) {
        /* runsc gives a home where none is said: "HOME=" keeps it from that, and every user has the home of passwd. */
        int error = strcmp(*pair, "HOME=") ? env_set(*pair) : 0;
        if (error) {
            errno = error;
            return -1;
        }
    }
    steps_hooks();
    return 0;
}

int guest_main(int argc, char **argv) {
    int fd = -1;
    if (argc == 2 && !strcmp(argv[0], "--fd"))
        fd = atoi(argv[1]);
    if (argc == 2 && !strcmp(argv[0], "--connect") && (fd = dial(argv[1])) < 0) {
        fprintf(stderr, "tvinit guest: %s: %s\n", argv[1], strerror(errno));
        return 1;
    }
    if (fd < 0 && getpid() != 1) {
        fprintf(stderr, "tvinit guest: needs --fd N or --connect PATH unless it is PID 1\n");
        return 2;
    }
    int status = begin(fd);
    if (status == 0 && argc == 2 && getpid() == 1)
        status = called_begin();
    if (status == 0)
        status = run();
    if (status)
        log_line("cannot begin: %m");
    /* PID 1 that ends is a kernel panic: a machine that cannot begin is switched off. */
    if (getpid() == 1)
        reboot(RB_POWER_OFF);
    return status;
}
