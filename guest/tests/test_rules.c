/* Rules of a listener: how they are read, which match, which of their matches they take. */
#include "rules.h"

#include <errno.h>
#include <string.h>
#include <sys/syscall.h>

#include "check.h"
#include "operations.h"
#include "wire.h"

static bool decode(const char *text, struct rules *out) {
    struct writer w = {0};
    write_operations(&w, text);
    bool good = rules_decode(w.data, w.used, out);
    /* Cut short anywhere it is malformed, and leaves nothing. */
    struct rules cut;
    for (size_t n = 0; n < w.used; n++)
        CHECK(!rules_decode(w.data, n, &cut) && !cut.list);
    writer_free(&w);
    return good;
}

static bool refused(const char *text) {
    struct rules r;
    bool good = decode(text, &r);
    if (good)
        rules_free(&r);
    return !good;
}

static const char *given;

static const char *path(void *context, const struct seccomp_data *call, const struct rule *rule) {
    (void)context, (void)call, (void)rule;
    return given;
}

static struct verdict ask(struct rules *r, int nr, uint64_t a0, uint64_t a1) {
    struct seccomp_data call = {.nr = nr, .args = {a0, a1}};
    return rules_decide(r, &call, (struct path_source){path, NULL});
}

static void globs(void) {
    static const struct { const char *glob, *text; bool matches; } cases[] = {
        {"", "", true}, {"*", "", true}, {"*", "/a/b", true}, {"/data/*", "/data/a/b", true}, {"/data/*", "/dat", false},
        {"*.db", "/x/y.db", true}, {"*.db", "/x/y.db-wal", false}, {"a?c", "abc", true}, {"a?c", "ac", false}, {"?", "\xc3\xa9", true},
        {"[abc]x", "bx", true}, {"[!abc]x", "bx", false}, {"[!abc]x", "dx", true}, {"[a-c]", "b", true}, {"[]]", "]", true},
        {"[", "[", true}, {"a[", "a[", true}, {"[a", "[a", true}, {"*a*b*c", "xxaxxbxxc", true}, {"*a*b*c", "xxaxxcxxb", false},
        {"[a-]", "-", true}, {"/a", "/a/", false}, {"**", "x", true}, {"a*", "", false}, {"[!]]", "]", false}, {"\\*", "*", false},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        if (rules_glob(cases[i].glob, cases[i].text) != cases[i].matches) {
            fprintf(stderr, "glob %s of %s\n", cases[i].glob, cases[i].text);
            exit(1);
        }
    /* What takes others for ever: many stars, nearly a match. */
    char glob[RULES_GLOB + 1], text[RULES_PATH];
    for (int i = 0; i < RULES_GLOB; i++)
        glob[i] = i % 2 ? 'a' : '*';
    glob[RULES_GLOB - 1] = 'b';
    glob[RULES_GLOB] = 0;
    memset(text, 'a', sizeof text - 1);
    text[sizeof text - 1] = 0;
    CHECK(!rules_glob(glob, text));
}

static void absolutes(void) {
    static const struct { const char *base, *path, *is; } cases[] = {
        {"/here", "a/b", "/here/a/b"}, {"/here", "../x", "/x"}, {"/", "../../..", "/"}, {"/a", "/b//c/./d", "/b/c/d"}, {"/a/b", ".", "/a/b"},
        {"/a", "b/../../../c", "/c"}, {"pipe:[1]", "x", "/pipe:[1]/x"}, {"/", "...", "/..."}, {"/a", "/", "/"},
    };
    char out[RULES_PATH], longer[RULES_PATH + 8];
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        CHECK(rules_absolute(cases[i].base, cases[i].path, out) && !strcmp(out, cases[i].is));
    memset(longer, 'x', sizeof longer - 1);
    longer[sizeof longer - 1] = 0;
    CHECK(!rules_absolute("/", longer, out));
    CHECK(rules_dir_argument(SYS_openat, 1) == 0 && rules_dir_argument(SYS_mount, 1) == -1 && rules_dir_argument(SYS_renameat2, 3) == 2 &&
          rules_dir_argument(SYS_truncate, 0) == -1);
}

static void decisions(void) {
    struct rules r;
    CHECK(decode("token 00112233445566778899aabbccddeeff\n"
                 "rule 1 7,8 errno=28 arg=0:==:3:18446744073709551615 arg=1:in:6:255\n"
                 "rule 2 7 return=-5 path=/data/* on=1p\n"
                 "rule 3 9 delay=1000\n"
                 "rule 4 10 continue delay=5\n"
                 "rule 5 11 kill\nrule 6 12 log\n"
                 "rule 7 13 errno=1 arg=0:<:10:255 arg=0:>=:5:255 arg=0:!=:7:255\n"
                 "handler 20,21\nhandler 22", &r));
    CHECK(r.has_token && r.token[0] == 0 && r.token[15] == 0xff);
    struct verdict v = ask(&r, 8, 3, 4);
    CHECK(v.act == ACT_ERRNO && v.value == ENOSPC && v.rule == 1);
    CHECK(ask(&r, 8, 3, 0x100).act == ACT_NONE && ask(&r, 8, 4, 4).act == ACT_NONE);
    given = NULL;
    CHECK(ask(&r, 7, 0, 0).act == ACT_NONE);
    given = "/data/x";
    v = ask(&r, 7, 0, 0);
    CHECK(v.act == ACT_RETURN && v.value == -5);
    v = ask(&r, 9, 0, 0);
    CHECK(v.act == ACT_CONTINUE && v.delay == 1000);
    CHECK(ask(&r, 10, 0, 0).delay == 5 && ask(&r, 11, 0, 0).act == ACT_KILL && ask(&r, 12, 0, 0).act == ACT_LOG);
    CHECK(ask(&r, 13, 6, 0).act == ACT_ERRNO && ask(&r, 13, 7, 0).act == ACT_NONE && ask(&r, 13, 0x104, 0).act == ACT_NONE &&
          ask(&r, 13, 10, 0).act == ACT_NONE);
    CHECK(rules_handled(&r, 20) && rules_handled(&r, 22) && !rules_handled(&r, 23));
    rules_free(&r);
}

static void counts(void) {
    struct rules r;
    CHECK(decode("rule 1 1 errno=5 after=2 every=3 times=2\nrule 2 1 errno=6 after=100", &r));
    int taken[12];
    for (int i = 0; i < 12; i++)
        taken[i] = ask(&r, 1, 0, 0).act == ACT_ERRNO;
    for (int i = 0; i < 12; i++)
        CHECK(taken[i] == (i == 2 || i == 5));
    CHECK(r.list[1].matched == 10); /* asked where the first let go */
    rules_free(&r);
    /* Two lines of one rule count together, whichever is asked. */
    CHECK(decode("rule 1 1 errno=5 after=2 times=2\nrule 1 2 errno=5 after=2 times=2\nrule 2 3 errno=6", &r));
    const int order[] = {1, 2, 2, 1, 1, 2};
    for (int i = 0; i < 6; i++)
        CHECK((ask(&r, order[i], 0, 0).act == ACT_ERRNO) == (i == 2 || i == 3));
    CHECK(ask(&r, 3, 0, 0).value == 6);
    rules_free(&r);
}

static void draws(void) {
    struct rules r[2];
    int taken = 0;
    for (int i = 0; i < 2; i++)
        CHECK(decode("rule 1 1 errno=5 probability=429496730 seed=7\nrule 2 2 errno=5 probability=0\nrule 3 3 errno=5 probability=4294967296", &r[i]));
    for (int i = 0; i < 10000; i++) {
        bool first = ask(&r[0], 1, 0, 0).act == ACT_ERRNO;
        CHECK(first == (ask(&r[1], 1, 0, 0).act == ACT_ERRNO)); /* the same seed, the same draws */
        taken += first;
        CHECK(ask(&r[0], 2, 0, 0).act == ACT_NONE && ask(&r[0], 3, 0, 0).act == ACT_ERRNO);
    }
    CHECK(taken > 850 && taken < 1150);
    rules_free(&r[0]);
    rules_free(&r[1]);
    /* splitmix64 from 0 begins with e220a839..., 6e789e6a...: other programs can foretell the draws. */
    CHECK(decode("rule 1 1 errno=5 seed=0 probability=2147483648", &r[0]));
    CHECK(ask(&r[0], 1, 0, 0).act == ACT_NONE && ask(&r[0], 1, 0, 0).act == ACT_ERRNO);
    rules_free(&r[0]);
}

static void malformed(void) {
    static const char *const texts[] = {
        "rule", "rule 1", "rule 1 2", "rule x 1 kill", "rule 1 x kill", "rule 1 1, kill junk", "rule 1 1 explode", "rule 1 1 errno=0",
        "rule 1 1 errno=4096", "rule 1 1 errno=", "rule 1 1 errno=5x", "rule 1 1 kill delay=5", "rule 1 1 delay=-1",
        "rule 1 1 delay=3600000000001", "rule 1 1 kill arg=6:==:1:1", "rule 1 1 kill arg=0:~:1:1", "rule 1 1 kill arg=0:==:1",
        "rule 1 1 kill arg=0:==:18446744073709551616:1", "rule 1 1 kill path=/x", "rule 1 1 kill path= on=0p", "rule 1 1 kill path=/x on=6p",
        "rule 1 1 kill path=/x on=1x", "rule 1 1 kill every=0", "rule 1 1 kill probability=4294967297", "rule 1 1 kill what=1", "token 00",
        "token 00112233445566778899AABBCCDDEEFF", "token 00112233445566778899aabbccddeeff\ntoken 00112233445566778899aabbccddeeff", "handler",
        "handler x", "other", "rule 1 -1 kill", "rule 1 1 kill path=/x path=/y on=0p",
        "rule 1 1 tear=5", "rule 1 1 tear=65537:5", "rule 1 1 tear=1:4096", "rule 1 1 tear=1:5:6", "rule 1 1 tear=:5",
    };
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++)
        if (!refused(texts[i])) {
            fprintf(stderr, "taken: %s\n", texts[i]);
            exit(1);
        }
    CHECK(!refused("rule 4294967295 1 errno=4095 on=5:f path=*") && !refused("rule 1 1 return=-9223372036854775808") &&
          !refused("rule 1 1 tear=65536:0"));
    struct rules r;
    static const uint8_t many[] = {0xff, 0xff, 0xff, 0xff};
    CHECK(!rules_decode(many, sizeof many, &r) && !rules_decode("", 0, &r));
}

int main(void) {
    globs();
    absolutes();
    decisions();
    counts();
    draws();
    malformed();
    puts("test_rules: ok");
    return 0;
}
