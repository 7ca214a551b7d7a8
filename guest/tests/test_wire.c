/* Payloads: what is written is read back; what is cut short, too long or holds a NUL is refused. */
#include <string.h>

#include "check.h"
#include "request.h"
#include "steps.h"
#include "wire.h"

static void round_trip(void) {
    struct writer w = {0};
    write_u8(&w, 1);
    write_u16(&w, 0x1234);
    write_u32(&w, 0xdeadbeef);
    write_u64(&w, 0x0123456789abcdef);
    write_string(&w, "a string");
    write_string(&w, "");
    for (size_t size = 0; size <= w.used; size++) {
        /* Of its own, exactly as long, so that the sanitizer sees a read past the end. */
        uint8_t *copy = malloc(size + 1);
        memcpy(copy, w.data, size);
        struct reader r = reader_of(copy, size);
        bool same = read_u8(&r) == 1;
        same &= read_u16(&r) == 0x1234;
        same &= read_u32(&r) == 0xdeadbeef;
        same &= read_u64(&r) == 0x0123456789abcdef;
        char *s = read_string(&r), *empty = read_string(&r);
        CHECK(reader_done(&r) == (size == w.used));
        CHECK(size < w.used || (same && !strcmp(s, "a string") && !*empty));
        free(s);
        free(empty);
        free(copy);
    }
    writer_free(&w);
}

static void hostile(void) {
    struct reader r = reader_of("\x03\0\0\0a\0b", 7);
    CHECK(!read_string(&r) && r.bad);
    r = reader_of("\xff\xff\xff\xff", 4);
    CHECK(!read_strings(&r) && r.bad);
    r = reader_of("\xff\xff\xff\x7f", 4);
    CHECK(!read_string(&r) && r.bad);
}

static void write_request(struct writer *w, uint32_t flags, const char *program, const char *pair) {
    write_u32(w, flags);
    write_u16(w, 24);
    write_u16(w, 80);
    write_string(w, "nobody");
    write_string(w, "/tmp");
    write_u32(w, 1);
    write_string(w, program);
    write_u32(w, 1);
    write_string(w, pair);
    if (!(flags & EXEC_POLICY))
        return;
    write_u32(w, 2); /* operations, of one word and of two */
    write_u32(w, 1);
    write_string(w, "no-vdso");
    write_u32(w, 2);
    write_string(w, "landlock");
    write_string(w, "none");
}

static bool decodes(uint32_t flags, const char *program, const char *pair) {
    struct writer w = {0};
    struct request r;
    write_request(&w, flags, program, pair);
    bool good = request_decode(w.data, w.used, &r);
    request_free(&r);
    if (good) {
        CHECK(!request_decode(w.data, w.used - 1, &r));
        request_free(&r);
        write_u8(&w, 0);
        CHECK(!request_decode(w.data, w.used, &r));
        request_free(&r);
    }
    writer_free(&w);
    return good;
}

static void requests(void) {
    CHECK(decodes(0, "true", "A=B"));
    CHECK(decodes(15, "true", "A="));
    CHECK(decodes(EXEC_POLICY | EXEC_PTY, "true", "A=B"));
    CHECK(!decodes(32, "true", "A=B"));
    CHECK(!decodes(0, "", "A=B"));
    CHECK(!decodes(0, "true", "A"));
    CHECK(!decodes(0, "true", "=B"));
}

static void policies(void) {
    struct writer w = {0};
    struct request r;
    write_request(&w, EXEC_POLICY, "true", "A=B");
    CHECK(request_decode(w.data, w.used, &r));
    CHECK(r.policy.count == 2 && r.policy.ops[0].count == 1 && r.policy.ops[1].count == 2);
    CHECK(!strcmp(r.policy.ops[0].words[0], "no-vdso") && !strcmp(r.policy.ops[1].words[1], "none") && !r.policy.ops[1].words[2]);
    request_free(&r);
    CHECK(!r.policy.ops);
    put_u32(w.data + w.used - 43, 0xffffffff); /* many more operations than there are bytes */
    CHECK(!request_decode(w.data, w.used, &r));
    request_free(&r);
    writer_free(&w);
}

/* User and terminal, then the env step, then the request: the last one counts. */
static void environment(void) {
    struct writer w = {0};
    struct request r;
    struct user u;
    struct environment own;
    write_request(&w, EXEC_PTY, "true", "HOME=/mine");
    CHECK(request_decode(w.data, w.used, &r));
    CHECK(user_find("", "root:x:0:0::/root:/bin/bash\n", "", &u) == 0);
    CHECK(env_set("SHELL=/bin/zsh") == 0 && env_set("X=1") == 0 && env_set("X=2") == 0 && env_set("nothing") != 0);
    char **env = environment_of(&r, &u, &own);
    size_t count = 0;
    while (env[count])
        count++;
    CHECK(count == 7);
    CHECK(!strcmp(env_get(env, "HOME"), "/mine"));
    CHECK(!strcmp(env_get(env, "SHELL"), "/bin/zsh"));
    CHECK(!strcmp(env_get(env, "X"), "2"));
    CHECK(!strcmp(env_get(env, "USER"), "root"));
    CHECK(env_get(env, "TERM") && !env_get(env, "TER"));
    free(env);
    request_free(&r);
    writer_free(&w);
}

static void steps(void) {
    struct writer w = {0};
    static struct steps s;
    write_u32(&w, 2);
    write_u32(&w, 1);
    write_string(&w, "sync");
    write_u32(&w, 2);
    write_string(&w, "wait");
    write_string(&w, "/");
    CHECK(steps_decode(w.data, w.used, &s) && s.count == 2 && steps_check(&s) == 0);
    steps_free(&s);
    CHECK(!steps_decode(w.data, w.used - 1, &s));
    steps_free(&s);
    w.data[0] = 1;
    CHECK(!steps_decode(w.data, w.used, &s));
    steps_free(&s);
    writer_free(&w);
    write_u32(&w, 1);
    write_u32(&w, 1);
    write_string(&w, "wait");
    CHECK(steps_decode(w.data, w.used, &s) && steps_check(&s) == 1);
    steps_free(&s);
    CHECK(!steps_decode("\1\0\0\0\0\0\0\0", 8, &s)); /* a step without a word */
    steps_free(&s);
    writer_free(&w);
}

int main(void) {
    round_trip();
    hostile();
    requests();
    policies();
    environment();
    steps();
    return 0;
}
