/* The keeper's part in answering calls: it starts the answerer when there first is something for it to do, again should it
 * end, and writes what it says into logs/answer.log. */
#include <fcntl.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "answerer.h"
#include "keep.h"

enum { AGAIN_MS = 1000, BACKLOG = 64 };

static struct keeper *keeper;

static void news(struct watch *w, uint32_t events) {
    (void)w;
    keeper->answer_wanted |= (events & EPOLLIN) && keeper->answerer.pid == 0;
}

/* While there is an answerer the two are its affair. */
static void watch(struct keeper *k, uint32_t events) {
    loop_change(&k->intake, events);
    loop_change(&k->answer_listen, events);
}

bool keepanswer_listen(struct keeper *k) { return k->answer_listen.fd < 0 || listen(k->answer_listen.fd, BACKLOG) == 0; }

void keepanswer_open(struct keeper *k) {
    keeper = k;
    k->intake.on = k->answer_listen.on = news;
    if (k->intake.fd >= 0)
        loop_add(&k->intake, EPOLLIN);
    if (k->answer_listen.fd >= 0)
        loop_add(&k->answer_listen, EPOLLIN);
}

/* The end of a pipe into its log, for its stderr; -1: it has none. */
static int open_log(struct keeper *k) {
    int pipes[2];
    if (k->answer_log >= 0 || k->log_count == KEEP_LOGS || k->init_log.file < 0)
        return k->answer_log;
    struct logfile *log = &k->logs[k->log_count];
    if (!keepfiles_open_log(k, log, "answer", k->init_log.cap) || pipe2(pipes, O_CLOEXEC) < 0)
        return -1;
    k->log_count++;
    fcntl(pipes[0], F_SETFL, O_NONBLOCK);
    log->watch.fd = pipes[0];
    loop_add(&log->watch, EPOLLIN);
    return k->answer_log = pipes[1];
}

int64_t keepanswer_serve(struct keeper *k) {
    if (!k->answer_wanted || k->answerer.pid > 0)
        return INT64_MAX;
    if (now_ms() < k->answer_after)
        return k->answer_after;
    k->answer_after = now_ms() + AGAIN_MS; /* should it end at once each time */
    k->answerer.pid = answerer_fork(k->intake.fd, k->answer_listen.fd, open_log(k));
    if (k->answerer.pid < 0) {
        k->answerer.pid = 0;
        return k->answer_after;
    }
    k->answer_wanted = false;
    watch(k, 0);
    return INT64_MAX;
}

void keepanswer_ended(struct keeper *k, pid_t pid) {
    if (pid != k->answerer.pid)
        return;
    k->answerer.pid = 0;
    watch(k, EPOLLIN);
}
