/* Plans: decoded whole or not at all, and checked before anything runs. */
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "check.h"
#include "plan.h"
#include "wire.h"

/* A plan of lines; the words of a line are parted by blanks. */
static struct writer encoded(const char *const *lines, size_t count) {
    struct writer w = {0};
    write_u32(&w, (uint32_t)count);
    for (size_t i = 0; i < count; i++) {
        char copy[256], *words[32], *rest = NULL;
        size_t n = 0;
        strcpy(copy, lines[i]);
        for (char *word = strtok_r(copy, " ", &rest); word; word = strtok_r(NULL, " ", &rest))
            words[n++] = word;
        write_u32(&w, (uint32_t)n);
        for (size_t k = 0; k < n; k++)
            write_string(&w, words[k]);
    }
    return w;
}

static const char *checked(const char *const *lines, size_t count) {
    struct writer w = encoded(lines, count);
    struct plan p;
    CHECK(plan_decode(w.data, w.used, &p));
    CHECK(p.count == count);
    const char *why = plan_check_launch(p.ops, p.count);
    plan_free(&p);
    writer_free(&w);
    return why;
}

#define PLAN(...) checked((const char *const[]){__VA_ARGS__}, sizeof((const char *const[]){__VA_ARGS__}) / sizeof(char *))

static void every_cut_is_refused(void) {
    const char *lines[] = {"namespaces mount pid", "root /r", "pivot", "exec /bin/true a b"};
    struct writer w = encoded(lines, 4);
    struct plan p;
    for (size_t size = 0; size < w.used; size++)
        CHECK(!plan_decode(w.data, size, &p) && p.count == 0);
    write_u8(&w, 0);
    CHECK(!plan_decode(w.data, w.used, &p)); /* nothing may follow */
    writer_free(&w);
}

static void counts_that_lie_are_refused(void) {
    struct plan p;
    struct writer w = {0};
    write_u32(&w, UINT32_MAX);
    CHECK(!plan_decode(w.data, w.used, &p));
    writer_free(&w);
    write_u32(&w, 1); /* one operation without a word */
    write_u32(&w, 0);
    CHECK(!plan_decode(w.data, w.used, &p));
    writer_free(&w);
}

static void order_and_arity(void) {
    CHECK(!PLAN("exec /bin/true"));
    CHECK(!PLAN("namespaces user mount", "map-user 1 1 1", "root /r", "bind /a /a ro", "dir /b 755", "pivot", "caps", "no-new-privs", "exec x"));
    CHECK(!PLAN("chdir /", "fd 1 2", "env A=B", "exec x"));
    CHECK(PLAN("caps"));                                             /* no exec */
    CHECK(PLAN("exec a", "exec b"));                                 /* two */
    CHECK(PLAN("no-new-privs", "caps", "exec x"));                   /* order */
    CHECK(PLAN("explode", "exec x"));                                /* unknown */
    CHECK(PLAN("chdir", "exec x"));                                  /* too few words */
    CHECK(PLAN("chdir / /", "exec x"));                              /* too many */
    CHECK(PLAN("namespaces mount", "bind /a /a ro", "exec x"));      /* no root to bind in */
    CHECK(PLAN("root /r", "pivot", "exec x"));                       /* would mount over the host */
    CHECK(PLAN("namespaces mount", "root /r", "exec x"));            /* would stay in the old root */
    CHECK(PLAN("namespaces mount", "root /r", "caps", "pivot", "exec x"));
    CHECK(PLAN("namespaces net", "hostname h", "exec x"));           /* would rename the host */
    CHECK(!PLAN("namespaces uts", "hostname h", "exec x"));
    CHECK(plan_check_launch(NULL, 0));
}

#define NAMESPACES "namespaces user mount pid net ipc uts cgroup time"

static void containers(void) {
    CHECK(!PLAN("cgroup 4 5", NAMESPACES, "map-user 0 100 1", "map-user 1 200 9", "hostname h", "loopback", "root /", "overlay /l /u idmap /",
                "mount proc proc /proc rw x", "text /etc/hosts 644 x", "mask /proc/kcore", "readonly /proc/sys", "pivot rw", "rlimit core 0 0",
                "caps chown", "apparmor p", "no-new-privs", "landlock-domain", "seccomp 00", "exec-seccomp 00", "env A=B", "hooks", "answer 6",
                "fd 5 2", "guest 4"));
    CHECK(PLAN("exec-seccomp 00", "exec x")); /* which would be without it */
    CHECK(PLAN("answer 5", "exec x"));
    CHECK(!PLAN("namespaces mount pid", "netns 3", "root /", "pivot", "guest 4"));
    CHECK(PLAN("namespaces mount pid net", "netns 3", "root /", "pivot", "guest 4")); /* which one? */
    CHECK(!PLAN("namespaces user net", "loopback", "uplink 3 eth0 52:54:00:00:00:01 1500", "address eth0 10.0.2.15 24", "exec x"));
    CHECK(PLAN("namespaces user", "uplink 3 eth0 52:54:00:00:00:01 1500", "exec x")); /* would give the host an interface */
    CHECK(PLAN("namespaces user net", "uplink 3 eth0 52:54:00:00:00:01", "exec x"));
    CHECK(PLAN(NAMESPACES, "cgroup 4", "exec x"));            /* its namespace would begin elsewhere */
    CHECK(PLAN("cgroup 4", "cgroup 5", "exec x"));            /* one list */
    CHECK(PLAN("guest 4"));                                   /* would be PID 1 of nothing */
    CHECK(PLAN("namespaces mount pid", "guest 4"));           /* with the host's files before it */
    CHECK(PLAN("namespaces mount", "root /", "pivot", "guest 4"));
    CHECK(PLAN("namespaces mount pid", "root /", "pivot", "guest 4 5"));
    CHECK(PLAN("overlay /l /u - /", "exec x"));               /* without a root */
    CHECK(PLAN("mask /proc/kcore", "exec x"));
    CHECK(PLAN("namespaces mount", "root /", "pivot", "mask /proc/kcore", "exec x"));
}

static void numbers(void) {
    long long n;
    CHECK(plan_number("0", 0, 10, &n) && n == 0);
    CHECK(plan_number("-3", -5, 10, &n) && n == -3);
    CHECK(!plan_number("", 0, 10, &n) && !plan_number("x", 0, 10, &n) && !plan_number("1x", 0, 10, &n));
    CHECK(!plan_number(" 1", 0, 10, &n) && !plan_number("11", 0, 10, &n) && !plan_number("+1", 0, 10, &n));
    CHECK(!plan_number("99999999999999999999", 0, 10, &n) && !plan_number("-", -9, 10, &n));
}

static void reading(void) {
    const char *lines[] = {"exec /bin/true"};
    struct writer w = encoded(lines, 1);
    struct plan p;
    int fd = memfd_create("plan", MFD_CLOEXEC);
    CHECK(write(fd, w.data, w.used) == (ssize_t)w.used && lseek(fd, 0, SEEK_SET) == 0);
    CHECK(plan_read(fd, &p) && p.count == 1 && !strcmp(p.ops[0].words[1], "/bin/true"));
    plan_free(&p);
    CHECK(ftruncate(fd, PLAN_MAX + 1) == 0 && lseek(fd, 0, SEEK_SET) == 0);
    CHECK(!plan_read(fd, &p));
    close(fd);
    CHECK(!plan_read(fd, &p));
    writer_free(&w);
}

int main(void) {
    every_cut_is_refused();
    counts_that_lie_are_refused();
    order_and_arity();
    containers();
    numbers();
    reading();
    return 0;
}
