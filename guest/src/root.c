#include "root.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "log.h"
#include "loop.h"
#include "pieces.h"
#include "users.h"

/* fs/ext4/ext4.h: blocks that it is to have. */
#define EXT4_IOC_RESIZE_FS _IOW('f', 16, uint64_t)

enum { MOUNTS_MAX = 512, MOUNTS_TEXT = 1 << 20, GROW_MS = 10000, EXT4_MAGIC = 0xef53 };

const char *root_failed = "root";

static int modules_fd = -1;
/* The upper file system lies outside the root from the switch on; this is the way back to it. */
static int upper_fd = -1;

static int step(const char *what, int result) {
    if (result < 0)
        root_failed = what;
    return result;
}

static void make_folder(const char *path, mode_t mode) {
    if (mkdir(path, mode) == 0)
        chmod(path, mode);
}

/* With less memory than its programs work in, the kernel takes turns at reading each of them anew from the disk, for minutes, before
 * it kills one. Here it may not take what was used in the last second (Documentation/admin-guide/mm/multigen_lru.rst), and kills then. A
 * kernel that has none of this does as it does. */
static void keep_working_set(void) {
    static const char *const settings[][2] = {{"/sys/kernel/mm/lru_gen/min_ttl_ms", "1000"}, {"/sys/kernel/mm/lru_gen/enabled", "y"}};
    for (size_t i = 0; i < sizeof settings / sizeof *settings; i++) {
        int fd = open(settings[i][0], O_WRONLY | O_CLOEXEC);
        if (fd >= 0 && write(fd, settings[i][1], strlen(settings[i][1])) < 0)
            log_line("%s: %m", settings[i][0]);
        if (fd >= 0)
            close(fd);
    }
}

int root_begin(void) {
    make_folder("/proc", 0755);
    make_folder("/sys", 0755);
    make_folder("/dev", 0755);
    modules_fd = open("/modules", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL) < 0 && errno != EBUSY)
        return -1;
    if (mount("sysfs", "/sys", "sysfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL) < 0 && errno != EBUSY)
        return -1;
    /* The kernel may have mounted it by itself. */
    if (mount("devtmpfs", "/dev", "devtmpfs", MS_NOSUID, "mode=0755") < 0 && errno != EBUSY)
        return -1;
    keep_working_set();
    return 0;
}

int module_load(const char *words) {
    char file[128], loaded[128];
    int length = (int)strcspn(words, " ");
    const char *parameters = words[length] ? words + length + 1 : "";
    if (memchr(words, '/', (size_t)length) || snprintf(file, sizeof file, "%.*s.ko", length, words) >= (int)sizeof file)
        return EINVAL;
    /* The kernel would read all of it before it says so. */
    if (snprintf(loaded, sizeof loaded, "/sys/module/%.*s", length, words) < (int)sizeof loaded && access(loaded, F_OK) == 0)
        return 0;
    int fd = modules_fd < 0 ? -1 : openat(modules_fd, file, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return modules_fd < 0 || errno == ENOENT ? 0 : errno;
    int error = syscall(SYS_finit_module, fd, parameters, 0) < 0 ? errno : 0;
    close(fd);
    return error == EEXIST ? 0 : error;
}

void modules_begin(void) {
    char *text = read_text("/modules/order", 65536), *rest = text;
    for (char *name; text && (name = strsep(&rest, "\n"));) {
        int error = *name ? module_load(name) : 0;
        if (error)
            log_line("module %s: %s", name, strerror(error));
    }
    free(text);
}

static int mount_upper(const char *upper) {
    make_folder("/upper", 0755);
    if (!strcmp(upper, "ram"))
        return step("mount tmpfs", mount("upper", "/upper", "tmpfs", MS_NOATIME, "mode=0755"));
    return step("mount ext4", mount(upper, "/upper", "ext4", MS_NOATIME, NULL));
}

static int mount_union(const char *lower, const char *upper, char **offsets) {
    char lowers[256], options[512];
    make_folder("/root.new", 0755);
    if (step("mount squashfs", pieces_mount(lower, offsets, lowers, sizeof lowers)) < 0 || mount_upper(upper) < 0)
        return -1;
    make_folder("/upper/upper", 0755);
    make_folder("/upper/work", 0755);
    upper_fd = open("/upper", O_PATH | O_DIRECTORY | O_CLOEXEC);
    /* redirect_dir: folders of the image can be renamed as on any file system. */
    snprintf(options, sizeof options, "lowerdir=%s,upperdir=/upper/upper,workdir=/upper/work,redirect_dir=on,index=off", lowers);
    return step("mount overlay", mount("overlay", "/root.new", "overlay", 0, options));
}

/* The new root takes the mounts along and covers the initramfs. */
static int enter(void) {
    static const char *const moved[] = {"dev", "proc", "sys"};
    if (step("enter the root", chdir("/root.new")) < 0)
        return -1;
    for (size_t i = 0; i < sizeof moved / sizeof *moved; i++) {
        char from[8];
        snprintf(from, sizeof from, "/%s", moved[i]);
        make_folder(moved[i], 0755);
        if (step("move a mount", mount(from, moved[i], NULL, MS_MOVE, NULL)) < 0)
            return -1;
    }
    if (step("move the root", mount(".", "/", NULL, MS_MOVE, NULL)) < 0 || step("chroot", chroot(".")) < 0)
        return -1;
    return chdir("/");
}

static int furnish(void) {
    static const struct {
        const char *path, *type, *data;
        unsigned long flags;
        mode_t mode;
    } mounts[] = {
        {"/dev/pts", "devpts", "gid=5,mode=620,ptmxmode=666", MS_NOSUID | MS_NOEXEC, 0755},
        {"/dev/shm", "tmpfs", "mode=1777", MS_NOSUID | MS_NODEV, 01777},
        {"/run", "tmpfs", "mode=0755", MS_NOSUID | MS_NODEV, 0755},
    };
    static const char *const links[][2] = {
        {"/proc/self/fd", "/dev/fd"}, {"fd/0", "/dev/stdin"}, {"fd/1", "/dev/stdout"}, {"fd/2", "/dev/stderr"}};
    for (size_t i = 0; i < sizeof mounts / sizeof *mounts; i++) {
        make_folder(mounts[i].path, mounts[i].mode);
        if (step(mounts[i].path, mount(mounts[i].type, mounts[i].path, mounts[i].type, mounts[i].flags, mounts[i].data)) < 0)
            return -1;
    }
    for (size_t i = 0; i < sizeof links / sizeof *links; i++)
        if (symlink(links[i][0], links[i][1]) < 0 && errno != EEXIST)
            return step(links[i][1], -1);
    make_folder("/tmp", 01777);
    return 0;
}

int root_switch(const char *lower, const char *upper, char **offsets) {
    if (upper_fd >= 0)
        return EALREADY;
    if (mount_union(lower, upper, offsets) == 0 && enter() == 0 && furnish() == 0)
        return 0;
    return errno;
}

/* The device is told by an interrupt that it is larger now, which the driver works off when it likes. */
static int await_size(const char *device, unsigned long long size) {
    int fd = open(device, O_RDONLY | O_CLOEXEC | O_NONBLOCK), error = fd < 0 ? errno : 0;
    uint64_t has = 0;
    for (int64_t end = now_ms() + GROW_MS; !error;) {
        if (ioctl(fd, BLKGETSIZE64, &has) < 0)
            error = errno;
        else if (has >= size)
            break;
        else if (now_ms() >= end)
            error = ETIMEDOUT;
        nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
    }
    if (fd >= 0)
        close(fd);
    return error;
}

int root_upper(void) {
    char path[32];
    snprintf(path, sizeof path, "/proc/self/fd/%d", upper_fd);
    int fd = upper_fd < 0 ? -1 : open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    return fd >= 0 ? fd : upper_fd < 0 ? -ENODEV : -errno;
}

int root_grow(const char *upper, unsigned long long size) {
    struct statfs fs;
    int error = upper_fd < 0 ? ENODEV : await_size(upper, size);
    if (error)
        return error;
    int fd = root_upper();
    if (fd < 0)
        return -fd;
    if (fstatfs(fd, &fs) < 0)
        error = errno;
    else if (fs.f_type != EXT4_MAGIC)
        error = ENODEV;
    uint64_t blocks = error ? 0 : size / (uint64_t)fs.f_bsize;
    /* The kernel does nothing where it has as many, and refuses to make it smaller (EINVAL). */
    if (!error && ioctl(fd, EXT4_IOC_RESIZE_FS, &blocks) < 0)
        error = errno;
    close(fd);
    return error;
}

/* Write over a plain file that is there already: a tenth of the work of making one, and after a clone every
 * path through the kernel is taken for the first time. What a crash cuts short here the next start writes again. */
static bool overwrite(const char *path, const char *text) {
    struct stat st;
    size_t size = strlen(text);
    int fd = open(path, O_WRONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
    bool good = fd >= 0 && fstat(fd, &st) == 0 && S_ISREG(st.st_mode) && st.st_nlink == 1 &&
                pwrite(fd, text, size, 0) == (ssize_t)size && (st.st_size <= (off_t)size || ftruncate(fd, (off_t)size) == 0);
    if (fd >= 0)
        close(fd);
    return good;
}

int replace_file(const char *path, const char *text) {
    char aside[128];
    if (overwrite(path, text))
        return 0;
    if (snprintf(aside, sizeof aside, "%s.tvinit", path) >= (int)sizeof aside)
        return ENAMETOOLONG;
    make_folder("/etc", 0755);
    unlink(aside);
    int fd = open(aside, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0644);
    if (fd < 0)
        return errno;
    size_t size = strlen(text);
    bool written = write(fd, text, size) == (ssize_t)size;
    int error = written ? 0 : errno;
    close(fd);
    if (!error && rename(aside, path) < 0)
        error = errno;
    if (error)
        unlink(aside);
    return error;
}

/* mountinfo writes blank, tab, newline and backslash as three octal digits. */
static void unescape(char *s) {
    char *to = s;
    for (; *s; to++) {
        if (s[0] == '\\' && s[1] && s[2] && s[3]) {
            *to = (char)((s[1] - '0') << 6 | (s[2] - '0') << 3 | (s[3] - '0'));
            s += 4;
        } else {
            *to = *s++;
        }
    }
    *to = 0;
}

/* Whatever was mounted later goes first; what the machine itself stands on stays. */
static void unmount_all(void) {
    static const char *const kept[] = {"/", "/proc", "/sys", "/dev"};
    char *text = read_text("/proc/self/mountinfo", MOUNTS_TEXT), *rest = text, *points[MOUNTS_MAX];
    size_t count = 0;
    for (char *line; text && count < MOUNTS_MAX && (line = strsep(&rest, "\n"));) {
        char *field = line;
        for (int i = 0; i < 5 && field; i++)
            points[count] = strsep(&field, " ");
        if (field)
            unescape(points[count++]);
    }
    while (count-- > 0) {
        bool stays = false;
        for (size_t i = 0; i < sizeof kept / sizeof *kept; i++)
            stays |= !strcmp(points[count], kept[i]);
        if (!stays && umount2(points[count], UMOUNT_NOFOLLOW) < 0)
            log_line("unmount %s: %m", points[count]);
    }
    free(text);
}

void root_release(void) {
    sync();
    unmount_all();
    if (mount(NULL, "/", NULL, MS_REMOUNT | MS_RDONLY, NULL) < 0 && upper_fd >= 0)
        log_line("root read-only: %m");
    char path[32];
    snprintf(path, sizeof path, "/proc/self/fd/%d", upper_fd);
    if (upper_fd >= 0 && mount(NULL, path, NULL, MS_REMOUNT | MS_RDONLY, NULL) < 0)
        log_line("upper read-only: %m");
    sync();
}
