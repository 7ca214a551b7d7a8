/* Tries one thing against the policy that it runs under, and prints a line of what came of it.
 *
 *   calls NAME [ARGUMENT...]
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

enum { FLIPS = 100, PAGES = 64, CALLS = 100, CHILDREN = 60 };

static void say(const char *what, long result) {
    printf("%s %s\n", what, result < 0 ? strerrorname_np(errno) : "done");
    fflush(stdout);
}

/* ---- what is opened ---- */

static void show(int fd, const char *name) {
    char text[65536];
    ssize_t n = fd < 0 ? -1 : read(fd, text, sizeof text - 1);
    printf("== %s %s\n%.*s", name, n < 0 ? strerrorname_np(errno) : "", n > 0 ? (int)n : 0, text);
    if (fd >= 0)
        close(fd);
}

/* Each file, opened by a call that may be answered: from a folder, below a root of its own with `-r FOLDER`. */
static int see(char **paths) {
    if (*paths && !strcmp(*paths, "-r")) {
        if (chroot(paths[1]) < 0 || chdir("/") < 0)
            return 1;
        paths += 2;
    }
    int fifth = open("/etc/hostname", O_RDONLY);
    if (dup2(fifth, 5) < 0)
        perror("dup2");
    for (; *paths; paths++)
        show(open(*paths, O_RDONLY | O_NONBLOCK), *paths);
    return 0;
}

/* The path in our memory changes all the time; what is opened must be what was looked at. */
static char flickering[] = "/tmp/race/good";
static atomic_bool over;

static void *flicker(void *unused) {
    (void)unused;
    while (!atomic_load(&over)) {
        memcpy(flickering + 10, "evil", 4);
        memcpy(flickering + 10, "good", 4);
    }
    return NULL;
}

static int flip(void) {
    pthread_t thread;
    int seen[2] = {0};
    char text[8];
    if (pthread_create(&thread, NULL, flicker, NULL))
        return 1;
    for (int i = 0; i < FLIPS; i++) {
        int fd = open(flickering, O_RDONLY);
        if (fd >= 0 && read(fd, text, 4) == 4)
            seen[!memcmp(text, "evil", 4)]++;
        if (fd >= 0)
            close(fd);
    }
    atomic_store(&over, true);
    pthread_join(thread, NULL);
    printf("good %s evil %d\n", seen[0] ? "some" : "none", seen[1]);
    return 0;
}

/* ---- mounts ---- */

static void kind(const char *path) {
    struct stat st;
    printf("%s %s\n", path, stat(path, &st) < 0 ? strerrorname_np(errno) : S_ISCHR(st.st_mode) ? "masked" : S_ISDIR(st.st_mode) ? "folder" : "there");
}

static int mounts(void) {
    const char *p = "/tmp/bound";
    mkdir(p, 0755);
    say("bind", mount("/proc", p, NULL, MS_BIND, NULL));
    kind("/tmp/bound/kcore");
    kind("/tmp/bound/timer_list");
    int fd = open("/tmp/bound/sys/kernel/printk", O_WRONLY);
    say("write", fd);
    say("remount", mount(NULL, "/proc/sys", NULL, MS_REMOUNT, NULL));
    mount(NULL, "/proc/sys", NULL, MS_REMOUNT | MS_BIND, NULL);
    say("writable", access("/proc/sys", W_OK));
    say("move", mount("/proc/sys", p, NULL, MS_MOVE, NULL));
    mkdir("/tmp/new", 0755);
    static const char *const types[] = {"proc", "sysfs", "cgroup2", "mqueue", "ext4", "9p"};
    for (size_t i = 0; i < sizeof types / sizeof *types; i++)
        say(types[i], mount("none", "/tmp/new", types[i], 0, NULL));
    return 0;
}

/* ---- torn writes ---- */

static int torn(void) {
    struct stat st;
    char line[32] = "";
    int fd = open("/proc/self/oom_score_adj", O_RDWR);
    (void)!write(fd, "-1000", 5);
    (void)!pread(fd, line, sizeof line - 1, 0);
    printf("oom %d\n", atoi(line));
    int memory = memfd_create("torn", 0);
    for (int i = 0; i < PAGES; i++)
        (void)!pwrite(memory, "12345", 5, (off_t)i << 20);
    fstat(memory, &st);
    printf("memory %lld\n", (long long)st.st_blocks);
    int program = open("/tmp/program", O_RDWR | O_CREAT | O_TRUNC, 0755);
    fchmod(program, 06755);
    if (setresuid(-1, 1000, -1) < 0)
        perror("setresuid");
    (void)!write(program, "12345", 5);
    fstat(program, &st);
    printf("program %o %lld\n", (unsigned)st.st_mode & 07777, (long long)st.st_size);
    (void)!pwrite(program, "12345", 5, INT64_MAX - 2);
    (void)!pwrite(program, "12345", 5, (off_t)1 << 40);
    syscall(SYS_pwrite64, program, 8, 5, 0);
    syscall(SYS_pwrite64, program, "12345", -1, 0);
    return 0;
}

/* ---- ways around a filter that refuses getppid and time ---- */

static int listener_of_ours(void) {
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_getppid, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_USER_NOTIF),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog filter = {sizeof code / sizeof *code, code};
    return (int)syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_NEW_LISTENER, &filter);
}

static void *go_on(void *fd) {
    struct seccomp_notif call;
    for (;;) {
        memset(&call, 0, sizeof call);
        if (ioctl((int)(intptr_t)fd, SECCOMP_IOCTL_NOTIF_RECV, &call) < 0)
            return NULL;
        struct seccomp_notif_resp answer = {.id = call.id, .flags = SECCOMP_USER_NOTIF_FLAG_CONTINUE};
        ioctl((int)(intptr_t)fd, SECCOMP_IOCTL_NOTIF_SEND, &answer);
    }
}

static long plain(void) { return syscall(SYS_getppid); }

static long own_listener(void) {
    pthread_t thread;
    int fd = listener_of_ours();
    if (fd < 0)
        return -1;
    pthread_create(&thread, NULL, go_on, (void *)(intptr_t)fd);
    return syscall(SYS_getppid);
}

static long uring(void) { return syscall(SYS_io_uring_setup, 1, NULL); }

#ifdef __x86_64__
static long x32(void) { return syscall(0x40000000 | SYS_getppid); }
static long compat(void) {
    long r;
    __asm__ volatile("int $0x80" : "=a"(r) : "0"(64L) : "memory", "r8", "r9", "r10", "r11");
    return r < 0 ? (errno = (int)-r, -1) : r;
}
static long vsyscall(void) {
    long (*now)(long *) = (long (*)(long *))0xffffffffff600400;
    long r = now(NULL);
    return r < 0 ? (errno = (int)-r, -1) : r;
}
#endif

static const struct way { const char *name; long (*run)(void); } WAYS[] = {
    {"plain", plain}, {"listener", own_listener}, {"uring", uring},
#ifdef __x86_64__
    {"x32", x32}, {"compat", compat}, {"vsyscall", vsyscall},
#endif
};

static int around(void) {
    for (size_t i = 0; i < sizeof WAYS / sizeof *WAYS; i++) {
        int status;
        pid_t pid = fork();
        if (pid == 0) {
            errno = 0;
            long r = WAYS[i].run();
            say(WAYS[i].name, r);
            _exit(0);
        }
        waitpid(pid, &status, 0);
        if (WIFSIGNALED(status))
            printf("%s killed\n", WAYS[i].name);
        fflush(stdout);
    }
    char copy[65536];
    int self = open("/proc/self/exe", O_RDONLY), made = memfd_create("copy", MFD_CLOEXEC);
    for (ssize_t n; (n = read(self, copy, sizeof copy)) > 0;)
        (void)!write(made, copy, (size_t)n);
    char *argv[] = {"calls", "plain", NULL}, *env[] = {NULL};
    syscall(SYS_execveat, made, "", argv, env, 0x1000);
    say("execveat", -1);
    return 1;
}

/* A traced call that a listener of ours takes before the tracer is asked. */
static int hide(void) { say("hidden", own_listener()); return 0; }

/* ---- what is held, and what its pointers are ---- */

static void *open_badly(void *unused) {
    static const uintptr_t places[] = {0, 1, 4096, 0x7ffffffff000, 0xffffffffff600000, UINTPTR_MAX - 1, UINTPTR_MAX / 2};
    for (int i = 0; i < CALLS; i++)
        syscall(SYS_openat, AT_FDCWD, places[(size_t)i % (sizeof places / sizeof *places)], O_RDONLY, 0);
    return unused;
}

/* A path on a page whose file shrinks, at the end of a page behind which is nothing, and one that has no end. */
static void mapped(void) {
    char *two = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    munmap(two + 4096, 4096);
    memset(two, 'x', 4096);
    say("no end", open(two, O_RDONLY));
    int file = open("/tmp/shrinks", O_RDWR | O_CREAT | O_TRUNC, 0600);
    (void)!ftruncate(file, 4096);
    char *page = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    (void)!ftruncate(file, 0);
    say("shrunk", open(page, O_RDONLY));
    char *long_one = malloc(1 << 20);
    memset(long_one, '/', 1 << 20);
    say("long", open(long_one, O_RDONLY));
}

static int harm(void) {
    pthread_t threads[8];
    mapped();
    for (int i = 0; i < 8; i++)
        pthread_create(&threads[i], NULL, open_badly, NULL);
    for (int i = 0; i < 8; i++)
        pthread_join(threads[i], NULL);
    /* Killed while their calls are held, and their numbers given to others. */
    for (int i = 0; i < CHILDREN; i++) {
        pid_t pid = fork();
        if (pid == 0) {
            open("/tmp/held", O_RDONLY);
            _exit(0);
        }
        usleep(200 * (i % 8));
        kill(pid, SIGKILL);
        waitpid(pid, NULL, 0);
    }
    say("lives", 0);
    return 0;
}

/* Calls that a rule answers, and calls that are carried out on our behalf. */
static int many(void) {
    int failed = 0, opened = 0;
    for (int i = 0; i < PAGES * 4; i++) {
        int fd = open("/ruled/x", O_RDONLY);
        failed += fd < 0 && errno == ENODATA;
        opened += (fd = open("/etc/hostname", O_RDONLY)) >= 0;
        close(fd);
    }
    printf("%d %d\n", failed, opened);
    return 0;
}

/* Programs that die while their calls are put off for long. */
static int put_off(void) {
    for (int i = 0; i < PAGES * 4; i++) {
        pid_t pid = fork();
        if (pid == 0) {
            syscall(SYS_getppid);
            _exit(0);
        }
        usleep(1000);
        syscall(SYS_getpgrp); /* answered after what was asked before it, however late that is heard */
        kill(pid, SIGKILL);
        waitpid(pid, NULL, 0);
    }
    return 0;
}

/* ---- what there is of the host ---- */

/* The memory and words of every process that lets us look. */
static int look(char **words) {
    static char buffer[1 << 20];
    int looked = 0, found = 0;
    for (int pid = 1; pid < 1000; pid++) {
        char path[64], line[256];
        snprintf(path, sizeof path, "/proc/%d/maps", pid);
        FILE *maps = pid == getpid() ? NULL : fopen(path, "r");
        snprintf(path, sizeof path, "/proc/%d/mem", pid);
        int mem = maps ? open(path, O_RDONLY) : -1;
        while (maps && fgets(line, sizeof line, maps)) {
            unsigned long from, to;
            if (mem < 0 || sscanf(line, "%lx-%lx r", &from, &to) != 2)
                continue;
            for (; from < to; from += sizeof buffer) {
                ssize_t n = pread(mem, buffer, to - from < sizeof buffer ? to - from : sizeof buffer, (off_t)from);
                looked += n > 0;
                for (char **w = words; n > 0 && *w; w++) {
                    char *at = memmem(buffer, (size_t)n, *w, strlen(*w));
                    if (at && ++found)
                        printf("found %.200s in process %d at %s", at, pid, line);
                }
            }
        }
        if (maps)
            fclose(maps);
        if (mem >= 0)
            close(mem);
    }
    printf("%s, %d\n", looked ? "looked" : "nothing to see", found);
    return 0;
}

int main(int argc, char **argv) {
    const char *name = argc > 1 ? argv[1] : "";
    if (!strcmp(name, "see"))
        return see(argv + 2);
    if (!strcmp(name, "flip"))
        return flip();
    if (!strcmp(name, "mounts"))
        return mounts();
    if (!strcmp(name, "torn"))
        return torn();
    if (!strcmp(name, "around"))
        return around();
    if (!strcmp(name, "plain"))
        return say("execveat", plain()), 0;
    if (!strcmp(name, "hide"))
        return hide();
    if (!strcmp(name, "harm"))
        return harm();
    if (!strcmp(name, "many"))
        return many();
    if (!strcmp(name, "delayed"))
        return put_off();
    if (!strcmp(name, "look"))
        return look(argv + 2);
    return 2;
}
