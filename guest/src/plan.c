#include "plan.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "wire.h"

bool plan_take(struct reader *r, struct plan *out) {
    uint32_t count = read_u32(r);
    *out = (struct plan){0};
    if (count > r->left / 4)
        r->bad = true;
    if (r->bad)
        return false;
    out->ops = calloc(count ? count : 1, sizeof *out->ops);
    r->bad = !out->ops;
    for (uint32_t i = 0; i < count && !r->bad; i++) {
        char **words = read_strings(r);
        size_t n = 0;
        while (words && words[n])
            n++;
        out->ops[i] = (struct op){.words = words, .count = n};
        out->count = i + 1;
        r->bad |= n == 0;
    }
    if (r->bad)
        plan_free(out);
    return !r->bad;
}

bool plan_decode(const void *data, size_t size, struct plan *out) {
    struct reader r = reader_of(data, size);
    if (!plan_take(&r, out))
        return false;
    if (!reader_done(&r))
        plan_free(out);
    return reader_done(&r);
}

static struct plan latest;

bool plan_read(int fd, struct plan *out) {
    *out = (struct plan){0};
    uint8_t *data = malloc(PLAN_MAX + 1);
    size_t used = 0;
    ssize_t n = 1;
    while (data && used <= PLAN_MAX && n != 0) {
        n = read(fd, data + used, PLAN_MAX + 1 - used);
        if (n < 0 && errno != EINTR)
            break;
        if (n > 0)
            used += (size_t)n;
    }
    bool good = data && n >= 0 && used <= PLAN_MAX;
    if (data && used > PLAN_MAX)
        errno = EFBIG;
    if (good && !(good = plan_decode(data, used, out)))
        errno = EPROTO;
    int saved = errno;
    free(data);
    errno = saved;
    if (good)
        latest = *out;
    return good;
}

void plan_forget(void) {
    for (size_t i = 0; i < latest.count; i++)
        for (char **word = latest.ops[i].words; *word; word++)
            explicit_bzero(*word, strlen(*word));
}

void plan_free(struct plan *p) {
    if (p->ops == latest.ops)
        latest = (struct plan){0};
    for (size_t i = 0; i < p->count; i++)
        free_strings(p->ops[i].words);
    free(p->ops);
    *p = (struct plan){0};
}

bool plan_number(const char *word, long long low, long long high, long long *out) {
    char *end;
    if ((*word < '0' || *word > '9') && *word != '-')
        return false;
    errno = 0;
    *out = strtoll(word, &end, 10);
    return errno == 0 && *end == 0 && end != word && *out >= low && *out <= high;
}

/* The order of kinds. */
enum rank {
    CGROUP, NAMESPACES, NETNS, MAPS, NAMES, ROOT, FILES, PIVOT, RLIMIT, GROUPS, USER, CAPS, OOM, APPARMOR, NO_NEW_PRIVS, LANDLOCK,
    SECCOMP, LAST, END,
};

/* What each launch operation needs; rank is its place in the order of kinds. */
static const struct kind {
    const char *name;
    unsigned char rank, least, most; /* words after the name; most 255: any number */
} KINDS[] = {
    {"cgroup", CGROUP, 1, 255},      {"namespaces", NAMESPACES, 1, 8}, {"netns", NETNS, 1, 1},
    {"adopt", NETNS, 2, 2},          {"address", NAMES, 3, 4},        {"uplink", NAMES, 4, 4},
    {"map-user", MAPS, 3, 3},        {"map-group", MAPS, 3, 3},        {"hostname", NAMES, 1, 1},
    {"loopback", NAMES, 0, 0},       {"root", ROOT, 1, 1},             {"dir", FILES, 2, 2},
    {"file", FILES, 2, 2},           {"link", FILES, 2, 2},            {"text", FILES, 3, 4},
    {"bind", FILES, 3, 3},           {"mount", FILES, 5, 5},           {"overlay", FILES, 4, 255},
    {"mask", FILES, 1, 255},         {"readonly", FILES, 1, 255},      {"pivot", PIVOT, 0, 1},
    {"rlimit", RLIMIT, 3, 3},        {"groups", GROUPS, 0, 255},       {"user", USER, 2, 2},
    {"caps", CAPS, 0, 255},          {"oom", OOM, 1, 1},               {"apparmor", APPARMOR, 1, 1},
    {"no-new-privs", NO_NEW_PRIVS, 0, 0}, {"landlock", LANDLOCK, 2, 2}, {"landlock-domain", LANDLOCK, 0, 0},
    {"seccomp", SECCOMP, 1, 1},      {"chdir", LAST, 1, 1},            {"env", LAST, 0, 255},
    {"fd", LAST, 2, 2},              {"hooks", LAST, 0, 0},            {"exec", END, 1, 255},
    {"guest", END, 1, 1},            {"answer", LAST, 1, 1},           {"exec-seccomp", SECCOMP, 1, 1},
    {"merge", RLIMIT, 0, 0},
};

static const struct kind *kind_of(const char *name) {
    for (size_t i = 0; i < sizeof KINDS / sizeof *KINDS; i++)
        if (!strcmp(KINDS[i].name, name))
            return &KINDS[i];
    return NULL;
}

static bool has_namespace(const struct op *ops, size_t count, const char *name) {
    size_t at = 0;
    while (at < count && strcmp(ops[at].words[0], "namespaces"))
        at++;
    for (size_t i = 1; at < count && i < ops[at].count; i++)
        if (!strcmp(ops[at].words[i], name))
            return true;
    return false;
}

/* Kinds of which a plan has at most one. */
static bool single(int rank) {
    return rank == CGROUP || rank == NAMESPACES || rank == NETNS || rank == ROOT || rank == PIVOT || rank == APPARMOR || rank == END;
}

/* Without its own namespace an operation would change the host. */
static const char *lacks_namespace(const struct op *ops, size_t count, const struct kind *k) {
    if (k->rank == ROOT && !has_namespace(ops, count, "mount"))
        return "needs a mount namespace";
    if (!strcmp(k->name, "hostname") && !has_namespace(ops, count, "uts"))
        return "needs a uts namespace";
    if (!strcmp(k->name, "netns") && has_namespace(ops, count, "net"))
        return "goes with no new net namespace";
    if ((!strcmp(k->name, "adopt") || !strcmp(k->name, "address") || !strcmp(k->name, "uplink")) && !has_namespace(ops, count, "net"))
        return "needs a net namespace";
    if (!strcmp(k->name, "guest") && !(has_namespace(ops, count, "pid") && has_namespace(ops, count, "mount")))
        return "needs a pid and a mount namespace";
    if ((!strcmp(k->name, "answer") || !strcmp(k->name, "exec-seccomp")) && strcmp(ops[count - 1].words[0], "guest"))
        return "goes with a guest alone";
    return NULL;
}

const char *plan_check_launch(const struct op *ops, size_t count) {
    static char why[128];
    int rank = -1;
    bool root = false, pivot = false;
    for (size_t i = 0; i < count; i++) {
        const char *name = ops[i].words[0];
        const struct kind *k = kind_of(name);
        const char *fault = NULL;
        if (!k)
            fault = "is not known";
        else if (ops[i].count - 1 < k->least || (k->most != 255 && ops[i].count - 1 > k->most))
            fault = "has the wrong number of words";
        else if (k->rank < rank || (single(k->rank) && k->rank == rank))
            fault = "is out of order";
        else if ((k->rank == FILES || k->rank == PIVOT) && !root)
            fault = "comes without a root";
        else if (k->rank > PIVOT && root && !pivot)
            fault = "comes before pivot";
        else if (!strcmp(name, "guest") && !root)
            fault = "needs a root of its own";
        else
            fault = lacks_namespace(ops, count, k);
        if (fault) {
            snprintf(why, sizeof why, "operation %zu (%.40s) %s", i + 1, name, fault);
            return why;
        }
        rank = k->rank;
        root = root || rank == ROOT;
        pivot = pivot || rank == PIVOT;
    }
    return rank == END ? NULL : "the plan does not end in exec or guest";
}
