#include "answers.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <unistd.h>

#include "target.h"
#include "tear.h"

static struct target target; /* big, and one call is looked at at a time */

bool calls_valid(const struct listener *l, uint64_t id) {
    return ioctl(l->source.fd, SECCOMP_IOCTL_NOTIF_ID_VALID, &id) == 0;
}

bool calls_over(const struct listener *l) {
    struct pollfd p = {.fd = l->source.fd};
    return poll(&p, 1, 0) > 0 && p.revents & POLLHUP;
}

/* A call whose program is gone has no answer: ENOENT is no fault. */
static void send_answer(struct listener *l, struct seccomp_notif_resp answer) {
    if (ioctl(l->source.fd, SECCOMP_IOCTL_NOTIF_SEND, &answer) < 0 && errno != ENOENT && errno != EINPROGRESS)
        answer_say("answerer: a call cannot be answered: %s", strerror(errno));
}

static void swap(struct held *a, struct held *b) {
    struct held c = *a;
    *a = *b;
    *b = c;
}

static void sink(struct answerer *a, size_t i) {
    for (;;) {
        size_t first = i, child = 2 * i + 1;
        for (size_t c = child; c < child + 2 && c < a->held_count; c++)
            if (a->held[c].due < a->held[first].due)
                first = c;
        if (first == i)
            return;
        swap(&a->held[i], &a->held[first]);
        i = first;
    }
}

static void hold(struct answerer *a, struct listener *l, const struct seccomp_notif_resp *answer, int64_t delay) {
    size_t i = a->held_count++;
    a->held[i] = (struct held){.due = answer_now() + delay, .listener = l, .answer = *answer};
    l->held++;
    for (; i && a->held[i].due < a->held[(i - 1) / 2].due; i = (i - 1) / 2)
        swap(&a->held[i], &a->held[(i - 1) / 2]);
}

/* Throw out what is held of a listener, all or what nobody waits for any more, and make a heap of the rest. */
static void sift(struct answerer *a, struct listener *l, bool all) {
    size_t kept = 0;
    for (size_t i = 0; i < a->held_count; i++) {
        if (a->held[i].listener == l && (all || !calls_valid(l, a->held[i].answer.id)))
            l->held--;
        else
            a->held[kept++] = a->held[i];
    }
    a->held_count = kept;
    for (size_t i = kept / 2; i-- > 0;)
        sink(a, i);
}

void calls_forget(struct answerer *a, struct listener *l) { sift(a, l, true); }

void calls_prune(struct answerer *a, struct listener *l) { sift(a, l, false); }

int64_t calls_due(struct answerer *a) {
    while (a->held_count && a->held[0].due <= a->now) {
        struct held h = a->held[0];
        a->held[0] = a->held[--a->held_count];
        sink(a, 0);
        bool was_full = h.listener->held-- == HELD_OF_ONE || a->held_count == HELD_MAX - 1;
        send_answer(h.listener, h.answer);
        for (struct listener *l = a->listeners; was_full && l; l = l->next)
            if (!l->gone)
                answer_interest(a, l);
    }
    return a->held_count ? a->held[0].due : INT64_MAX;
}

/* SIGKILL to the program that waits, never to one that got its number since: the pidfd is taken first, then the call is
 * seen to wait still. */
static void kill_target(const struct listener *l, const struct seccomp_notif *call) {
    int pidfd = target_pidfd((pid_t)call->pid);
    if (pidfd < 0)
        return;
    if (calls_valid(l, call->id))
        syscall(SYS_pidfd_send_signal, pidfd, SIGKILL, NULL, 0);
    close(pidfd);
}

static struct seccomp_notif_resp response(const struct listener *l, const struct seccomp_notif *call, const struct verdict *v) {
    struct seccomp_notif_resp r = {.id = call->id};
    switch (v->act) {
    case ACT_ERRNO:
        r.error = (int32_t)-v->value;
        break;
    case ACT_RETURN:
        r.val = v->value;
        break;
    case ACT_TEAR: {
        int file = tear_open(call);
        if (file >= 0 && calls_valid(l, call->id))
            tear_write(file, call, v->keep);
        if (file >= 0)
            close(file);
        r.error = (int32_t)-v->value;
        r.val = v->value ? 0 : (int64_t)call->data.args[2];
        break;
    }
    case ACT_KILL:
        kill_target(l, call);
        r.error = -EPERM;
        break;
    case ACT_LOG:
        answer_say("answerer: rule %u: process %u, call %d %s", v->rule, call->pid, call->data.nr, target.known ? target.path : "");
        /* fall through */
    case ACT_CONTINUE:
        r.flags = SECCOMP_USER_NOTIF_FLAG_CONTINUE;
        break;
    case ACT_NONE:
        if (rules_handled(&l->rules, call->data.nr))
            r.error = -EPERM;
        else
            r.flags = SECCOMP_USER_NOTIF_FLAG_CONTINUE;
    }
    return r;
}

bool calls_decide(struct answerer *a, struct listener *l, const struct seccomp_notif *call, bool give_back) {
    if (l->denied) {
        send_answer(l, (struct seccomp_notif_resp){.id = call->id, .error = -EPERM});
        return true;
    }
    target.pid = (pid_t)call->pid;
    target.known = NULL;
    /* If the program died meanwhile, and what was read is another's, then the answer is nobody's, too. */
    struct verdict v = rules_decide(&l->rules, &call->data, (struct path_source){target_path, &target});
    if (v.act == ACT_NONE && give_back)
        return false;
    struct seccomp_notif_resp r = response(l, call, &v);
    if (v.delay > 0 && l->held < HELD_OF_ONE && a->held_count < HELD_MAX)
        hold(a, l, &r, v.delay);
    else
        send_answer(l, r);
    return true;
}

/* Refuse each id in [first, first + count) that was received, is not answered, and is not one that we hold. */
static void refuse(struct answerer *a, struct listener *l, uint64_t first, uint64_t count) {
    for (uint64_t n = 0; n < count; n++) {
        uint64_t id = first + n;
        bool ours = !calls_valid(l, id);
        for (size_t i = 0; !ours && l->held && i < a->held_count; i++)
            ours = a->held[i].listener == l && a->held[i].answer.id == id;
        if (!ours)
            send_answer(l, (struct seccomp_notif_resp){.id = id, .error = -EPERM});
    }
}

void calls_seen(struct listener *l, uint64_t id) {
    if (!l->seen || (int64_t)(id - l->last_id) > 0)
        l->last_id = id;
    l->seen = true;
}

void calls_fail(struct answerer *a, struct listener *l, int page) {
    uint64_t ids[2] = {0};
    if (page >= 0 && pread(page, ids, sizeof ids, 0) != sizeof ids)
        ids[0] = 0;
    uint64_t last = ids[0], back = last - ids[1] + 1;
    if (back > WALK_BACK) /* nothing is left to answer (lowest is past last), or the page is nonsense: some more looks then */
        back = WALK_BACK;
    if (last)
        refuse(a, l, last - back + 1, back + WALK_ON);
    else if (l->seen)
        refuse(a, l, l->last_id - WALK_BACK, WALK_BACK + WALK_ON);
    l->walk_next = !last && !l->seen;
}

/* A poll that says there is a call may be wrong by now if a client holds the listener, too, as may be a receive then: it
 * would wait. It is interrupted. */
static bool receive(struct listener *l, struct seccomp_notif *call) {
    struct itimerval soon = {.it_value.tv_usec = 20000, .it_interval.tv_usec = 20000}, never = {0};
    memset(call, 0, sizeof *call);
    if (l->shared)
        setitimer(ITIMER_REAL, &soon, NULL);
    int r = ioctl(l->source.fd, SECCOMP_IOCTL_NOTIF_RECV, call);
    if (l->shared)
        setitimer(ITIMER_REAL, &never, NULL);
    return r == 0;
}

void calls_receive(struct answerer *a, struct listener *l) {
    struct seccomp_notif call;
    if (!receive(l, &call))
        return;
    if (l->walk_next)
        refuse(a, l, call.id - WALK_BACK, WALK_BACK);
    l->walk_next = false;
    calls_seen(l, call.id);
    calls_decide(a, l, &call, false);
}
