/* A machine's connections, while a policy names names: what each says first decides, and what is allowed is spliced on. See egress.h.
 *
 * The beginning is looked at without taking it (MSG_PEEK), so the server beyond gets every byte as it was sent, and nobody beyond is reached for a
 * connection that is refused. Descriptors are edge-triggered: whatever is carried is carried until neither side has more, or a turn is over. */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "egress.h"

#define ORIGINAL 80 /* SO_ORIGINAL_DST, linux/netfilter_ipv4.h */
#define LISTENER (~0ull)
#define EVENTS 64
#define ACCEPTS 16 /* connections in a turn */
#define TURNS 8    /* of carrying, before others have theirs */
#define SPARE 32

static int spare[SPARE][2];
static int spares;

static int take_pipe(int ends[2]) {
    if (spares) {
        spares--;
        ends[0] = spare[spares][0];
        ends[1] = spare[spares][1];
        return 0;
    }
    if (pipe2(ends, O_CLOEXEC | O_NONBLOCK) < 0)
        return ends[0] = ends[1] = -1;
    fcntl(ends[1], F_SETPIPE_SZ, GATE_CHUNK); /* what the kernel does not give makes it slower only */
    return 0;
}

static void give_pipe(struct lane *lane) {
    if (lane->pipe[0] < 0)
        return;
    if (!lane->held && spares < SPARE) {
        spare[spares][0] = lane->pipe[0];
        spare[spares++][1] = lane->pipe[1];
    } else {
        close(lane->pipe[0]);
        close(lane->pipe[1]);
    }
    lane->pipe[0] = lane->pipe[1] = -1;
}

/* Closes with a reset: a connection that is refused or cut was not ended by who is at its other end. */
static void reset(int fd) {
    struct linger now = {.l_onoff = 1};
    if (fd < 0)
        return;
    setsockopt(fd, SOL_SOCKET, SO_LINGER, &now, sizeof now);
    close(fd);
}

static void end_passage(struct gate *gate, struct passage *one, int whole) {
    for (int i = 0; i < 2; i++) {
        if (whole)
            close(one->fd[i]);
        else
            reset(one->fd[i]);
        give_pipe(&one->lane[i]);
    }
    gate->busy -= one->again;
    gate->count--;
    one->stage = GATE_FREE;
}

static const uint8_t *address_of(const struct passage *one) {
    return (const uint8_t *)&one->to.sin_addr;
}

static void refuse(struct gate *gate, struct passage *one, const char *why) {
    egress_say(gate->egress, 0, "tcp", address_of(one), ntohs(one->to.sin_port), one->name, why);
    end_passage(gate, one, 0);
}

/* Where the kernel was to send it before it sent it to us. Returns -1 if it was meant for us. */
static int meant(int fd, struct sockaddr_in *to) {
    struct sockaddr_in own;
    socklen_t size = sizeof *to, length = sizeof own;
    if (getsockopt(fd, IPPROTO_IP, ORIGINAL, to, &size) < 0 || size != sizeof *to || to->sin_family != AF_INET)
        return -1;
    if (getsockname(fd, (struct sockaddr *)&own, &length) < 0)
        return -1;
    return own.sin_addr.s_addr == to->sin_addr.s_addr && own.sin_port == to->sin_port ? -1 : 0;
}

/* Begins a connection to `to`, which is not to be the host itself: we are on the host, and the machine is not to reach it through us. */
static int reach(const struct sockaddr_in *to, const char **why) {
    struct sockaddr_in from = {0};
    socklen_t size = sizeof from;
    int trial = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0), fd = -1;
    *why = "it cannot be reached";
    if (trial >= 0 && connect(trial, (const struct sockaddr *)to, sizeof *to) == 0 && getsockname(trial, (struct sockaddr *)&from, &size) == 0) {
        if (from.sin_addr.s_addr == to->sin_addr.s_addr)
            *why = "an address of the host";
        else
            fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    }
    if (trial >= 0)
        close(trial);
    if (fd >= 0 && connect(fd, (const struct sockaddr *)to, sizeof *to) < 0 && errno != EINPROGRESS) {
        close(fd);
        fd = -1;
    }
    return fd;
}

static int watch(struct gate *gate, struct passage *one, int side) {
    uint64_t at = (uint64_t)(one - gate->passages) << 1 | (unsigned)side;
    struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET, .data.u64 = (uint64_t)one->serial << 32 | at};
    int on = 1;
    setsockopt(one->fd[side], SOL_SOCKET, SO_KEEPALIVE, &on, sizeof on);
    setsockopt(one->fd[side], IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    return epoll_ctl(gate->epoll, EPOLL_CTL_ADD, one->fd[side], &event);
}

static void go_on(struct gate *gate, struct passage *one) {
    const char *why;
    one->fd[1] = gate->reach(&one->to, &why);
    if (one->fd[1] < 0 || watch(gate, one, 1) < 0) {
        refuse(gate, one, why);
        return;
    }
    egress_say(gate->egress, 1, "tcp", address_of(one), ntohs(one->to.sin_port), one->name, "");
    one->stage = GATE_REACHES;
    one->until = egress_now() + GATE_CONNECT;
}

/* Looks at what the machine has said so far. */
static void look(struct gate *gate, struct passage *one) {
    static uint8_t said[PEEK_MOST];
    struct peeked peeked;
    uint16_t port = ntohs(one->to.sin_port);
    ssize_t n = recv(one->fd[0], said, sizeof said, MSG_PEEK | MSG_DONTWAIT);
    if (n < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (n <= 0) {
        end_passage(gate, one, 1); /* it ended before it said anything */
        return;
    }
    enum peek found = peek_stream(said, (size_t)n, &peeked);
    if (found == PEEK_MORE) {
        if (++one->pieces > GATE_PIECES)
            refuse(gate, one, "a beginning in too many pieces");
        return;
    }
    memcpy(one->name, peeked.name, sizeof one->name);
    if (found == PEEK_REFUSED)
        refuse(gate, one, peeked.why);
    else if (!egress_allows(gate->egress, one->name, port, 0))
        refuse(gate, one, "no rule allows this name and port");
    else if (!egress_knows(gate->egress, one->name, address_of(one), egress_now()))
        refuse(gate, one, "an address that was not given for this name");
    else
        go_on(gate, one);
}

/* Carries from `side` to the other. Returns -1 when that is broken, 1 if its turn was over first. */
static int carry(struct passage *one, int side) {
    struct lane *lane = &one->lane[side];
    if (lane->ended == 2 || (lane->pipe[0] < 0 && take_pipe(lane->pipe) < 0))
        return lane->ended == 2 ? 0 : -1;
    for (int turn = 0; turn < TURNS; turn++) {
        ssize_t in = 0, out = 0;
        if (!lane->ended) {
            in = splice(one->fd[side], NULL, lane->pipe[1], NULL, GATE_CHUNK, SPLICE_F_MOVE | SPLICE_F_NONBLOCK);
            if (in < 0 && errno != EAGAIN && errno != EINTR)
                return -1;
            lane->ended = in == 0;
            lane->held += in > 0 ? (size_t)in : 0;
        }
        if (lane->held) {
            out = splice(lane->pipe[0], NULL, one->fd[!side], NULL, lane->held, SPLICE_F_MOVE | SPLICE_F_NONBLOCK);
            if (out < 0 && errno != EAGAIN && errno != EINTR)
                return -1;
            lane->held -= out > 0 ? (size_t)out : 0;
        }
        if (!lane->held && lane->ended) {
            lane->ended = 2;
            give_pipe(lane);
            return shutdown(one->fd[!side], SHUT_WR) < 0 && errno != ENOTCONN ? -1 : 0;
        }
        if (in <= 0 && out <= 0) {
            if (!lane->held)
                give_pipe(lane);
            return 0;
        }
    }
    return 1;
}

static void carry_both(struct gate *gate, struct passage *one) {
    int first = carry(one, 0), second = first < 0 ? -1 : carry(one, 1);
    int again = first > 0 || second > 0;
    if (first < 0 || second < 0 || (one->lane[0].ended == 2 && one->lane[1].ended == 2)) {
        end_passage(gate, one, first >= 0 && second >= 0);
        return;
    }
    gate->busy += again - one->again;
    one->again = (uint8_t)again;
}

static void reached(struct gate *gate, struct passage *one) {
    int error = 0;
    socklen_t size = sizeof error;
    if (getsockopt(one->fd[1], SOL_SOCKET, SO_ERROR, &error, &size) < 0 || error) {
        end_passage(gate, one, 0);
        return;
    }
    one->stage = GATE_CARRIES;
    carry_both(gate, one);
}

/* Returns a place for a passage: if there is none, that of the one that has longest not said what it wants. */
static struct passage *place(struct gate *gate) {
    struct passage *oldest = NULL;
    for (int i = 0; i < GATE_CONNECTIONS; i++) {
        struct passage *one = &gate->passages[i];
        if (one->stage == GATE_FREE)
            return one;
        if (one->stage == GATE_SAYS && (!oldest || one->until < oldest->until))
            oldest = one;
    }
    if (oldest)
        refuse(gate, oldest, "too many connections");
    return oldest;
}

static void admit(struct gate *gate, int fd) {
    struct sockaddr_in to;
    struct passage *one;
    if (gate->meant(fd, &to) < 0) {
        reset(fd);
        return;
    }
    uint16_t port = ntohs(to.sin_port);
    if (!(one = place(gate))) {
        egress_say(gate->egress, 0, "tcp", (const uint8_t *)&to.sin_addr, port, "", "too many connections");
        reset(fd);
        return;
    }
    int64_t now = egress_now();
    *one = (struct passage){.stage = GATE_SAYS, .fd = {fd, -1}, .to = to, .serial = ++gate->serial, .until = now + GATE_HELLO};
    one->lane[0].pipe[0] = one->lane[0].pipe[1] = one->lane[1].pipe[0] = one->lane[1].pipe[1] = -1;
    gate->count++;
    int plain;
    const char *name = egress_named(gate->egress, address_of(one), port, now, &plain);
    if (gate->egress->policy.kind != POLICY_NAMES || !name) {
        refuse(gate, one, "an address that was not given for any name");
    } else if (watch(gate, one, 0) < 0) {
        end_passage(gate, one, 0);
    } else if (plain) {
        memcpy(one->name, name, strlen(name) + 1);
        one->plain = 1;
        go_on(gate, one);
    }
}

static void serve_passage(struct gate *gate, uint64_t data, uint32_t events) {
    struct passage *one = &gate->passages[(data & 0xffffffff) >> 1];
    int side = data & 1;
    if (one->stage == GATE_FREE || one->serial != (unsigned)(data >> 32))
        return; /* ended by what came before in this turn */
    if (one->stage == GATE_SAYS) {
        look(gate, one);
        if (one->stage == GATE_SAYS && events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR))
            end_passage(gate, one, 1); /* no more will come */
    } else if (one->stage == GATE_REACHES && side == 1 && events & (EPOLLOUT | EPOLLERR | EPOLLHUP))
        reached(gate, one);
    else if (one->stage == GATE_REACHES && side == 0 && events & (EPOLLERR | EPOLLHUP))
        end_passage(gate, one, 0);
    else if (one->stage == GATE_CARRIES && events & EPOLLERR)
        end_passage(gate, one, 0);
    else if (one->stage == GATE_CARRIES)
        carry_both(gate, one);
}

void gate_serve(struct gate *gate) {
    struct epoll_event events[EVENTS];
    int n = epoll_wait(gate->epoll, events, EVENTS, 0);
    for (int i = 0; i < n; i++) {
        if (events[i].data.u64 != LISTENER) {
            serve_passage(gate, events[i].data.u64, events[i].events);
            continue;
        }
        for (int fd, many = 0; many < ACCEPTS && (fd = accept4(gate->listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0; many++)
            admit(gate, fd);
    }
    for (int i = 0; i < GATE_CONNECTIONS && gate->busy; i++)
        if (gate->passages[i].stage == GATE_CARRIES && gate->passages[i].again)
            carry_both(gate, &gate->passages[i]);
}

void gate_changed(struct gate *gate) {
    for (int i = 0; i < GATE_CONNECTIONS && gate->egress->policy.kind != POLICY_OPEN; i++) {
        struct passage *one = &gate->passages[i];
        if (one->stage > GATE_SAYS && !egress_allows(gate->egress, one->name, ntohs(one->to.sin_port), one->plain))
            refuse(gate, one, "the policy has changed");
    }
}

void gate_expire(struct gate *gate, int64_t now) {
    for (int i = 0; i < GATE_CONNECTIONS; i++) {
        struct passage *one = &gate->passages[i];
        if (one->stage == GATE_SAYS && one->until <= now)
            refuse(gate, one, "it did not say what it wants in time");
        else if (one->stage == GATE_REACHES && one->until <= now)
            end_passage(gate, one, 0);
    }
}

int gate_begin(struct gate *gate, struct egress *egress, int listener) {
    struct epoll_event event = {.events = EPOLLIN, .data.u64 = LISTENER};
    gate->egress = egress;
    gate->listener = listener;
    gate->meant = meant;
    gate->reach = reach;
    gate->epoll = epoll_create1(EPOLL_CLOEXEC);
    if (gate->epoll < 0 || fcntl(listener, F_SETFL, O_NONBLOCK) < 0)
        return -1;
    return epoll_ctl(gate->epoll, EPOLL_CTL_ADD, listener, &event);
}
