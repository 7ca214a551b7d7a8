#include "request.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "program.h"
#include "wire.h"

enum { BASE_MAX = 256 };

#define DEFAULT_PATH "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

static char *base[BASE_MAX];
static size_t base_count;

bool request_decode(const void *data, size_t size, struct request *out) {
    struct reader r = reader_of(data, size);
    *out = (struct request){.flags = read_u32(&r)};
    out->rows = read_u16(&r);
    out->columns = read_u16(&r);
    out->user = read_string(&r);
    out->cwd = read_string(&r);
    out->argv = read_strings(&r);
    out->env = read_strings(&r);
    if (out->flags & EXEC_POLICY)
        plan_take(&r, &out->policy);
    if (out->flags & EXEC_PROGRAM)
        out->stop = read_u32(&r);
    if (!reader_done(&r) || out->flags & ~(uint32_t)EXEC_FLAGS || !out->argv[0] || !out->argv[0][0])
        return false;
    for (char **e = out->env; *e; e++)
        if (!strchr(*e, '=') || **e == '=')
            return false;
    return true;
}

void request_free(struct request *r) {
    free(r->user);
    free(r->cwd);
    free_strings(r->argv);
    free_strings(r->env);
    plan_free(&r->policy);
    *r = (struct request){0};
}

int request_refused(const struct request *r, const char **why) {
    bool builtin = r->flags & EXEC_BUILTIN, terminal = r->flags & EXEC_PTY, program = r->flags & EXEC_PROGRAM;
    *why = builtin && terminal                    ? "a builtin has no terminal"
           : builtin && r->flags & EXEC_POLICY    ? "a builtin has no policy"
           : program && (builtin || terminal)     ? "the machine's program is no builtin, and has no terminal"
           : program && !(r->flags & EXEC_DETACH) ? "the machine's program outlives its client"
           : program && !(r->stop && r->stop < 65) ? "stop signal"
                                                  : NULL;
    if (*why)
        return EINVAL;
    *why = "the machine's program runs already";
    return program && program_runs() ? EBUSY : 0;
}

static size_t name_size(const char *pair) { return strcspn(pair, "="); }

static bool same_name(const char *a, const char *b) {
    size_t size = name_size(a);
    return size == name_size(b) && !memcmp(a, b, size);
}

int env_set(const char *pair) {
    if (!strchr(pair, '=') || *pair == '=')
        return EINVAL;
    char *copy = strdup(pair);
    if (!copy)
        return ENOMEM;
    for (size_t i = 0; i < base_count; i++) {
        if (same_name(base[i], pair)) {
            free(base[i]);
            base[i] = copy;
            return 0;
        }
    }
    if (base_count == BASE_MAX) {
        free(copy);
        return E2BIG;
    }
    base[base_count++] = copy;
    return 0;
}

/* Only what lies under the request's env is looked through, so the work is bounded by 262 times its count. */
static void put_pair(char **list, size_t *count, size_t under, char *pair) {
    for (size_t i = 0; i < under; i++) {
        if (same_name(list[i], pair)) {
            list[i] = pair;
            return;
        }
    }
    list[(*count)++] = pair;
}

char **environment_of(const struct request *r, const struct user *u, struct environment *own) {
    size_t given = 0, count = 0, under = 0;
    while (r->env[given])
        given++;
    char **list = calloc(6 + base_count + given + 1, sizeof *list);
    if (!list)
        return NULL;
    const char *implied[6][2] = {{"PATH", DEFAULT_PATH}, {"HOME", u->home},   {"USER", u->name},
                                 {"LOGNAME", u->name},   {"SHELL", u->shell}, {"TERM", "xterm-256color"}};
    for (int i = 0; i < (r->flags & EXEC_PTY ? 6 : 5); i++) {
        snprintf(own->own[i], sizeof own->own[i], "%s=%s", implied[i][0], implied[i][1]);
        list[count++] = own->own[i];
    }
    under = count;
    for (size_t i = 0; i < base_count; i++)
        put_pair(list, &count, under, base[i]);
    under = count;
    for (size_t i = 0; i < given; i++)
        put_pair(list, &count, under, r->env[i]);
    return list;
}

const char *env_get(char *const *env, const char *name) {
    size_t size = strlen(name);
    for (; *env; env++)
        if (!strncmp(*env, name, size) && (*env)[size] == '=')
            return *env + size + 1;
    return NULL;
}
