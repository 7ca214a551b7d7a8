/* Requests as a client sends them, decoded but not carried out: EXEC, STEPS, the files that name users. */
#include <stdlib.h>
#include <string.h>

#include "policy.h"
#include "request.h"
#include "steps.h"
#include "users.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void exec(const uint8_t *data, size_t size) {
    struct request r;
    if (request_decode(data, size, &r)) {
        struct user u = {0};
        struct environment own;
        user_find(r.user, "a:x:1:1::/:/bin/sh\n", "a:x:1:a\n", &u);
        char **env = environment_of(&r, &u, &own);
        if (!env || !env_get(env, "PATH"))
            abort();
        free(env);
        struct policy p;
        policy_take(&r.policy, &p);
        policy_free(&p);
    }
    request_free(&r);
}

static void steps(const uint8_t *data, size_t size) {
    static struct steps s;
    if (steps_decode(data, size, &s) && steps_check(&s) > s.count)
        abort();
    steps_free(&s);
}

static void users(const uint8_t *data, size_t size) {
    char *text = malloc(size + 1);
    struct user u;
    memcpy(text, data, size);
    text[size] = 0;
    user_find("name", text, text, &u);
    user_find("7:name", text, text, &u);
    user_find(text, text, text, &u);
    if (u.group_count > USER_GROUPS)
        abort();
    free(text);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (size == 0)
        return 0;
    void (*const what[])(const uint8_t *, size_t) = {exec, steps, users};
    uint8_t *copy = malloc(size - 1); /* as long as the bytes, so that a read past them is seen */
    memcpy(copy, data + 1, size - 1);
    what[data[0] % 3](copy, size - 1);
    free(copy);
    return 0;
}
