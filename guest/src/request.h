/* An EXEC request: decoded, and the environment that a command gets. */
#ifndef TVINIT_REQUEST_H
#define TVINIT_REQUEST_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "plan.h"
#include "users.h"

enum { EXEC_PTY = 1, EXEC_BUILTIN = 2, EXEC_DETACH = 4, EXEC_NO_STDIN = 8, EXEC_POLICY = 16, EXEC_PROGRAM = 32, EXEC_FLAGS = 63, REQUEST_MAX = 1 << 20 };

struct request {
    uint32_t flags;
    uint16_t rows, columns;
    char *user, *cwd, **argv, **env;
    struct plan policy; /* EXEC_POLICY: its operations, not looked at yet (policy.h) */
    uint32_t stop;      /* EXEC_PROGRAM: its stop signal */
};

/* True if the bytes are one well-formed request. Free it in any case. */
bool request_decode(const void *data, size_t size, struct request *out);
void request_free(struct request *r);

/* 0, or errno and `why` for one that no command can be made of. */
int request_refused(const struct request *r, const char **why);

/* Set one `K=V` under the env of every later command (the step). 0 or errno. */
int env_set(const char *pair);

/* What a command of `u` sees: what user and terminal imply, then what env_set set, then its own. The strings are
 * borrowed from `r` and `own`; free the list alone. NULL if memory is out. */
struct environment {
    char own[6][USER_TEXT + 16];
};
char **environment_of(const struct request *r, const struct user *u, struct environment *own);

/* The value of a name in a list; NULL. */
const char *env_get(char *const *env, const char *name);

#endif
