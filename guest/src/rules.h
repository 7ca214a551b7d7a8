/* Rules of a listener: what is said to a call that the kernel could not answer by itself (PROTOCOL.md, "Answers").
 *
 * Pure: nothing is read of the program but through `path`, so that the same code is tested and fuzzed without one. Time to decide
 * is bounded by the number of rules (a message's size) and by RULES_PATH times RULES_GLOB for each path. */
#ifndef TVINIT_RULES_H
#define TVINIT_RULES_H

#include <linux/seccomp.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { RULES_MAX = 1024, RULES_CALLS = 64, RULES_TESTS = 12, RULES_GLOB = 1024, RULES_PATH = 4096, RULES_HANDLERS = 512, RULES_KEEP = 65536 };

#define RULES_DELAY INT64_C(3600000000000)

enum test { TEST_EQ, TEST_NE, TEST_LT, TEST_LE, TEST_GT, TEST_GE, TEST_IN };
enum act { ACT_NONE, ACT_CONTINUE, ACT_ERRNO, ACT_RETURN, ACT_KILL, ACT_LOG, ACT_TEAR };

struct condition {
    uint8_t index;
    enum test test;
    uint64_t value, mask;
};

struct rule {
    uint32_t id;
    int calls[RULES_CALLS];
    size_t call_count;
    enum act act;
    int64_t value; /* errno, or what is returned */
    uint32_t keep; /* tear: how many bytes are written */
    int64_t delay; /* ns */
    struct condition tests[RULES_TESTS];
    size_t test_count;
    char *glob; /* NULL: any path */
    int path_arg, dir_arg; /* dir_arg -1: as the call has it, if it has one */
    bool path_is_fd;
    uint64_t after, every, times;
    uint64_t probability; /* of 2^32 */
    uint64_t random;      /* state of splitmix64 */
    uint64_t matched, taken;
};

/* Where a path comes from. NULL: it cannot be read, and matches nothing. Valid until the next call. */
struct path_source {
    const char *(*path)(void *context, const struct seccomp_data *call, const struct rule *rule);
    void *context;
};

struct rules {
    struct rule *list;
    size_t count;
    int handlers[RULES_HANDLERS];
    size_t handler_count;
    uint8_t token[16];
    bool has_token;
};

struct verdict {
    enum act act; /* ACT_NONE: no rule matched */
    int64_t value, delay;
    uint32_t keep, rule;
};

/* Decode an 'L' message's operations. False if they are malformed, with nothing to free. */
bool rules_decode(const void *data, size_t size, struct rules *out);
void rules_free(struct rules *r);

/* The first rule that matches and is due. Counts are kept. */
struct verdict rules_decide(struct rules *r, const struct seccomp_data *call, struct path_source source);

/* Whether a handler is for that call. */
bool rules_handled(const struct rules *r, int nr);

/* fnmatch(3) as Python's fnmatch has it: `*` matches slashes too, nothing is escaped. Time at most the product of the lengths. */
bool rules_glob(const char *glob, const char *text);

/* The argument that holds the folder which a path argument of that call is relative to; -1: none has. */
int rules_dir_argument(int nr, int path_arg);

/* `path` made absolute against `base`, `.` and `..` taken out by name, into out[RULES_PATH]. False if it does not fit. */
bool rules_absolute(const char *base, const char *path, char *out);

#endif
