#include "plan.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "wire.h"

bool plan_decode(const void *data, size_t size, struct plan *out) {
    struct reader r = reader_of(data, size);
    uint32_t count = read_u32(&r);
    *out = (struct plan){0};
    if (r.bad || count > r.left / 4)
        return false;
    out->ops = calloc(count ? count : 1, sizeof *out->ops);
    if (!out->ops)
        return false;
    for (uint32_t i = 0; i < count; i++) {
        char **words = read_strings(&r);
        size_t n = 0;
        while (words && words[n])
            n++;
        out->ops[i] = (struct op){.words = words, .count = n};
        out->count = i + 1;
        if (n == 0) {
            r.bad = true;
            break;
        }
    }
    if (reader_done(&r))
        return true;
    plan_free(out);
    return false;
}

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
    return good;
}

void plan_free(struct plan *p) {
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

/* What each launch operation needs; rank is its place in the order of kinds. */
static const struct kind {
    const char *name;
    unsigned char rank, least, most; /* words after the name; most 255: any number */
} KINDS[] = {
    {"namespaces", 0, 1, 7}, {"map-user", 1, 3, 3},   {"map-group", 1, 3, 3},     {"hostname", 2, 1, 1},
    {"loopback", 2, 0, 0},   {"root", 3, 1, 1},       {"dir", 4, 2, 2},           {"file", 4, 2, 2},
    {"link", 4, 2, 2},       {"bind", 4, 3, 3},       {"mount", 4, 5, 5},         {"pivot", 5, 0, 1},
    {"rlimit", 6, 3, 3},     {"groups", 7, 0, 255},   {"user", 8, 2, 2},          {"caps", 9, 0, 255},
    {"oom", 10, 1, 1},       {"no-new-privs", 11, 0, 0}, {"landlock", 12, 2, 2},  {"seccomp", 13, 1, 1},
    {"chdir", 14, 1, 1},     {"env", 14, 0, 255},     {"fd", 14, 2, 2},           {"exec", 15, 1, 255},
};

static const struct kind *kind_of(const char *name) {
    for (size_t i = 0; i < sizeof KINDS / sizeof *KINDS; i++)
        if (!strcmp(KINDS[i].name, name))
            return &KINDS[i];
    return NULL;
}

static bool has_namespace(const struct op *ops, size_t count, const char *name) {
    for (size_t i = 1; count > 0 && !strcmp(ops[0].words[0], "namespaces") && i < ops[0].count; i++)
        if (!strcmp(ops[0].words[i], name))
            return true;
    return false;
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
        else if (k->rank < rank || ((k->rank == 0 || k->rank == 3 || k->rank == 5 || k->rank == 15) && k->rank == rank))
            fault = "is out of order";
        else if ((k->rank == 4 || k->rank == 5) && !root)
            fault = "comes without a root";
        /* Without its own namespace it would change the host. */
        else if (k->rank == 3 && !has_namespace(ops, count, "mount"))
            fault = "needs a mount namespace";
        else if (!strcmp(name, "hostname") && !has_namespace(ops, count, "uts"))
            fault = "needs a uts namespace";
        else if (k->rank > 5 && root && !pivot)
            fault = "comes before pivot";
        if (fault) {
            snprintf(why, sizeof why, "operation %zu (%.40s) %s", i + 1, name, fault);
            return why;
        }
        rank = k->rank;
        root = root || rank == 3;
        pivot = pivot || rank == 5;
    }
    return rank == 15 ? NULL : "the plan does not end in exec";
}
