#include "target.h"

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include "status.h"

enum { PAGE = 4096 };

/* process_vm_readv(2) stops at a page that cannot be had. It would wait for a page that a userfaultfd serves, but only of a
 * program with CAP_SYS_PTRACE on the host: others' userfaultfds serve no faults but the program's own. */
ssize_t target_read(pid_t pid, uint64_t address, void *out, size_t size) {
    size_t done = 0;
    if (pid <= 0) {
        errno = ESRCH;
        return -1;
    }
    errno = EFAULT;
    while (done < size) {
        size_t n = PAGE - (address + done) % PAGE;
        if (n > size - done)
            n = size - done;
        if (address + done + n < address)
            break;
        struct iovec ours = {(char *)out + done, n}, theirs = {(void *)(uintptr_t)(address + done), n};
        ssize_t got = process_vm_readv(pid, &ours, 1, &theirs, 1, 0);
        if (got <= 0)
            break;
        done += (size_t)got;
    }
    return size && !done ? -1 : (ssize_t)done;
}

ssize_t target_string(pid_t pid, uint64_t address, char *out, size_t size) {
    for (size_t done = 0; done < size;) {
        size_t n = PAGE - (address + done) % PAGE;
        if (n > size - done)
            n = size - done;
        ssize_t got = target_read(pid, address + done, out + done, n);
        if (got <= 0)
            return -1;
        char *end = memchr(out + done, 0, (size_t)got);
        if (end)
            return end - out;
        done += (size_t)got;
    }
    errno = ENAMETOOLONG;
    return -1;
}

int target_memory(pid_t pid) {
    char place[32];
    snprintf(place, sizeof place, "/proc/%d/mem", (int)pid);
    return open(place, O_RDWR | O_CLOEXEC);
}

int target_write(int memory, uint64_t address, const void *data, size_t size) {
    ssize_t n = address <= INT64_MAX ? pwrite(memory, data, size, (off_t)address) : (errno = EFAULT, -1);
    if (n == (ssize_t)size)
        return 0;
    if (n >= 0 || errno == EIO)
        errno = EFAULT;
    return -1;
}

/* A link of /proc/PID as a path below the program's own root. */
static bool link_of(pid_t pid, const char *name, char *out) {
    char place[64], root[RULES_PATH];
    snprintf(place, sizeof place, "/proc/%d/%s", (int)pid, name);
    ssize_t n = readlink(place, out, RULES_PATH - 1);
    if (n <= 0)
        return false;
    out[n] = 0;
    snprintf(place, sizeof place, "/proc/%d/root", (int)pid);
    ssize_t r = out[0] == '/' ? readlink(place, root, sizeof root) : 0;
    if (r > 1 && r <= n && !memcmp(root, out, (size_t)r) && (out[r] == '/' || !out[r])) {
        memmove(out, out + r, (size_t)(n - r) + 1);
        if (!*out)
            strcpy(out, "/");
    }
    return true;
}

static bool descriptor_of(pid_t pid, int fd, char *out) {
    char name[24];
    snprintf(name, sizeof name, fd == AT_FDCWD ? "cwd" : "fd/%d", fd);
    return (fd >= 0 || fd == AT_FDCWD) && link_of(pid, name, out);
}

const char *target_path(void *context, const struct seccomp_data *call, const struct rule *rule) {
    struct target *t = context;
    const struct rule *k = t->known;
    if (k && k->path_arg == rule->path_arg && k->dir_arg == rule->dir_arg && k->path_is_fd == rule->path_is_fd)
        return t->path;
    t->known = NULL;
    if (t->pid <= 0)
        return NULL;
    if (rule->path_is_fd) {
        if (!descriptor_of(t->pid, (int)call->args[rule->path_arg], t->path))
            return NULL;
    } else {
        if (target_string(t->pid, call->args[rule->path_arg], t->text, sizeof t->text) < 0)
            return NULL;
        int dir = rule->dir_arg >= 0 ? rule->dir_arg : rules_dir_argument(call->nr, rule->path_arg);
        if (t->text[0] != '/' && !descriptor_of(t->pid, dir < 0 ? AT_FDCWD : (int)call->args[dir], t->base))
            return NULL;
        if (!t->text[0])
            memcpy(t->path, t->base, sizeof t->path);
        else if (!rules_absolute(t->base, t->text, t->path))
            return NULL;
    }
    t->known = rule;
    return t->path;
}

int target_pidfd(pid_t pid) {
    int group = pid > 0 ? status_number(pid, "Tgid") : -1;
    return group < 0 ? -1 : (int)syscall(SYS_pidfd_open, group, 0);
}
