/* tvinit fence: between a machine and passt, so that it reaches through passt what it may.
 *
 *   tvinit fence FD OWN GATEWAY [DENIED]... -- PROGRAM ARG...   PROGRAM gets its end of the line as descriptor 3
 *
 * FD is QEMU's end of a stream of frames, or `uplink:FD` where the packet socket of an uplink (uplink.c) will come from.
 *
 * passt connects to whatever a frame names. Its versions before 2024 do that for the host's loopback too, which a guest's own
 * kernel never sends but its root may forge. So frames are looked at: a process a direction, since both ends are slow at times and
 * neither must wait for the other. A denied frame is dropped, as a firewall's DROP does. */
#include "fence.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "modes.h"

enum { ETHERNET = 14, TYPE = 12, FRAGMENT = 6, PROTOCOL = 9, SOURCE = 12, TARGET = 16, TCP_FLAGS = 13, TCP_SYN = 2, TCP_ACK = 16 };
enum { LENGTH = 4, MAC = 6, ARP = 28, PROGRAM_FD = 3 };
#define FRAME_MAX 69632 /* QEMU's NET_BUFSIZE */
#define BUFFER (4 * FRAME_MAX)

/* This network, loopback, link-local (which clouds answer with secrets), multicast, and what is reserved or broadcast. */
static bool never(uint32_t address) {
    uint32_t a = ntohl(address);
    return a >> 24 == 0 || a >> 24 == 127 || a >> 16 == 0xa9fe || a >> 28 >= 14;
}

/* Part of a TCP connection that did not begin with us: those from the host, by a published port, come from the gateway. To begin one
 * there is to reach whoever has this address in the host's own networks. */
static bool answers(const uint8_t *ip, size_t size) {
    size_t header = 4 * (size_t)(ip[0] & 15);
    bool fragment = (ip[FRAGMENT] & 0x3f) || ip[FRAGMENT + 1];
    if (header < 20 || size < header + 20 || fragment || ip[PROTOCOL] != IPPROTO_TCP)
        return false;
    uint8_t flags = ip[header + TCP_FLAGS];
    return !(flags & TCP_SYN) || flags & TCP_ACK;
}

bool fence_passes(const struct fence *f, const uint8_t *frame, size_t size) {
    if (size < ETHERNET)
        return false;
    unsigned type = (unsigned)frame[TYPE] << 8 | frame[TYPE + 1];
    if (type == 0x0806)
        return true;
    const uint8_t *ip = frame + ETHERNET;
    if (type != 0x0800 || size < ETHERNET + 20 || ip[0] >> 4 != 4)
        return false;
    uint32_t source, target;
    memcpy(&source, ip + SOURCE, sizeof source);
    memcpy(&target, ip + TARGET, sizeof target);
    if (source != f->own || never(target) || (target == f->gateway && !answers(ip, size - ETHERNET)))
        return false;
    for (int i = 0; i < f->count; i++)
        if (target == f->denied[i])
            return false;
    return true;
}

bool fence_sift(const struct fence *f, uint8_t *buffer, size_t *size, size_t *out) {
    size_t at = 0, kept = 0;
    while (*size - at >= LENGTH) {
        uint32_t length;
        memcpy(&length, buffer + at, LENGTH);
        length = ntohl(length);
        if (length > FRAME_MAX)
            return false;
        if (*size - at < LENGTH + length)
            break;
        if (fence_passes(f, buffer + at + LENGTH, length)) {
            memmove(buffer + kept, buffer + at, LENGTH + length);
            kept += LENGTH + length;
        }
        at += LENGTH + length;
    }
    memmove(buffer + kept, buffer + at, *size - at);
    *size = kept + *size - at;
    *out = kept;
    return true;
}

static bool write_all(int fd, const uint8_t *data, size_t size) {
    while (size) {
        ssize_t n = write(fd, data, size);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return false;
        data += n;
        size -= (size_t)n;
    }
    return true;
}

/* Until either end is gone. Without `f` everything passes. */
static void carry(int from, int to, const struct fence *f) {
    static uint8_t buffer[BUFFER];
    size_t size = 0, out;
    for (;;) {
        ssize_t n = read(from, buffer + size, sizeof buffer - size);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return;
        out = size += (size_t)n;
        if (f && !fence_sift(f, buffer, &size, &out))
            return;
        if (!write_all(to, buffer, out))
            return;
        size -= out;
        memmove(buffer, buffer + out, size);
    }
}

/* Wait for the packet socket and the machine's hardware address. -1: the machine ended before they were there. */
static int take_uplink(int from, uint8_t *mac) {
    union { struct cmsghdr header; char room[CMSG_SPACE(sizeof(int))]; } control;
    struct iovec data = {.iov_base = mac, .iov_len = MAC};
    struct msghdr message = {.msg_iov = &data, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
    ssize_t n;
    int fd = -1;
    while ((n = recvmsg(from, &message, MSG_CMSG_CLOEXEC)) < 0 && errno == EINTR)
        ;
    struct cmsghdr *c = n == MAC ? CMSG_FIRSTHDR(&message) : NULL;
    if (c && c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS && c->cmsg_len == CMSG_LEN(sizeof fd))
        memcpy(&fd, CMSG_DATA(c), sizeof fd);
    return fd;
}

/* Ask for the gateway in the machine's name: passt knows where to send what comes by a published port only once it has heard it. */
static bool announce(int to, const struct fence *f, const uint8_t *mac) {
    uint8_t out[LENGTH + ETHERNET + ARP] = {0, 0, 0, ETHERNET + ARP}, *frame = out + LENGTH, *arp = frame + ETHERNET;
    memset(frame, 0xff, MAC);
    memcpy(frame + MAC, mac, MAC);
    memcpy(frame + TYPE, "\x08\x06", 2);
    memcpy(arp, "\x00\x01\x08\x00\x06\x04\x00\x01", 8); /* Ethernet, IPv4, their sizes, a request */
    memcpy(arp + 8, mac, MAC);
    memcpy(arp + 14, &f->own, sizeof f->own);
    memcpy(arp + 24, &f->gateway, sizeof f->gateway);
    return write_all(to, out, sizeof out);
}

/* The same as `carry`, where a machine's frames come and go one by one. What does not fit or finds no room is lost, as on a wire. */
static void carry_out(int packets, int to, const struct fence *f) {
    static uint8_t buffer[LENGTH + FRAME_MAX];
    for (;;) {
        ssize_t n = recv(packets, buffer + LENGTH, FRAME_MAX, MSG_TRUNC);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return; /* its interface is gone */
        if (n > FRAME_MAX || !fence_passes(f, buffer + LENGTH, (size_t)n))
            continue;
        uint32_t length = htonl((uint32_t)n);
        memcpy(buffer, &length, LENGTH);
        if (!write_all(to, buffer, LENGTH + (size_t)n))
            return;
    }
}

static void carry_in(int from, int packets) {
    static uint8_t buffer[BUFFER];
    size_t size = 0;
    for (;;) {
        ssize_t n = read(from, buffer + size, sizeof buffer - size);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return;
        size += (size_t)n;
        size_t at = 0;
        uint32_t length;
        for (; size - at >= LENGTH; at += LENGTH + length) {
            memcpy(&length, buffer + at, LENGTH);
            if ((length = ntohl(length)) > FRAME_MAX)
                return;
            if (size - at < LENGTH + length)
                break;
            if (send(packets, buffer + at + LENGTH, length, 0) < 0 && (errno == ENETDOWN || errno == ENXIO || errno == ENODEV))
                return;
        }
        memmove(buffer, buffer + at, size -= at);
    }
}

/* A child that goes with us; its pid, 0 in the child. */
static pid_t child(void) {
    pid_t self = getpid(), pid = fork();
    if (pid == 0 && (prctl(PR_SET_PDEATHSIG, SIGKILL) < 0 || getppid() != self))
        _exit(1);
    return pid;
}

static int run(char **program, int theirs) {
    if (theirs == PROGRAM_FD ? fcntl(theirs, F_SETFD, 0) == 0 : dup2(theirs, PROGRAM_FD) == PROGRAM_FD)
        execv(program[0], program);
    fprintf(stderr, "fence: %s: %s\n", program[0], strerror(errno));
    return 126;
}

static int usage(void) {
    fprintf(stderr, "usage: tvinit fence FD|uplink:FD OWN GATEWAY [DENIED]... -- PROGRAM ARG...\n");
    return 2;
}

int fence_main(int argc, char **argv) {
    struct fence f = {0};
    int i = 3, pair[2];
    if (argc < 5 || inet_pton(AF_INET, argv[1], &f.own) != 1 || inet_pton(AF_INET, argv[2], &f.gateway) != 1)
        return usage();
    for (; i < argc && strcmp(argv[i], "--"); i++)
        if (f.count == FENCE_DENIED || inet_pton(AF_INET, argv[i], &f.denied[f.count++]) != 1)
            return usage();
    if (i + 1 >= argc)
        return usage();
    bool uplink = !strncmp(argv[0], "uplink:", 7);
    int given = atoi(argv[0] + (uplink ? 7 : 0));
    uint8_t mac[MAC];
    int guest = uplink ? take_uplink(given, mac) : dup(given); /* the program's own descriptor may be that one */
    if (guest < 0 || socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) < 0)
        return perror("fence"), 1;
    close(given);
    signal(SIGPIPE, SIG_IGN);
    pid_t program = child();
    if (program == 0) {
        signal(SIGPIPE, SIG_DFL);
        close(guest);
        return run(argv + i + 1, pair[1]);
    }
    close(pair[1]);
    if (uplink && !announce(pair[0], &f, mac))
        return perror("fence"), 1;
    pid_t back = program > 0 ? child() : -1;
    if (back < 0)
        return perror("fence"), 1;
    if (back == 0)
        uplink ? carry_in(pair[0], guest) : carry(pair[0], guest, NULL);
    else
        uplink ? carry_out(guest, pair[0], &f) : carry(guest, pair[0], &f);
    /* One end is gone: the other process and the program learn it from here, and end too. */
    shutdown(guest, SHUT_RDWR);
    shutdown(pair[0], SHUT_RDWR);
    if (back > 0)
        waitpid(back, NULL, 0);
    return 0;
}
