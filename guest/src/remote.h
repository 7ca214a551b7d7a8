/* The builtin `answer TOKEN`: an owner of handlers outside of a virtual machine, carried over a command's stdin and stdout
 * (PROTOCOL.md, "Answers", "Remote"); one listener after the other, since to be forked for each would cost more than all the rest.
 *
 * One process, one loop. What the host asks for is done at once (remote_ask.c) or handed to the answerer; nothing waits for a
 * program. If anything about the host or the machine goes wrong it ends, and the answerer refuses what it held. */
#ifndef TVINIT_REMOTE_H
#define TVINIT_REMOTE_H

#include <linux/seccomp.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "bytes.h"
#include "wire.h"

enum {
    REMOTE_MESSAGE = 1 << 20,
    REMOTE_READ = 256 * 1024, /* of a program's memory at once; that a channel may hold back */
    REMOTE_TABLE = 1024,
    REMOTE_AHEAD = 4096,
    REMOTE_CHANNELS = 64,
    REMOTE_CALLS = 1024, /* received and not answered */
    REMOTE_OPENS = 64,
};

struct ahead {
    uint32_t nr, length;
    uint8_t arg, kind;
};

struct channel {
    uint32_t number;
    int fd; /* -1: free */
    bool ended, read_all; /* no more comes from the host; the program has closed it */
    struct bytes out;
};

/* An open that the answerer makes for us. */
struct opened {
    uint32_t request, newfd_flags;
    uint64_t id;
    bool used;
};

struct remote {
    int intake, listener, answerer;
    bool over; /* the listener's last program has ended */
    uint64_t *page; /* last id received, lowest not answered */
    struct ahead table[REMOTE_TABLE];
    size_t table_count;
    bool table_given;
    struct channel channels[REMOTE_CHANNELS];
    struct opened opens[REMOTE_OPENS];
    uint64_t calls[REMOTE_CALLS];
    size_t call_count;
    struct bytes in;
};

/* One message to the host. False if it is not there any more. */
bool remote_send(struct writer *w);
void remote_begin(struct writer *w, char type);
bool remote_result(uint32_t request, int error, const void *data, size_t size);

/* Carry out one message from the host. 0, or the errno to end with. */
int remote_ask(struct remote *m, const uint8_t *data, size_t size);

/* What the answerer says. */
int remote_told(struct remote *m, const uint8_t *data, size_t size, int fd);

/* A call was received, or needs no answer any more. */
void remote_received(struct remote *m, uint64_t id);
void remote_answered(struct remote *m, uint64_t id);

void remote_close(struct channel *c);

#endif
