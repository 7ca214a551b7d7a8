/* What a machine wrote, listed: pieces of files at their limit, long names, many attributes; and where squashfs may begin in a disk. */
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <sys/xattr.h>
#include <unistd.h>

#include "builtins.h"
#include "check.h"
#include "pieces.h"

/* The stream's size and its last byte; -1 for a listing that fails. */
static long listed(const char *folder, char *last) {
    char data[65536], *argv[] = {"upper", (char *)folder, NULL};
    int pipes[2];
    CHECK(pipe(pipes) == 0);
    pid_t pid = fork();
    CHECK(pid >= 0);
    if (pid == 0) {
        dup2(pipes[1], STDOUT_FILENO);
        close(pipes[0]);
        close(STDERR_FILENO);
        _exit(upper_main(argv) ? 1 : 0);
    }
    close(pipes[1]);
    long size = 0;
    for (ssize_t n; (n = read(pipes[0], data, sizeof data)) > 0; size += n)
        *last = data[n - 1];
    close(pipes[0]);
    int status;
    CHECK(waitpid(pid, &status, 0) == pid && WIFEXITED(status));
    return WEXITSTATUS(status) ? -1 : size;
}

static void fill(void) {
    char name[256], value[3000];
    memset(name, 'n', 255);
    name[255] = 0;
    memset(value, 'v', sizeof value);
    CHECK(mkdir(name, 0700) == 0 && chdir(name) == 0 && mkfifo("pipe", 0600) == 0);
    int fd = open("holes", O_RDWR | O_CREAT, 0600);
    CHECK(fd >= 0);
    for (off_t i = 0; i < 4200; i++)
        CHECK(pwrite(fd, "x", 1, i * 8192) == 1);
    CHECK(ftruncate(fd, 1 << 26) == 0);
    close(fd);
    CHECK(symlink(value, "link") == 0);
    for (int i = 0; i < 200; i++) {
        char key[32];
        snprintf(key, sizeof key, "user.%d", i);
        if (setxattr(".", key, value, 10, 0) < 0)
            break; /* as many as the file system takes */
    }
}

static void list(const char *folder) {
    char last = 0, path[4096];
    CHECK(mkdir(folder, 0700) == 0);
    CHECK(listed(folder, &last) > 0 && last == 'e');
    CHECK(chdir(folder) == 0);
    fill();
    CHECK(chdir("../..") == 0);
    long size = listed(folder, &last);
    CHECK(size > 4200 + (1 << 26) - 4200 * 8192 && size < 1 << 26 && last == 'e'); /* beyond the most pieces holes are sent */
    snprintf(path, sizeof path, "%s/none", folder);
    CHECK(listed(path, &last) == -1);
}

static void offsets(void) {
    char lowers[256], *most[PIECES_MOST + 1] = {0}, numbers[PIECES_MOST][16];
    static char *const bad[][3] = {{"0"}, {"x"}, {""}, {"4097"}, {"-4096"}, {"8192", "4096"}, {"4096", "4096"}, {"99999999999999999999"}};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        CHECK(pieces_mount("/dev/null", (char **)bad[i], lowers, sizeof lowers) < 0 && errno == EINVAL);
    for (int i = 0; i < PIECES_MOST; i++) {
        snprintf(numbers[i], sizeof numbers[i], "%d", (i + 1) * 4096);
        most[i] = numbers[i];
    }
    CHECK(pieces_mount("/dev/null", most, lowers, sizeof lowers) < 0 && errno == EINVAL);
    most[PIECES_MOST - 1] = NULL;
    CHECK(pieces_mount("/dev/null", most, lowers, sizeof lowers) < 0 && errno == ENOTTY);
}

int main(void) {
    char folder[] = "/tmp/test_upper.XXXXXX", command[64];
    CHECK(mkdtemp(folder) && chdir(folder) == 0);
    list("upper");
    offsets();
    snprintf(command, sizeof command, "rm -rf %s", folder);
    return system(command);
}
