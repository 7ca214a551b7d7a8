#include "steps.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/fs.h>
#include <linux/random.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "dial.h"
#include "exec.h"
#include "held.h"
#include "line.h"
#include "log.h"
#include "loop.h"
#include "net.h"
#include "request.h"
#include "rest.h"
#include "root.h"
#include "wire.h"

#define HOOKS "/etc/trivisor/after-clone.d"

enum { RUN_MS = 10000, WAIT_MS = 10000, HOOKS_MAX = 64, SEED_MAX = 512, TEXT_MAX = 4096, REST_MAX = 60000 };

/* What the step's errno is about; NULL: its words say enough. */
static const char *about;

static int do_module(char **w) {
    for (int error; *++w;)
        if ((error = module_load(*w))) {
            about = *w;
            return error;
        }
    return 0;
}

static int do_wait(char **w) {
    int64_t end = now_ms() + WAIT_MS;
    /* A poll: what is waited for may lie in sysfs or devtmpfs, where inotify sees nothing of the kernel's changes. */
    for (struct stat st; stat(w[1], &st) < 0;) {
        if (now_ms() >= end)
            return ETIMEDOUT;
        nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
    }
    return 0;
}

static int do_flush(char **w) {
    int fd = open(w[1], O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0)
        return errno;
    int error = ioctl(fd, BLKFLSBUF, 0) < 0 ? errno : 0;
    close(fd);
    return error;
}

static int do_root(char **w) {
    int error = root_switch(w[1], w[2], w + 3);
    about = error ? root_failed : NULL;
    return error;
}

static int do_grow(char **w) {
    char *end;
    errno = 0;
    unsigned long long size = strtoull(w[2], &end, 10);
    if (errno || !*w[2] || *end || size > INT64_MAX)
        return EINVAL;
    return root_grow(w[1], size);
}

static int do_hostname(char **w) {
    char text[TEXT_MAX];
    if (!*w[1] || strlen(w[1]) > 64 || strpbrk(w[1], " \t\n/"))
        return EINVAL;
    if (sethostname(w[1], strlen(w[1])) < 0)
        return errno;
    snprintf(text, sizeof text, "%s\n", w[1]);
    int error = replace_file("/etc/hostname", text);
    if (error)
        return error;
    snprintf(text, sizeof text, "127.0.0.1\tlocalhost\n127.0.1.1\t%s\n::1\tlocalhost ip6-localhost ip6-loopback\n", w[1]);
    return replace_file("/etc/hosts", text);
}

static int do_machine_id(char **w) {
    char text[64];
    if (strlen(w[1]) != 32 || strspn(w[1], "0123456789abcdef") != 32)
        return EINVAL;
    snprintf(text, sizeof text, "%s\n", w[1]);
    return replace_file("/etc/machine-id", text);
}

static int do_clock(char **w) {
    char *end;
    errno = 0;
    unsigned long long ns = strtoull(w[1], &end, 10);
    if (errno || !*w[1] || *end || ns > INT64_MAX)
        return EINVAL;
    struct timespec t = {.tv_sec = (time_t)(ns / 1000000000), .tv_nsec = (long)(ns % 1000000000)};
    return clock_settime(CLOCK_REALTIME, &t) < 0 ? errno : 0;
}

static int do_seed(char **w) {
    /* As RNDADDENTROPY takes it (random(4)): bits of entropy, bytes, the bytes. */
    uint32_t pool[2 + SEED_MAX / 4];
    uint8_t *bytes = (uint8_t *)(pool + 2);
    size_t size = strlen(w[1]) / 2;
    if (size == 0 || size > SEED_MAX || strlen(w[1]) % 2 || strspn(w[1], "0123456789abcdefABCDEF") != size * 2)
        return EINVAL;
    for (size_t i = 0; i < size; i++) {
        char pair[3] = {w[1][2 * i], w[1][2 * i + 1]};
        bytes[i] = (uint8_t)strtoul(pair, NULL, 16);
    }
    pool[0] = (uint32_t)size * 8;
    pool[1] = (uint32_t)size;
    int fd = open("/dev/urandom", O_WRONLY | O_CLOEXEC);
    if (fd < 0)
        return errno;
    int error = ioctl(fd, RNDADDENTROPY, pool) < 0 || ioctl(fd, RNDRESEEDCRNG) < 0 ? errno : 0;
    explicit_bzero(pool, sizeof pool);
    close(fd);
    return error;
}

static int do_address(char **w) { return net_address(w[1], w[2], w[3], w[4]); }
static int do_route(char **w) { return net_route(w[1], w[2], w[3], w[4]); }
static int do_mac(char **w) { return net_mac(w[1], w[2]); }

static int do_dns(char **w) {
    char text[TEXT_MAX];
    size_t used = 0;
    while (*++w) {
        int n = snprintf(text + used, sizeof text - used, "nameserver %s\n", *w);
        if (strpbrk(*w, " \t\n") || n >= (int)(sizeof text - used))
            return EINVAL;
        used += (size_t)n;
    }
    return replace_file("/etc/resolv.conf", text);
}

/* The first cannot be switched and has no such file; one that is as it should be is left alone. */
static int do_cpus(char **w) {
    char *end;
    unsigned long want = strtoul(w[1], &end, 10);
    if (!*w[1] || *end || want < 1 || want > 1024)
        return EINVAL;
    for (unsigned i = 1; i < 1024; i++) {
        char path[64], now = 0, then = i < want ? '1' : '0';
        snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%u/online", i);
        int fd = open(path, O_RDWR | O_CLOEXEC);
        if (fd < 0)
            return errno == ENOENT && i >= want ? 0 : errno;
        int error = read(fd, &now, 1) == 1 && (now == then || pwrite(fd, &then, 1, 0) == 1) ? 0 : errno;
        close(fd);
        if (error)
            return error;
    }
    return 0;
}

static int do_env(char **w) {
    int error = 0;
    while (!error && *++w)
        error = env_set(*w);
    return error;
}

static int do_warm(char **w) {
    if (exec_wait(w + 1, RUN_MS) < 0)
        log_line("warm %s: %m", w[1]);
    return 0;
}

static int visible(const struct dirent *e) { return e->d_name[0] != '.'; }

int steps_hooks(void) {
    struct dirent **list;
    int count = scandir(HOOKS, &list, visible, alphasort);
    if (count < 0)
        return errno == ENOENT || errno == ENOTDIR ? 0 : errno;
    for (int i = 0; i < count; i++) {
        char path[sizeof HOOKS + 256];
        snprintf(path, sizeof path, HOOKS "/%s", list[i]->d_name);
        free(list[i]);
        if (i >= HOOKS_MAX || access(path, X_OK) < 0)
            continue;
        int status = exec_wait((char *[]){path, NULL}, RUN_MS);
        /* A hook that fails is the image's own affair: it is told, and the machine lives. */
        if (status < 0)
            log_line("hook %s: %m", path);
        else if (status != 0)
            log_line("hook %s: %s %d", path, WIFSIGNALED(status) ? "signal" : "exit status",
                     WIFSIGNALED(status) ? WTERMSIG(status) : WEXITSTATUS(status));
    }
    free(list);
    return 0;
}

static int do_hooks(char **w) {
    (void)w;
    return steps_hooks();
}

static int do_sync(char **w) {
    (void)w;
    sync();
    return 0;
}

static int do_rest(char **w) {
    char *end;
    unsigned long ms = strtoul(w[1], &end, 10);
    return !*w[1] || *end || ms < 1 || ms > REST_MAX ? EINVAL : rest_begin((int)ms);
}

static int do_rested(char **w) {
    (void)w;
    return rest_end();
}

static int do_away(char **w) {
    static char held[512];
    (void)w;
    if (getpid() == 1 && held_unsavable(held, sizeof held)) {
        about = held;
        return EBUSY;
    }
    return dial_away();
}

/* The folder is made, as are those above it. */
static int mount_made(const char *source, const char *where, const char *type, unsigned long flags, const char *data) {
    char path[PATH_MAX];
    if (*where != '/' || strlen(where) >= sizeof path)
        return EINVAL;
    strcpy(path, where);
    for (char *at = path; (at = strchr(at + 1, '/')); *at = '/') {
        *at = 0;
        mkdir(path, 0755);
    }
    mkdir(path, 0755);
    about = where;
    return mount(source, path, type, MS_NODEV | MS_NOSUID | flags, data) < 0 ? errno : 0;
}

/* Mounts what the host shares. */
static int do_share(char **w) {
    bool nine = !strcmp(w[3], "9p"), readonly = !strcmp(w[4], "ro");
    if ((!nine && strcmp(w[3], "virtiofs")) || (!readonly && strcmp(w[4], "rw")))
        return EINVAL;
    return mount_made(w[1], w[2], w[3], readonly ? MS_RDONLY : 0, nine ? "trans=virtio,version=9p2000.L,msize=262144" : NULL);
}

static int do_tmpfs(char **w) {
    char *end, options[64];
    errno = 0;
    unsigned long long size = strtoull(w[2], &end, 10);
    if (errno || !*w[2] || *end || !size)
        return EINVAL;
    snprintf(options, sizeof options, "mode=1777,size=%llu", size);
    return mount_made("tmpfs", w[1], "tmpfs", 0, options);
}

/* Programs that have files open there keep them until they close them. */
static int do_unshare(char **w) { return umount2(w[1], MNT_DETACH | UMOUNT_NOFOLLOW) < 0 ? errno : 0; }

static const struct {
    const char *name;
    size_t least, most; /* words after the name */
    bool anywhere;      /* harmless where we are not the machine's PID 1 */
    int (*run)(char **words);
} kinds[] = {
    {"module", 1, 64, false, do_module},
    {"wait", 1, 1, true, do_wait},
    {"flush", 1, 1, false, do_flush},
    {"root", 2, 17, false, do_root},
    {"grow", 2, 2, false, do_grow},
    {"share", 4, 4, false, do_share},
    {"unshare", 1, 1, false, do_unshare},
    {"tmpfs", 2, 2, false, do_tmpfs},
    {"hostname", 1, 1, false, do_hostname},
    {"machine-id", 1, 1, false, do_machine_id},
    {"clock", 1, 1, false, do_clock},
    {"seed", 1, 1, false, do_seed},
    {"address", 3, 4, false, do_address},
    {"route", 4, 4, false, do_route},
    {"mac", 2, 2, false, do_mac},
    {"dns", 1, 16, false, do_dns},
    {"cpus", 1, 1, false, do_cpus},
    {"env", 1, 256, true, do_env},
    {"warm", 1, 1024, true, do_warm},
    {"hooks", 0, 0, false, do_hooks},
    {"sync", 0, 0, true, do_sync},
    {"rest", 1, 1, false, do_rest},
    {"rested", 0, 0, false, do_rested},
    {"away", 0, 0, true, do_away},
};
enum { KINDS = sizeof kinds / sizeof *kinds };

bool steps_decode(const void *data, size_t size, struct steps *out) {
    struct reader r = reader_of(data, size);
    uint32_t count = read_u32(&r);
    out->count = 0;
    if (count > STEPS_MAX)
        return false;
    while (!r.bad && out->count < count) {
        char **words = read_strings(&r);
        if (!words)
            return false;
        out->list[out->count++] = words;
        if (!words[0])
            return false;
    }
    return reader_done(&r);
}

void steps_free(struct steps *s) {
    while (s->count > 0)
        free_strings(s->list[--s->count]);
}

static size_t kind_of(char **words) {
    size_t given = 0, i = 0;
    while (words[given + 1])
        given++;
    while (i < KINDS && strcmp(kinds[i].name, words[0]) != 0)
        i++;
    return i < KINDS && given >= kinds[i].least && given <= kinds[i].most ? i : KINDS;
}

size_t steps_check(const struct steps *s) {
    for (size_t i = 0; i < s->count; i++)
        if (kind_of(s->list[i]) == KINDS)
            return i + 1;
    return 0;
}

static void fail(uint32_t stream, const struct steps *s, size_t number, int error) {
    char words[256] = "";
    size_t used = 0;
    for (char **w = s->list[number - 1]; *w && used < sizeof words; w++)
        used += (size_t)snprintf(words + used, sizeof words - used, "%s%s", used ? " " : "", *w);
    char text[512];
    snprintf(text, sizeof text, "step %zu, %s: %s%s%s", number, words, about ? about : "", about ? ": " : "", strerror(error));
    line_error(stream, error, text);
}

void steps_frame(const struct frame *f) {
    struct steps s;
    bool whole = steps_decode(f->payload, f->length, &s);
    size_t wrong = whole ? steps_check(&s) : 0;
    about = NULL;
    int error = 0;
    if (!whole)
        line_error(f->stream, EINVAL, "malformed steps");
    else if (wrong)
        fail(f->stream, &s, wrong, EINVAL);
    for (size_t i = 0; whole && !wrong && !error && i < s.count; i++) {
        size_t kind = kind_of(s.list[i]);
        error = kinds[kind].anywhere || getpid() == 1 ? kinds[kind].run(s.list[i]) : EPERM;
        if (error)
            fail(f->stream, &s, i + 1, error);
    }
    if (whole && !wrong && !error)
        line_send(F_OK, f->stream, NULL, 0);
    steps_free(&s);
}
