#include "users.h"

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { FIELDS = 7, TABLE_MAX = 1 << 20 };

struct field {
    const char *at;
    size_t size;
};

/* Cut the line at *text into its fields and move *text behind it. */
static bool next_line(const char **text, struct field fields[FIELDS], int *count) {
    if (!**text)
        return false;
    size_t size = strcspn(*text, "\n");
    const char *at = *text, *end = at + size;
    *text = end + (*end == '\n');
    *count = 0;
    for (;;) {
        const char *colon = memchr(at, ':', (size_t)(end - at));
        const char *stop = colon && *count < FIELDS - 1 ? colon : end;
        fields[(*count)++] = (struct field){at, (size_t)(stop - at)};
        if (stop == end)
            return true;
        at = stop + 1;
    }
}

static bool same(struct field f, const char *s, size_t size) { return f.size == size && !memcmp(f.at, s, size); }

/* Decimal, below 2^32 - 1, which means "no id" to the kernel. */
static bool number(const char *s, size_t size, uint32_t *out) {
    uint64_t v = 0;
    if (size == 0 || size > 10)
        return false;
    for (size_t i = 0; i < size; i++) {
        if (s[i] < '0' || s[i] > '9')
            return false;
        v = v * 10 + (uint64_t)(s[i] - '0');
    }
    *out = (uint32_t)v;
    return v < UINT32_MAX;
}

static void copy(char out[USER_TEXT], struct field f) {
    size_t size = f.size < USER_TEXT ? f.size : 0; /* too long to be true: as if it were empty */
    memcpy(out, f.at, size);
    out[size] = 0;
}

/* By name, or by uid where `name` is NULL. */
static bool passwd_entry(const char *text, const char *name, size_t size, struct user *u) {
    struct field f[FIELDS];
    int n;
    while (next_line(&text, f, &n)) {
        uint32_t uid, gid;
        if (n < FIELDS || !number(f[2].at, f[2].size, &uid) || !number(f[3].at, f[3].size, &gid))
            continue;
        if (name ? !same(f[0], name, size) : uid != u->uid)
            continue;
        u->uid = uid;
        u->gid = gid;
        copy(u->name, f[0]);
        copy(u->home, f[5]);
        copy(u->shell, f[6]);
        return true;
    }
    return false;
}

static bool group_entry(const char *text, const char *name, size_t size, gid_t *gid) {
    struct field f[FIELDS];
    int n;
    while (next_line(&text, f, &n))
        if (n >= 3 && same(f[0], name, size) && number(f[2].at, f[2].size, gid))
            return true;
    return false;
}

static bool lists(struct field members, const char *name) {
    const char *at = members.at, *end = at + members.size;
    size_t want = strlen(name);
    while (at < end) {
        const char *comma = memchr(at, ',', (size_t)(end - at));
        size_t size = (size_t)((comma ? comma : end) - at);
        if (size == want && !memcmp(at, name, size))
            return true;
        at += size + 1;
    }
    return false;
}

static void supplementary(const char *text, struct user *u) {
    struct field f[FIELDS];
    int n;
    u->groups[u->group_count++] = u->gid;
    while (u->name[0] && u->group_count < USER_GROUPS && next_line(&text, f, &n)) {
        gid_t gid;
        if (n >= 4 && number(f[2].at, f[2].size, &gid) && gid != u->gid && lists(f[3], u->name))
            u->groups[u->group_count++] = gid;
    }
}

int user_find(const char *spec, const char *passwd, const char *group, struct user *out) {
    *out = (struct user){0};
    const char *colon = strchr(spec, ':');
    size_t size = colon ? (size_t)(colon - spec) : strlen(spec);
    if (colon && (size == 0 || !colon[1]))
        return EINVAL;
    if (size == 0) {
        passwd_entry(passwd, NULL, 0, out);
    } else if (!passwd_entry(passwd, spec, size, out)) {
        if (!number(spec, size, &out->uid))
            return ENOENT;
        /* A uid that no line names runs with the group 0, as other container tools have it. */
        passwd_entry(passwd, NULL, 0, out);
    }
    if (!out->home[0])
        strcpy(out->home, out->uid == 0 ? "/root" : "/");
    if (!out->shell[0])
        strcpy(out->shell, "/bin/sh");
    if (!out->name[0])
        snprintf(out->name, sizeof out->name, out->uid == 0 ? "root" : "%u", out->uid);
    if (!colon) {
        supplementary(group, out);
        return 0;
    }
    const char *g = colon + 1;
    if (!group_entry(group, g, strlen(g), &out->gid) && !number(g, strlen(g), &out->gid))
        return ENOENT;
    out->groups[out->group_count++] = out->gid;
    return 0;
}

char *read_text(const char *path, size_t max) {
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
    if (fd < 0)
        return NULL;
    struct stat st;
    char *text = NULL;
    size_t used = 0;
    if (fstat(fd, &st) < 0 || !S_ISREG(st.st_mode) || (uint64_t)st.st_size > max) {
        errno = EINVAL;
    } else if ((text = malloc((st.st_size ? (size_t)st.st_size : max) + 1))) {
        /* proc and sysfs say 0: there the bound is `max`. */
        size_t want = st.st_size ? (size_t)st.st_size : max;
        ssize_t n;
        while (used < want && (n = read(fd, text + used, want - used)) > 0)
            used += (size_t)n;
        text[used] = 0;
    }
    close(fd);
    return text;
}

int user_lookup(const char *spec, struct user *out) {
    char *passwd = read_text("/etc/passwd", TABLE_MAX), *group = read_text("/etc/group", TABLE_MAX);
    int error = user_find(spec, passwd ? passwd : "", group ? group : "", out);
    free(passwd);
    free(group);
    return error;
}
