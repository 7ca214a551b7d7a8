/* What the answerer does on a held program's behalf: as whom, where, and that what hangs holds up nobody. */
#include "answering.h"

#include <sched.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/sysmacros.h>

#include "behalf_make.h"

static char folder[64], place[128];

static uint32_t requests;

static const char *at(const char *name) {
    snprintf(place, sizeof place, "%s/%s", folder, name);
    return place;
}

static void begin_request(struct writer *w, char what, const struct seccomp_notif *call) {
    *w = (struct writer){0};
    write_u8(w, (uint8_t)what);
    write_u32(w, ++requests);
    write_u64(w, call->id);
    write_u32(w, call->pid);
}

static void send_request(int sock, struct writer *w) {
    CHECK(send(sock, w->data, w->used, 0) == (ssize_t)w->used);
    writer_free(w);
}

static void ask_open(int sock, const struct seccomp_notif *call, int dirfd, uint64_t flags, uint64_t mode, const char *path) {
    struct writer w;
    begin_request(&w, 'P', call);
    write_u32(&w, (uint32_t)dirfd);
    write_u64(&w, flags);
    write_u64(&w, mode);
    write_u64(&w, 0);
    write_string(&w, path);
    send_request(sock, &w);
}

/* The reply to the last request: a descriptor, 0, or minus the errno. */
static int reply(int sock) {
    uint8_t b[16];
    int fd;
    uint32_t request;
    int32_t error;
    do {
        CHECK(hear(sock, b, sizeof b, &fd) == 9 && b[0] == 'R');
        memcpy(&request, b + 1, 4);
        memcpy(&error, b + 5, 4);
        /* What is killed with its program may have replied before. */
    } while (request < requests && error == EINTR);
    CHECK(request == requests);
    return error ? -error : fd < 0 ? 0 : fd;
}

static int open_for(int sock, const struct seccomp_notif *call, int dirfd, uint64_t flags, uint64_t mode, const char *path) {
    ask_open(sock, call, dirfd, flags, mode, path);
    return reply(sock);
}

static int node_for(int sock, const struct seccomp_notif *call, uint32_t mode, uint64_t dev, const char *path) {
    struct writer w;
    begin_request(&w, 'N', call);
    write_u32(&w, (uint32_t)AT_FDCWD);
    write_u32(&w, mode);
    write_u64(&w, dev);
    write_string(&w, path);
    send_request(sock, &w);
    return reply(sock);
}

static int mount_for(int sock, const struct seccomp_notif *call, uint64_t flags, const char *source, const char *target, const char *type) {
    struct writer w;
    begin_request(&w, 'M', call);
    write_u64(&w, flags);
    write_string(&w, source);
    write_string(&w, target);
    write_string(&w, type);
    write_string(&w, "");
    send_request(sock, &w);
    return reply(sock);
}

static const int HELD[] = {SYS_getppid, 0};
static char operations[256];

/* An owner of a program that waits in getppid; *call is that. */
static int own(int (*run)(void), pid_t *pid, int *sock, struct seccomp_notif *call) {
    int page = memfd_create("ids", MFD_CLOEXEC);
    CHECK(page >= 0 && ftruncate(page, 4096) == 0);
    new_token();
    snprintf(operations, sizeof operations, "token %s\nhandler %d", token, SYS_getppid);
    *pid = program(operations, HELD, run);
    int listener = attach(token, page, sock);
    close(page);
    CHECK(listener >= 0 && receive(listener, call));
    return listener;
}

static int done(int listener, int sock, const struct seccomp_notif *call, pid_t pid) {
    respond(listener, call->id, 0, 0);
    close(listener);
    close(sock);
    CHECK(ends_within(pid, 5));
    return result_of(pid);
}

static long wait_here(void) { return syscall(SYS_getppid); }

/* -- opens ------------------------------------------------------------------------------------- */

/* In a folder of its own, with an own mask, as somebody else if that can be. */
static int be_in_folder(void) {
    CHECK(chdir(folder) == 0);
    umask(027);
    CHECK(dup2(open("sub", O_PATH | O_DIRECTORY), 50) == 50);
    if (geteuid() == 0)
        CHECK(setresgid(1234, 1234, 1234) == 0 && setresuid(1234, 1234, 1234) == 0 && prctl(PR_SET_DUMPABLE, 1) == 0);
    return (int)wait_here();
}

static bool same_file(int fd, const char *path) {
    struct stat a, b;
    return fd > 0 && fstat(fd, &a) == 0 && lstat(path, &b) == 0 && a.st_ino == b.st_ino && a.st_dev == b.st_dev;
}

static void opens(void) {
    struct seccomp_notif call;
    struct stat st;
    pid_t pid;
    int sock, fd, listener = own(be_in_folder, &pid, &sock, &call);
    fd = open_for(sock, &call, AT_FDCWD, O_RDWR | O_CREAT, 0666, "made");
    CHECK(same_file(fd, at("made")) && fstat(fd, &st) == 0 && (st.st_mode & 07777) == 0640);
    if (geteuid() == 0)
        CHECK(st.st_uid == 1234 && st.st_gid == 1234);
    CHECK(same_file(open_for(sock, &call, AT_FDCWD, O_RDONLY, 0777, "link"), at("made")));
    CHECK(open_for(sock, &call, AT_FDCWD, O_RDONLY | O_NOFOLLOW, 0, "link") == -ELOOP);
    CHECK(same_file(open_for(sock, &call, 50, O_RDONLY, 0, "inner"), at("sub/inner")));
    CHECK(open_for(sock, &call, 51, O_RDONLY, 0, "inner") == -EBADF && open_for(sock, &call, -5, O_RDONLY, 0, "inner") == -EBADF);
    CHECK(open_for(sock, &call, 51, O_RDONLY, 0, "/") > 0);
    CHECK(open_for(sock, &call, AT_FDCWD, O_RDWR | O_CREAT | O_EXCL, 0666, "made") == -EEXIST);
    CHECK(open_for(sock, &call, AT_FDCWD, O_RDONLY, 0, "") == -ENOENT);
    CHECK(open_for(sock, &call, AT_FDCWD, O_PATH, 0, "sub") > 0);
    if (geteuid() == 0)
        CHECK(open_for(sock, &call, AT_FDCWD, O_RDONLY, 0, at("secret")) == -EACCES && open_for(sock, &call, AT_FDCWD, O_WRONLY, 0, "/etc/passwd") == -EACCES);
    /* Its /proc/self and not that of whoever opens; no descriptor of whoever opens. */
    char text[4096] = {0}, line[32];
    fd = open_for(sock, &call, AT_FDCWD, O_RDONLY, 0, "/proc/self/status");
    CHECK(fd > 0 && read(fd, text, sizeof text - 1) > 0);
    snprintf(line, sizeof line, "\nPid:\t%d\n", (int)pid);
    CHECK(strstr(text, line));
    CHECK(same_file(open_for(sock, &call, AT_FDCWD, O_RDONLY, 0, "/proc/self/fd/50"), at("sub")));
    CHECK(same_file(open_for(sock, &call, AT_FDCWD, O_RDONLY, 0, "/dev/fd/50"), at("sub")));
    CHECK(open_for(sock, &call, AT_FDCWD, O_RDONLY, 0, "self/status") == -ELOOP); /* a link to /proc/self */
    CHECK(open_for(sock, &call, AT_FDCWD, O_RDONLY, 0, "self/root") == -ELOOP);
    CHECK(open_for(sock, &call, AT_FDCWD, O_RDWR, 0, "self/mem") < 0);
    CHECK(done(listener, sock, &call, pid) == 0);
}

/* -- what hangs -------------------------------------------------------------------------------- */

static int wait_on(void) { return (int)wait_here(); }

static int jobs_of_answerer(void) {
    char text[4096] = {0}, name[64];
    int n = 0;
    snprintf(name, sizeof name, "/proc/%d/task/%d/children", (int)answerer, (int)answerer);
    FILE *f = fopen(name, "r");
    if (!f)
        return -1;
    if (fgets(text, sizeof text, f))
        for (char *c = text; *c; c++)
            n += *c == ' ';
    fclose(f);
    return n;
}

static void hanging(void) {
    struct seccomp_notif call, other_call;
    pid_t pid;
    int sock, listener = own(wait_on, &pid, &sock, &call);
    for (int i = 0; i < 64; i++)
        ask_open(sock, &call, AT_FDCWD, O_RDONLY, 0, at("fifo"));
    CHECK(open_for(sock, &call, AT_FDCWD, O_RDONLY, 0, "/") == -EAGAIN); /* no more at once */
    CHECK(jobs_of_answerer() == 64 || jobs_of_answerer() == -1);
    /* Others are answered meanwhile. */
    snprintf(operations, sizeof operations, "rule 1 %d return=0", SYS_getppid);
    double begun = seconds();
    CHECK(result_of(program(operations, HELD, wait_on)) == 0 && seconds() - begun < 2);
    /* The program dies: so do those who waited for it. */
    kill(pid, SIGKILL);
    CHECK(result_of(pid) == -SIGKILL);
    double until = seconds() + 5;
    while (jobs_of_answerer() > 0 && seconds() < until)
        usleep(10000);
    CHECK(jobs_of_answerer() <= 0);
    close(listener);
    close(sock);
    listener = own(wait_on, &pid, &sock, &other_call);
    CHECK(open_for(sock, &call, AT_FDCWD, O_RDONLY, 0, "/") == -EINTR); /* the dead one's */
    CHECK(open_for(sock, &other_call, AT_FDCWD, O_RDONLY | O_NONBLOCK, 0, at("fifo")) > 0);
    ask_open(sock, &other_call, AT_FDCWD, O_RDONLY, 0, at("fifo"));
    int other_end = open(at("fifo"), O_WRONLY);
    CHECK(other_end >= 0 && reply(sock) > 0);
    /* The owner goes while it waits. */
    close(other_end);
    ask_open(sock, &other_call, AT_FDCWD, O_WRONLY, 0, at("fifo2"));
    close(sock);
    close(listener);
    CHECK(ends_within(pid, 3) && result_of(pid) == 255); /* refused: -1 */
}

/* -- mounts and nodes, in namespaces of the program's own -------------------------------------- */

static bool write_text(const char *path, const char *text) {
    int fd = open(path, O_WRONLY);
    bool good = fd >= 0 && write(fd, text, strlen(text)) == (ssize_t)strlen(text);
    if (fd >= 0)
        close(fd);
    return good;
}

static int be_apart(void) {
    char users[32], groups[32];
    snprintf(users, sizeof users, "0 %u 1", geteuid());
    snprintf(groups, sizeof groups, "0 %u 1", getegid());
    if (unshare(CLONE_NEWUSER | CLONE_NEWNS) < 0)
        return 4;
    write_text("/proc/self/setgroups", "deny");
    if (!write_text("/proc/self/uid_map", users) || !write_text("/proc/self/gid_map", groups))
        return 4;
    if (mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL) < 0 || chdir(folder) < 0 || mount("x", "sub", "tmpfs", 0, "mode=755") < 0 || chdir("sub") < 0)
        return 4;
    if (wait_here() != 3)
        return 4;
    struct stat st;
    CHECK(stat("null", &st) == 0 && S_ISCHR(st.st_mode) && st.st_rdev == makedev(1, 3) && write_text("null", "x"));
    CHECK(stat("pipe", &st) == 0 && S_ISFIFO(st.st_mode) && stat("white", &st) == 0 && S_ISCHR(st.st_mode) && st.st_rdev == 0);
    return 3;
}

static void apart(void) {
    struct seccomp_notif call;
    pid_t pid;
    int sock, page = memfd_create("ids", MFD_CLOEXEC);
    CHECK(ftruncate(page, 4096) == 0);
    new_token();
    snprintf(operations, sizeof operations, "token %s\nhandler %d", token, SYS_getppid);
    pid = program(operations, HELD, be_apart);
    int listener = attach(token, page, &sock);
    struct pollfd p = {.fd = listener, .events = POLLIN};
    if (poll(&p, 1, 5000) != 1 || !(p.revents & POLLIN)) {
        puts("test_behalf: mounts and nodes skipped: no user namespace can be had here");
        result_of(pid);
        close(listener);
        close(sock);
        return;
    }
    CHECK(receive(listener, &call));
    CHECK(node_for(sock, &call, S_IFCHR | 0666, makedev(1, 3), "null") == 0);
    CHECK(node_for(sock, &call, S_IFCHR | 0666, makedev(1, 3), "null") == -EEXIST);
    CHECK(node_for(sock, &call, S_IFIFO | 0600, 0, "pipe") == 0 && node_for(sock, &call, S_IFCHR, 0, "white") == 0);
    CHECK(node_for(sock, &call, S_IFREG | 0600, 0, "file") == 0);
    CHECK(node_for(sock, &call, S_IFBLK | 0600, makedev(8, 0), "disk") == -EPERM && node_for(sock, &call, S_IFCHR | 0600, makedev(1, 1), "mem") == -EPERM);
    CHECK(node_for(sock, &call, S_IFDIR | 0700, 0, "ram") == -EPERM);
    CHECK(mount_for(sock, &call, 0, "x", "nowhere", "tmpfs") == -ENOENT);
    CHECK(mount_for(sock, &call, 0, "/dev/vda", "/mnt", "ext4") < 0 && mount_for(sock, &call, 0, "x", "/mnt", "no such") == -ENODEV);
    CHECK(mount_for(sock, &call, MS_MOVE, "/proc", "/mnt", "") == -EPERM && mount_for(sock, &call, MS_REMOUNT, "x", "/", "") == -EPERM);
    /* Its own mount namespace, and the folder that it made there. */
    CHECK(open_for(sock, &call, AT_FDCWD, O_RDONLY | O_CREAT, 0600, "ram") > 0);
    CHECK(mount_for(sock, &call, MS_BIND, "/etc", "ram", "") == -ENOTDIR);
    CHECK(mount_for(sock, &call, MS_BIND, "file", "ram", "") == 0 && mount_for(sock, &call, MS_BIND | MS_REMOUNT | MS_RDONLY, "", "ram", "") == 0);
    CHECK(open_for(sock, &call, AT_FDCWD, O_WRONLY, 0, "ram") == -EROFS);
    CHECK(mount_for(sock, &call, MS_BIND | MS_REMOUNT, "", "ram", "") == 0 && open_for(sock, &call, AT_FDCWD, O_WRONLY, 0, "ram") == -EROFS);
    respond(listener, call.id, 3, 0);
    close(listener);
    close(sock);
    close(page);
    CHECK(result_of(pid) == 3);
}

static void words(void) {
    static const struct { const char *path, *is; int own; } cases[] = {
        {"/proc/self", "/proc/7", 0}, {"/proc/self/fd/3", "/proc/7/fd/3", 1}, {"/proc/self/fd/3/x", "/proc/7/fd/3/x", 0},
        {"/proc/selfish", "/proc/selfish", 0}, {"/proc/thread-self/stat", "/proc/7/task/8/stat", 0}, {"/dev/fd/12", "/proc/7/fd/12", 1},
        {"/dev/fd", "/proc/7/fd", 0}, {"/dev/stdin", "/proc/7/fd/0", 1}, {"/dev/stderr", "/proc/7/fd/2", 1}, {"/dev/stdin2", "/dev/stdin2", 0},
        {"x", "x", 0}, {"", "", 0}, {"/proc/self/fd/", "/proc/7/fd/", 0}, {"/proc/self/root", "/proc/7/root", 0},
        {"/proc/mounts", "/proc/7/mounts", 0}, {"/proc/net/dev", "/proc/7/net/dev", 0}, {"/proc/network", "/proc/network", 0},
    };
    char out[MAKE_WORDS];
    int own_fd;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        make_words(cases[i].path, 7, 8, out, &own_fd);
        CHECK(!strcmp(out, cases[i].is) && own_fd == cases[i].own);
    }
}

static void make_folder(void) {
    strcpy(folder, "/tmp/tvinit-behalf-XXXXXX");
    CHECK(mkdtemp(folder) && chmod(folder, 0777) == 0);
    CHECK(mkdir(at("sub"), 0755) == 0 && mkfifo(at("fifo"), 0666) == 0 && mkfifo(at("fifo2"), 0666) == 0);
    CHECK(close(open(at("sub/inner"), O_CREAT | O_WRONLY, 0644)) == 0 && close(open(at("secret"), O_CREAT | O_WRONLY, 0600)) == 0);
    CHECK(symlink("made", at("link")) == 0 && symlink("/proc/self", at("self")) == 0);
}

static void remove_folder(void) {
    static const char *const files[] = {"made", "link", "self", "fifo", "fifo2", "secret", "sub/inner"};
    for (size_t i = 0; i < sizeof files / sizeof *files; i++)
        unlink(at(files[i]));
    CHECK(rmdir(at("sub")) == 0 && rmdir(folder) == 0);
}

int main(void) {
    words();
    if (!able()) {
        puts("test_behalf: skipped: no seccomp listener can be had here");
        return 0;
    }
    make_folder();
    begin(true);
    opens();
    hanging();
    apart();
    end();
    remove_folder();
    puts("test_behalf: ok");
    return 0;
}
