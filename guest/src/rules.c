#include "rules.h"

#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>

#include "plan.h"
#include "wire.h"

enum { MAX_ERRNO = 4095 };

/* One class, `at` behind its "[": past its "]" and *matches set, or NULL if it has no end, which makes "[" a character. */
static const char *class_of(const char *at, unsigned char c, bool *matches) {
    bool not = *at == '!', found = false;
    if (not)
        at++;
    for (bool first = true; *at && (first || *at != ']'); first = false) {
        unsigned char low = (unsigned char)*at++, high = low;
        if (at[0] == '-' && at[1] && at[1] != ']') {
            high = (unsigned char)at[1];
            at += 2;
        }
        found |= low <= c && c <= high;
    }
    *matches = found != not;
    return *at ? at + 1 : NULL;
}

/* One character of UTF-8, or one byte of what is none. */
static const char *character(const char *text) {
    text++;
    while (((unsigned char)*text & 0xc0) == 0x80)
        text++;
    return text;
}

bool rules_glob(const char *glob, const char *text) {
    const char *star = NULL, *resume = NULL;
    while (*text || *glob == '*') {
        bool matches = false;
        const char *next = glob + 1, *class_end;
        if (*glob == '*') {
            star = next;
            resume = text;
            glob = next;
            continue;
        }
        if (*glob == '?') {
            text = character(text);
            glob = next;
            continue;
        }
        if (*glob == '[' && (class_end = class_of(next, (unsigned char)*text, &matches)))
            next = class_end;
        else
            matches = *glob && *glob == *text;
        if (matches) {
            text++;
            glob = next;
        } else if (star) {
            glob = star; /* only the last star can be what was too short */
            text = ++resume;
        } else {
            return false;
        }
    }
    return *glob == 0;
}

bool rules_absolute(const char *base, const char *path, char *out) {
    size_t used = 0;
    const char *parts[2] = {*path == '/' ? "" : base, path};
    for (int i = 0; i < 2; i++)
        for (const char *at = parts[i]; *at;) {
            size_t n = strcspn(at, "/");
            if (n == 2 && at[0] == '.' && at[1] == '.') {
                while (used && out[--used] != '/') {
                }
            } else if (n && !(n == 1 && *at == '.')) {
                if (used + n + 2 > RULES_PATH)
                    return false;
                out[used++] = '/';
                memcpy(out + used, at, n);
                used += n;
            }
            at += n + (at[n] == '/');
        }
    if (!used)
        out[used++] = '/';
    out[used] = 0;
    return true;
}

int rules_dir_argument(int nr, int path_arg) {
    /* Calls with a path behind their first argument of which the one before is no folder. */
    static const int none[] = {
#ifdef SYS_rename
        SYS_rename, SYS_link, SYS_symlink,
#endif
        SYS_mount, SYS_pivot_root, SYS_inotify_add_watch, SYS_quotactl,
    };
    for (size_t i = 0; i < sizeof none / sizeof *none; i++)
        if (none[i] == nr)
            return -1;
    return path_arg - 1;
}

/* The next number of a list like "1:2:3"; *at moves behind the separator. */
static bool take_number(const char **at, char separator, long long low, long long high, long long *out) {
    char word[24];
    const char *end = separator ? strchr(*at, separator) : *at + strlen(*at);
    if (!end)
        end = *at + strlen(*at);
    size_t n = (size_t)(end - *at);
    if (n == 0 || n >= sizeof word)
        return false;
    memcpy(word, *at, n);
    word[n] = 0;
    *at = *end ? end + 1 : end;
    return plan_number(word, low, high, out);
}

/* Unsigned 64 bits: more than plan_number has. */
static bool take_unsigned(const char **at, uint64_t *out) {
    const char *p = *at;
    uint64_t v = 0;
    for (; *p >= '0' && *p <= '9'; p++)
        if (__builtin_mul_overflow(v, 10, &v) || __builtin_add_overflow(v, (uint64_t)(*p - '0'), &v))
            return false;
    if (p == *at || (*p && *p != ':'))
        return false;
    *at = *p ? p + 1 : p;
    *out = v;
    return true;
}

static bool take_whole(const char *word, uint64_t *out) { return take_unsigned(&word, out) && *word == 0; }

static bool take_calls(const char *word, int *calls, size_t *count, size_t most) {
    while (*word) {
        long long nr;
        if (*count == most || !take_number(&word, ',', 0, INT32_MAX, &nr))
            return false;
        calls[(*count)++] = (int)nr;
    }
    return *count > 0;
}

static bool take_condition(struct rule *r, const char *word) {
    static const char *const names[] = {"==", "!=", "<", "<=", ">", ">=", "in"};
    struct condition *c = &r->tests[r->test_count];
    long long index;
    if (r->test_count == RULES_TESTS || !take_number(&word, ':', 0, 5, &index))
        return false;
    size_t n = strcspn(word, ":"), test = 0;
    while (test < sizeof names / sizeof *names && (strlen(names[test]) != n || strncmp(names[test], word, n)))
        test++;
    word += n;
    if (test == sizeof names / sizeof *names || *word++ != ':' || !take_unsigned(&word, &c->value) || !take_unsigned(&word, &c->mask) || *word)
        return false;
    c->index = (uint8_t)index;
    c->test = (enum test)test;
    r->test_count++;
    return true;
}

static bool take_on(struct rule *r, const char *word) {
    if (word[0] < '0' || word[0] > '5')
        return false;
    r->path_arg = word[0] - '0';
    word += word[1] == ':' ? 2 : 1;
    r->path_is_fd = *word == 'f';
    return (*word == 'p' || *word == 'f') && word[1] == 0;
}

static bool take_delay(struct rule *r, const char *word) {
    long long n;
    if (!plan_number(word, 0, RULES_DELAY, &n))
        return false;
    r->delay = n;
    return true;
}

static bool take_key(struct rule *r, const char *key, const char *value) {
    long long n;
    if (!strcmp(key, "arg"))
        return take_condition(r, value);
    if (!strcmp(key, "path"))
        return !r->glob && *value && strlen(value) <= RULES_GLOB && (r->glob = strdup(value));
    if (!strcmp(key, "on"))
        return take_on(r, value);
    if (!strcmp(key, "dir")) {
        if (!plan_number(value, 0, 5, &n))
            return false;
        r->dir_arg = (int)n;
        return true;
    }
    if (!strcmp(key, "after"))
        return take_whole(value, &r->after);
    if (!strcmp(key, "every"))
        return take_whole(value, &r->every) && r->every > 0;
    if (!strcmp(key, "times"))
        return take_whole(value, &r->times);
    if (!strcmp(key, "probability"))
        return take_whole(value, &r->probability) && r->probability <= UINT64_C(1) << 32;
    if (!strcmp(key, "seed"))
        return take_whole(value, &r->random);
    return !strcmp(key, "delay") && r->act != ACT_KILL && r->act != ACT_LOG && take_delay(r, value);
}

/* KEEP:ERRNO, 0 for none. */
static bool take_tear(struct rule *r, const char *word) {
    long long keep, number;
    if (!take_number(&word, ':', 0, RULES_KEEP, &keep) || !take_number(&word, 0, 0, MAX_ERRNO, &number) || *word)
        return false;
    r->act = ACT_TEAR;
    r->keep = (uint32_t)keep;
    r->value = number;
    return true;
}

static bool take_action(struct rule *r, const char *word) {
    long long n = 0;
    if (!strcmp(word, "kill"))
        r->act = ACT_KILL;
    else if (!strcmp(word, "log"))
        r->act = ACT_LOG;
    else if (!strcmp(word, "continue"))
        r->act = ACT_CONTINUE;
    else if (!strncmp(word, "delay=", 6))
        return r->act = ACT_CONTINUE, take_delay(r, word + 6);
    else if (!strncmp(word, "tear=", 5))
        return take_tear(r, word + 5);
    else if (!strncmp(word, "errno=", 6) && plan_number(word + 6, 1, MAX_ERRNO, &n))
        r->act = ACT_ERRNO;
    else if (!strncmp(word, "return=", 7) && plan_number(word + 7, INT64_MIN, INT64_MAX, &n))
        r->act = ACT_RETURN;
    r->value = n;
    return r->act != ACT_NONE;
}

static bool take_rule(struct rules *rules, char **words) {
    struct rule *r = &rules->list[rules->count];
    *r = (struct rule){.dir_arg = -1, .path_arg = -1, .every = 1, .times = UINT64_MAX, .probability = UINT64_C(1) << 32};
    long long id;
    rules->count++; /* from here on its glob is freed with the others */
    if (!words[1] || !words[2] || !words[3] || !plan_number(words[1], 0, UINT32_MAX, &id) ||
        !take_calls(words[2], r->calls, &r->call_count, RULES_CALLS) || !take_action(r, words[3]))
        return false;
    r->id = (uint32_t)id;
    for (char **word = words + 4; *word; word++) {
        char *equals = strchr(*word, '=');
        if (!equals)
            return false;
        *equals = 0;
        if (!take_key(r, *word, equals + 1))
            return false;
    }
    return !r->glob || r->path_arg >= 0;
}

static bool take_token(struct rules *r, const char *hex) {
    if (r->has_token || !hex || strlen(hex) != 2 * sizeof r->token || strspn(hex, "0123456789abcdef") != strlen(hex))
        return false;
    for (size_t i = 0; i < sizeof r->token; i++) {
        char pair[3] = {hex[2 * i], hex[2 * i + 1], 0};
        r->token[i] = (uint8_t)strtoul(pair, NULL, 16);
    }
    return r->has_token = true;
}

static bool take(struct rules *r, char **words) {
    if (!words[0])
        return false;
    if (!strcmp(words[0], "rule"))
        return take_rule(r, words);
    if (!strcmp(words[0], "token"))
        return take_token(r, words[1]);
    bool good = !strcmp(words[0], "handler") && words[1];
    for (char **word = words + 1; good && *word; word++)
        good = take_calls(*word, r->handlers, &r->handler_count, RULES_HANDLERS);
    return good;
}

bool rules_decode(const void *data, size_t size, struct rules *out) {
    struct reader r = reader_of(data, size);
    uint32_t count = read_u32(&r);
    *out = (struct rules){0};
    bool good = !r.bad && count <= RULES_MAX && (!count || (out->list = calloc(count, sizeof *out->list)));
    for (uint32_t i = 0; good && i < count; i++) {
        char **words = read_strings(&r);
        good = words && take(out, words);
        free_strings(words);
    }
    if (!good || !reader_done(&r)) {
        rules_free(out);
        return false;
    }
    return true;
}

void rules_free(struct rules *r) {
    for (size_t i = 0; i < r->count; i++)
        free(r->list[i].glob);
    free(r->list);
    *r = (struct rules){0};
}

static bool holds(const struct condition *c, const struct seccomp_data *call) {
    uint64_t v = call->args[c->index] & c->mask;
    switch (c->test) {
    case TEST_EQ: return v == c->value;
    case TEST_NE: return v != c->value;
    case TEST_LT: return v < c->value;
    case TEST_LE: return v <= c->value;
    case TEST_GT: return v > c->value;
    case TEST_GE: return v >= c->value;
    case TEST_IN: return (v & c->value) != 0;
    }
    return false;
}

static bool is_among(const int *list, size_t count, int nr) {
    for (size_t i = 0; i < count; i++)
        if (list[i] == nr)
            return true;
    return false;
}

bool rules_handled(const struct rules *r, int nr) { return is_among(r->handlers, r->handler_count, nr); }

static uint64_t splitmix64(uint64_t *state) {
    uint64_t z = *state += UINT64_C(0x9e3779b97f4a7c15);
    z = (z ^ z >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ z >> 27) * UINT64_C(0x94d049bb133111eb);
    return z ^ z >> 31;
}

/* Whether this match is one that the rule takes. */
static bool is_due(struct rule *r) {
    uint64_t n = r->matched++;
    bool drawn = r->probability == UINT64_C(1) << 32 || splitmix64(&r->random) >> 32 < r->probability;
    if (n < r->after || (n - r->after) % r->every || r->taken >= r->times || !drawn)
        return false;
    r->taken++;
    return true;
}

/* Where a rule counts: lines with one number are one rule, said anew for calls that have their path elsewhere. */
static struct rule *counter_of(struct rules *rules, struct rule *r) {
    for (struct rule *first = rules->list; first < r; first++)
        if (first->id == r->id)
            return first;
    return r;
}

struct verdict rules_decide(struct rules *rules, const struct seccomp_data *call, struct path_source source) {
    for (size_t i = 0; i < rules->count; i++) {
        struct rule *r = &rules->list[i];
        bool match = is_among(r->calls, r->call_count, call->nr);
        for (size_t t = 0; match && t < r->test_count; t++)
            match = holds(&r->tests[t], call);
        if (match && r->glob) {
            const char *path = source.path(source.context, call, r);
            match = path && rules_glob(r->glob, path);
        }
        if (match && is_due(counter_of(rules, r)))
            return (struct verdict){.act = r->act, .value = r->value, .delay = r->delay, .keep = r->keep, .rule = r->id};
    }
    return (struct verdict){.act = ACT_NONE};
}
