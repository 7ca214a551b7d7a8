#include "landlock.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { LL_VERSION = 1, LL_PATH_BENEATH = 1 };

struct ll_path { uint64_t allowed; int32_t parent; } __attribute__((packed));

static const uint64_t READ = LL_READ_FILE | LL_READ_DIR;
static const uint64_t WRITE = LL_WRITE_FILE | LL_REMOVE_FILE | LL_REMOVE_DIR | LL_MAKE_DIR | LL_MAKE_REG | LL_MAKE_SOCK |
                              LL_MAKE_SYM | LL_MAKE_FIFO | LL_REFER | LL_TRUNCATE | LL_IOCTL_DEV;
static const uint64_t EXECUTE = LL_EXECUTE | LL_READ_FILE;
static const uint64_t OF_FILES = LL_EXECUTE | LL_WRITE_FILE | LL_READ_FILE | LL_TRUNCATE | LL_IOCTL_DEV;

int landlock_abi(void) { return (int)syscall(SYS_landlock_create_ruleset, NULL, 0, LL_VERSION); }

uint64_t landlock_files(int abi) {
    return ((1 << 13) - 1) | (abi >= 2 ? LL_REFER : 0) | (abi >= 3 ? LL_TRUNCATE : 0) | (abi >= 5 ? LL_IOCTL_DEV : 0);
}

int landlock_make(int abi, const struct ll_ruleset *handled) {
    /* A kernel refuses a field that it does not know, even where it is 0 and longer. */
    size_t size = abi >= 6 ? sizeof *handled : abi >= 4 ? 2 * sizeof handled->fs : sizeof handled->fs;
    return (int)syscall(SYS_landlock_create_ruleset, handled, size, 0);
}

int landlock_allow(int ruleset, int fd, uint64_t allowed) {
    struct ll_path rule = {.allowed = allowed, .parent = fd};
    return allowed ? (int)syscall(SYS_landlock_add_rule, ruleset, LL_PATH_BENEATH, &rule, 0) : 0;
}

int landlock_allow_path(int ruleset, const char *path, const char *flags, uint64_t handled) {
    uint64_t allowed = (strchr(flags, 'r') ? READ : 0) | (strchr(flags, 'w') ? WRITE : 0) | (strchr(flags, 'x') ? EXECUTE : 0);
    int fd = open(path, O_PATH | O_CLOEXEC);
    struct stat st;
    if (fd < 0)
        return -1;
    int r = fstat(fd, &st);
    if (r == 0)
        r = landlock_allow(ruleset, fd, allowed & handled & (S_ISDIR(st.st_mode) ? ~UINT64_C(0) : OF_FILES));
    int saved = errno;
    close(fd);
    errno = saved;
    return r;
}

int landlock_enter(int ruleset) { return (int)syscall(SYS_landlock_restrict_self, ruleset, 0); }
