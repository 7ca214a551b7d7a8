/* Names while a policy says which: a policy's text, a machine's questions, a resolver's answers. The first byte says which. */
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "egress.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static struct egress egress = {.ears = {-1, -1, -1, -1}, .notes = -1};
static struct names names = {.fd = -1, .folder = -1};
static struct dns dns;
static int machine, resolver;

static void begin(void) {
    static const char POLICY[] = "closed\nname *.example 1 65535 seen\naddress 10.0.0.0 8\n";
    int ends[2];
    if (resolver)
        return;
    if (socketpair(AF_UNIX, SOCK_DGRAM | SOCK_NONBLOCK, 0, ends) < 0)
        abort();
    names.upstream[names.upstreams++] = ends[0];
    resolver = ends[1];
    dns_begin(&dns, &egress, &names);
    if (egress_take(&egress, POLICY, sizeof POLICY - 1) < 0)
        abort();
}

static void policy(const uint8_t *data, size_t size) {
    static struct egress other;
    if (egress_take(&other, (const char *)data, size) == 0 && other.policy.named > EGRESS_RULES)
        abort();
}

/* What a machine says over TCP; what comes back is no longer than an answer may be. */
static void questions(const uint8_t *data, size_t size) {
    uint8_t back[4096], asked[1024];
    int ends[2];
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, ends) < 0)
        abort();
    machine = ends[0];
    dns.budget = 200000;
    dns_accepted(&dns, ends[1]);
    while (size && dns.clients[0].fd >= 0) {
        size_t part = size < 600 ? size : 600;
        if (write(machine, data, part) != (ssize_t)part)
            break;
        data += part;
        size -= part;
        dns_read(&dns, 0);
        dns_read(&dns, 0);
        while (read(machine, back, sizeof back) > 0)
            continue;
        ssize_t n;
        while ((n = recv(resolver, asked, sizeof asked, MSG_DONTWAIT)) > 0) {
            char name[PEEK_NAME];
            size_t end;
            if (peek_question(asked, (size_t)n, name, &end) != 1 || !egress_asks(&egress, name) || strchr(name, '?'))
                abort(); /* nothing else is ever asked */
        }
    }
    close(machine);
    dns_expire(&dns, INT64_MAX);
}

/* What a resolver says to a question: whatever it is, no private address is remembered but those of the rule. */
static void answers(const uint8_t *data, size_t size) {
    static const uint8_t QUESTION[] = "\0\x1b\x12\x34\1\0\0\1\0\0\0\0\0\0\1a\7example\0\0\1\0\1";
    uint8_t message[4096], back[1024];
    int ends[2];
    if (size > sizeof message - 27 || socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, ends) < 0)
        return;
    dns.budget = 200000;
    dns_accepted(&dns, ends[1]);
    if (write(ends[0], QUESTION, 29) != 29)
        abort();
    dns_read(&dns, 0);
    if (recv(resolver, message, sizeof message, MSG_DONTWAIT) < 27)
        abort();
    message[2] |= 0x80;
    if (size > 6)
        memcpy(message + 3, data, 1), memcpy(message + 6, data + 1, 6);
    if (size > 7)
        memcpy(message + 27, data + 7, size - 7);
    if (send(resolver, message, size > 7 ? 27 + size - 7 : 27, MSG_DONTWAIT) > 0)
        dns_answered(&dns, 0);
    if (read(ends[0], back, sizeof back) > 2 + 512)
        abort();
    for (int i = 0; i < EGRESS_KNOWN; i++)
        if (egress.known[i].until && peek_private(egress.known[i].address) && egress.known[i].address[0] != 10)
            abort();
    memset(egress.known, 0, sizeof egress.known);
    close(ends[0]);
    dns_expire(&dns, INT64_MAX);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    begin();
    if (!size)
        return 0;
    if (data[0] % 3 == 0)
        policy(data + 1, size - 1);
    else if (data[0] % 3 == 1)
        questions(data + 1, size - 1);
    else
        answers(data + 1, size - 1);
    return 0;
}
