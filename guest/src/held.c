#include "held.h"

#include <dirent.h>
#include <errno.h>
#include <limits.h>
#include <linux/magic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "status.h"

#define REMOVED " (deleted)"

/* `at` leads to the file itself or, where nothing does, to the folder that it was in. */
static bool of_host(const char *at) {
    struct statfs found;
    return statfs(at, &found) == 0 && found.f_type == V9FS_MAGIC;
}

static bool ends_removed(char *path) {
    size_t size = strlen(path), mark = strlen(REMOVED);
    if (size <= mark || strcmp(path + size - mark, REMOVED) != 0)
        return false;
    path[size - mark] = 0;
    return true;
}

/* One of the links in /proc/PID. */
static bool link_removed(const char *link, char *path) {
    ssize_t size = readlink(link, path, PATH_MAX - 1);
    if (size <= 0)
        return false;
    path[size] = 0;
    return ends_removed(path) && of_host(link);
}

static bool open_removed(const char *pid, char *path) {
    char at[64 + 2 * NAME_MAX];
    snprintf(at, sizeof at, "/proc/%s/fd", pid);
    DIR *folder = opendir(at);
    bool found = false;
    for (struct dirent *e; !found && folder && (e = readdir(folder));) {
        snprintf(at, sizeof at, "/proc/%s/fd/%s", pid, e->d_name);
        found = e->d_name[0] != '.' && link_removed(at, path);
    }
    if (folder)
        closedir(folder);
    return found;
}

static bool mapped_removed(const char *pid, char *path) {
    char at[64 + NAME_MAX], line[PATH_MAX + 128];
    snprintf(at, sizeof at, "/proc/%s/maps", pid);
    FILE *maps = fopen(at, "re");
    bool found = false;
    while (!found && maps && fgets(line, sizeof line, maps)) {
        line[strcspn(line, "\n")] = 0;
        char *name = strchr(line, '/');
        if (!name || !ends_removed(name) || strlen(name) >= PATH_MAX)
            continue;
        strcpy(path, name);
        char *last = strrchr(name, '/');
        last[last == name] = 0;
        found = of_host(name);
    }
    if (maps)
        fclose(maps);
    return found;
}

static bool process_removed(const char *pid, char *path) {
    static const char *const links[] = {"cwd", "exe", "root"};
    char at[64 + NAME_MAX];
    for (size_t i = 0; i < sizeof links / sizeof *links; i++) {
        snprintf(at, sizeof at, "/proc/%s/%s", pid, links[i]);
        if (link_removed(at, path))
            return true;
    }
    return open_removed(pid, path) || mapped_removed(pid, path);
}

int held_unsavable(char *text, size_t size) {
    char path[PATH_MAX];
    DIR *processes = opendir("/proc");
    *text = 0;
    for (struct dirent *e; !*text && processes && (e = readdir(processes));) {
        if (e->d_name[0] < '1' || e->d_name[0] > '9')
            continue;
        /* Stopped at a system call by its tracer, a thread is in a state that the Sentry has no way to save, and dies of. */
        if (status_number(atoi(e->d_name), "TracerPid") > 0)
            snprintf(text, size, "process %s is traced", e->d_name);
        else if (process_removed(e->d_name, path))
            snprintf(text, size, "process %s holds %.200s, which was removed", e->d_name, path);
    }
    if (processes)
        closedir(processes);
    return *text ? EBUSY : 0;
}
