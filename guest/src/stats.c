/* The machine's own figures, as lines "key value" in bytes and microseconds (proc(5), statfs(2)). */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include "builtins.h"
#include "power.h"

/* The first number in a file of our control group, in version 2's place or version 1's; -1 if there is none, or no limit. */
static long long group_figure(const char *unified, const char *old, long long *second) {
    char path[96];
    long long value = -1;
    for (int i = 0; power_contained && i < 2 && value < 0; i++) {
        snprintf(path, sizeof path, "/sys/fs/cgroup/%s", i ? old : unified);
        FILE *f = fopen(path, "re");
        int n = f ? fscanf(f, "%lld %lld", &value, second) : 0;
        if (n < 1)
            value = -1;
        if (f)
            fclose(f);
    }
    return value;
}

/* What a container may use is what its control group says; /proc/meminfo tells of the host. */
static bool group_memory(void) {
    long long none, total = group_figure("memory.max", "memory/memory.limit_in_bytes", &none);
    long long used = group_figure("memory.current", "memory/memory.usage_in_bytes", &none), host;
    FILE *f = fopen("/proc/meminfo", "re");
    if (!f || fscanf(f, "MemTotal: %lld", &host) != 1)
        host = 0;
    if (f)
        fclose(f);
    if (total < 0 || used < 0 || total >= host * 1024)
        return false;
    /* The group's own count of what it could give back is no single figure: what is not used is what is surely there. */
    long long left = used < total ? total - used : 0;
    printf("memory_total %lld\nmemory_available %lld\nmemory_free %lld\n", total, left, left);
    return true;
}

/* "MemTotal:  123 kB" of /proc/meminfo under other names, in bytes. */
static void memory(void) {
    static const char *const keys[][2] = {
        {"MemTotal", "memory_total"}, {"MemAvailable", "memory_available"}, {"MemFree", "memory_free"}, {"Cached", "memory_cached"},
        {"SwapTotal", "swap_total"},  {"SwapFree", "swap_free"},
    };
    FILE *f = fopen("/proc/meminfo", "re");
    char name[64];
    unsigned long long kib;
    while (f && fscanf(f, "%63[^:]: %llu%*[^\n]\n", name, &kib) == 2)
        for (size_t i = 0; i < sizeof keys / sizeof *keys; i++)
            if (!strcmp(name, keys[i][0]))
                printf("%s %llu\n", keys[i][1], kib * 1024);
    if (f)
        fclose(f);
}

/* What all processes took, and those that ended: PID 1 reaped these, or who did is among those that it did. */
static void tasks(unsigned long long *user, unsigned long long *system) {
    DIR *d = opendir("/proc");
    for (struct dirent *e; d && (e = readdir(d));) {
        char path[272], line[512] = "";
        unsigned long long own[2], children[2];
        snprintf(path, sizeof path, "/proc/%.255s/stat", e->d_name);
        FILE *f = *e->d_name >= '1' && *e->d_name <= '9' ? fopen(path, "re") : NULL;
        if (!f)
            continue;
        const char *rest = fgets(line, sizeof line, f) ? strrchr(line, ')') : NULL;
        fclose(f);
        if (!rest || sscanf(rest, ") %*c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %llu %llu %llu %llu", own, own + 1, children, children + 1) != 4)
            continue;
        bool first = !strcmp(e->d_name, "1");
        *user += own[0] + (first ? children[0] : 0);
        *system += own[1] + (first ? children[1] : 0);
    }
    if (d)
        closedir(d);
}

static void processor(void) {
    FILE *f = fopen("/proc/stat", "re");
    unsigned long long user, nice, system, idle, iowait;
    unsigned long long tick = 1000000ull / (unsigned long long)sysconf(_SC_CLK_TCK);
    bool good = f && fscanf(f, "cpu %llu %llu %llu %llu %llu", &user, &nice, &system, &idle, &iowait) == 5;
    if (good && user + nice + system + idle == 0)
        tasks(&user, &system); /* gVisor knows it only of each */
    if (good)
        printf("cpu_user %llu\ncpu_system %llu\ncpu_idle %llu\n", (user + nice) * tick, system * tick, (idle + iowait) * tick);
    if (f)
        fclose(f);
    long long period = -1, none, quota = group_figure("cpu.max", "cpu/cpu.cfs_quota_us", &period);
    if (period < 0)
        period = group_figure("cpu.max", "cpu/cpu.cfs_period_us", &none);
    if (quota > 0 && period > 0)
        printf("cpus %.2f\n", (double)quota / (double)period);
    else
        printf("cpus %ld\n", sysconf(_SC_NPROCESSORS_ONLN));
}

static void load(void) {
    FILE *f = fopen("/proc/loadavg", "re");
    double one, five, fifteen;
    unsigned running, total;
    if (f && fscanf(f, "%lf %lf %lf %u/%u", &one, &five, &fifteen, &running, &total) == 5)
        printf("load1 %.2f\nload5 %.2f\nload15 %.2f\nprocesses %u\n", one, five, fifteen, total);
    if (f)
        fclose(f);
    double up;
    if ((f = fopen("/proc/uptime", "re"))) {
        if (fscanf(f, "%lf", &up) == 1)
            printf("uptime %.0f\n", up * 1e6);
        fclose(f);
    }
}

static void network(void) {
    FILE *f = fopen("/proc/net/dev", "re");
    char line[512], name[32];
    unsigned long long received = 0, sent = 0, in, out;
    while (f && fgets(line, sizeof line, f)) {
        if (sscanf(line, " %31[^:]: %llu %*u %*u %*u %*u %*u %*u %*u %llu", name, &in, &out) == 3 && strcmp(name, "lo")) {
            received += in;
            sent += out;
        }
    }
    if (f)
        fclose(f);
    printf("network_received %llu\nnetwork_sent %llu\n", received, sent);
}

int stats_main(char **argv) {
    (void)argv;
    if (!group_memory())
        memory();
    processor();
    load();
    network();
    struct statvfs fs;
    if (statvfs("/", &fs) == 0)
        printf("disk_total %llu\ndisk_free %llu\n", (unsigned long long)fs.f_blocks * fs.f_frsize,
               (unsigned long long)fs.f_bavail * fs.f_frsize);
    return fflush(stdout) == 0 ? 0 : errno;
}
