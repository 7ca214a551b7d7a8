/* Tries one thing that the root of a container must not be able to do, and prints how it went: the errno's name,
 * "signal N" if the attempt was killed for it, or "done". Arguments are such that success would harm nobody.
 *
 *   escape NAME      escape alone prints all names
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/bpf.h>
#include <linux/capability.h>
#include <linux/perf_event.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/fanotify.h>
#include <sys/io.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/swap.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/timex.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { CHILD_STACK = 65536, AF_VM = 40, MEM_MAJOR = 1, MEM_MINOR = 1 };

static long is_open(int fd) {
    if (fd >= 0)
        close(fd);
    return fd >= 0 ? 0 : -1;
}

static long writes(const char *path, const char *text) {
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0)
        return -1;
    long done = write(fd, text, strlen(text));
    int saved = errno;
    close(fd);
    errno = saved;
    return done < 0 ? -1 : 0;
}

static long reads(const char *path) {
    char byte;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return -1;
    long done = read(fd, &byte, 1);
    int saved = done == 0 ? ENODATA : errno;
    close(fd);
    errno = saved;
    return done > 0 ? 0 : -1;
}

/* Of two ways to the same, one is enough. */
static long either(long one, long other) { return one < 0 && other < 0 ? -1 : 0; }

/* What the kernel is told: a value that it has already, where there is one. */
static long sysctl_vm(void) { return writes("/proc/sys/vm/swappiness", "60"); }
static long sysctl_core(void) { return writes("/proc/sys/kernel/core_pattern", "core"); }
static long sysctl_modprobe(void) { return writes("/proc/sys/kernel/modprobe", "/sbin/modprobe"); }
static long sysctl_panic(void) { return writes("/proc/sys/kernel/panic_on_oops", "0"); }
static long sysrq(void) { return writes("/proc/sysrq-trigger", "h"); }
static long sys_ksm(void) { return writes("/sys/kernel/mm/ksm/run", "0"); }
static long sys_hugepages(void) { return writes("/sys/kernel/mm/transparent_hugepage/enabled", "madvise"); }
static long sys_uevent(void) { return writes("/sys/kernel/uevent_helper", ""); }
static long sys_cgroup(void) { return writes("/sys/fs/cgroup/cgroup.procs", "0"); }
static long sys_cgroup_limit(void) {
    return either(writes("/sys/fs/cgroup/memory/memory.limit_in_bytes", "-1"), writes("/sys/fs/cgroup/memory.max", "max"));
}
static long oom_score(void) { return writes("/proc/self/oom_score_adj", "-1000"); }

static long device(const char *name, mode_t kind, unsigned major_, unsigned minor_) {
    unlink(name);
    if (mknod(name, kind | 0600, makedev(major_, minor_)) < 0)
        return -1;
    long opened = is_open(open(name, O_RDONLY | O_NONBLOCK));
    int saved = errno;
    unlink(name);
    errno = saved;
    return opened;
}

static long dev_mem(void) { return is_open(open("/dev/mem", O_RDWR)); }
static long dev_kmsg(void) { return is_open(open("/dev/kmsg", O_WRONLY)); }
static long dev_kvm(void) { return is_open(open("/dev/kvm", O_RDWR)); }
static long dev_fuse(void) { return is_open(open("/dev/fuse", O_RDWR)); }
static long dev_loop(void) { return is_open(open("/dev/loop-control", O_RDWR)); }
static long dev_tun(void) { return is_open(open("/dev/net/tun", O_RDWR)); }
static long mknod_mem(void) { return device("/tmp/mem", S_IFCHR, MEM_MAJOR, MEM_MINOR); }
static long mknod_vda(void) { return device("/tmp/disk", S_IFBLK, 254, 0); }
static long mknod_loop(void) { return device("/dev/loop9", S_IFBLK, 7, 9); }
static long mknod_shm(void) { return device("/dev/shm/kmsg", S_IFCHR, 1, 11); }
static long kcore(void) { return reads("/proc/kcore"); }
static long kmsg(void) { return reads("/proc/kmsg"); }
static long syslog_read(void) {
    char text[64];
    return syscall(SYS_syslog, 3, text, sizeof text);
}

static long mount_tmpfs(void) { return mount("none", "/mnt", "tmpfs", 0, NULL); }
static long mount_proc(void) { return mount("none", "/mnt", "proc", 0, NULL); }
static long mount_bind(void) { return mount("/etc", "/mnt", NULL, MS_BIND, NULL); }
static long mount_cgroup(void) { return either(mount("none", "/mnt", "cgroup", 0, "memory"), mount("none", "/mnt", "cgroup2", 0, NULL)); }
static long mount_remount(void) { return mount(NULL, "/sys", NULL, MS_REMOUNT | MS_BIND, NULL); }
static long mount_propagate(void) { return mount(NULL, "/", NULL, MS_SHARED, NULL); }
static long umount_mask(void) { return either(umount2("/proc/kcore", MNT_DETACH), umount2("/proc/sys", MNT_DETACH)); }
static long fs_open(void) { return is_open((int)syscall(SYS_fsopen, "tmpfs", 0)); }
static long open_tree_clone(void) { return is_open((int)syscall(SYS_open_tree, AT_FDCWD, "/", 1)); }
static long mount_attributes(void) {
    uint64_t attributes[4] = {0, 1, 0, 0};
    return syscall(SYS_mount_setattr, AT_FDCWD, "/proc/sys", 0, attributes, sizeof attributes);
}
static long pivot(void) { return syscall(SYS_pivot_root, "/mnt", "/mnt"); }

static long module(void) { return syscall(SYS_init_module, "not one", 7L, ""); }
static long module_file(void) {
    int fd = open("/proc/self/exe", O_RDONLY);
    return syscall(SYS_finit_module, fd, "", 0);
}
static long module_delete(void) { return syscall(SYS_delete_module, "no_such_module", O_NONBLOCK); }
static long kexec(void) { return syscall(SYS_kexec_load, 0L, 0L, NULL, 0L); }
static long reboot_off(void) { return reboot(RB_DISABLE_CAD); }
static long swap_on(void) { return swapon("/proc/self/exe", 0); }
static long accounting(void) { return acct("/tmp/acct"); }
static long quota(void) { return syscall(SYS_quotactl, 0x80000100, "/dev/vda", 0, NULL); }
static long port_io(void) { return either(ioperm(0x80, 1, 1), iopl(3)); }
static long clock_set(void) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    return clock_settime(CLOCK_REALTIME, &now);
}
static long clock_adjust(void) {
    struct timex nothing = {.modes = ADJ_STATUS, .status = STA_UNSYNC};
    return adjtimex(&nothing) < 0 ? -1 : 0;
}
static long host_name(void) { return sethostname("localhost", 9); }

static long trace_init(void) { return ptrace(PTRACE_SEIZE, 1, 0, 0); }
static long read_init(void) {
    char byte;
    struct iovec mine = {&byte, 1}, theirs = {(void *)0x400000, 1};
    return process_vm_readv(1, &mine, 1, &theirs, 1, 0);
}
static long fd_of_init(void) {
    int pid = (int)syscall(SYS_pidfd_open, 1, 0);
    for (int fd = 0; pid >= 0 && fd < 32; fd++)
        if (!is_open((int)syscall(SYS_pidfd_getfd, pid, fd, 0)))
            return 0;
    return -1;
}
static long memory_of_init(void) { return is_open(open("/proc/1/mem", O_RDWR)); }
static long root_of_init(void) { return is_open(open("/proc/1/root/etc", O_RDONLY)); }
static long files_of_init(void) {
    char path[64], target[256];
    for (int fd = 0; fd < 32; fd++) {
        snprintf(path, sizeof path, "/proc/1/fd/%d", fd);
        if (readlink(path, target, sizeof target) >= 0)
            return 0;
    }
    return -1;
}
static long kill_init(void) {
    /* The kernel passes over what its init did not ask for: that it still answers is what the test looks at. */
    kill(1, SIGKILL);
    kill(1, SIGSTOP);
    errno = EPERM;
    return -1;
}

static long key_add(void) { return syscall(SYS_add_key, "user", "name", "text", 4L, -3); }
static long key_request(void) { return syscall(SYS_request_key, "user", "name", NULL, -3); }
static long key_control(void) { return syscall(SYS_keyctl, 0, -3, 1); }
static long bpf_map(void) {
    union bpf_attr map = {.map_type = BPF_MAP_TYPE_ARRAY, .key_size = 4, .value_size = 4, .max_entries = 1};
    return is_open((int)syscall(SYS_bpf, BPF_MAP_CREATE, &map, sizeof map));
}
static long user_faults(void) { return is_open((int)syscall(SYS_userfaultfd, O_CLOEXEC)); }
static long user_faults_own(void) { return is_open((int)syscall(SYS_userfaultfd, O_CLOEXEC | 1)); }
static long uring(void) {
    char parameters[120] = {0};
    return is_open((int)syscall(SYS_io_uring_setup, 1, parameters));
}
static long perf(void) {
    struct perf_event_attr event = {.type = PERF_TYPE_SOFTWARE, .size = sizeof event, .exclude_kernel = 1};
    return is_open((int)syscall(SYS_perf_event_open, &event, 0, -1, -1, 0L));
}
static long notify_all(void) { return is_open(fanotify_init(FAN_CLASS_CONTENT, 0)); }
static long vm_socket(void) { return is_open(socket(AF_VM, SOCK_STREAM, 0)); }

static int nothing(void *unused) {
    (void)unused;
    return 0;
}
static long clones(int flags) {
    static char stack[CHILD_STACK];
    int pid = clone(nothing, stack + sizeof stack, flags | SIGCHLD, NULL);
    if (pid > 0)
        waitpid(pid, NULL, 0);
    return pid < 0 ? -1 : 0;
}
static long clone_user(void) { return clones(CLONE_NEWUSER); }
static long clone_mount(void) { return clones(CLONE_NEWNS); }
static long clone_net(void) { return clones(CLONE_NEWNET); }
static long clone_new(void) {
    uint64_t arguments[8] = {CLONE_NEWUSER, 0, 0, 0, SIGCHLD};
    long pid = syscall(SYS_clone3, arguments, sizeof arguments);
    if (pid == 0)
        _exit(0);
    return pid < 0 ? -1 : 0;
}
static long unshare_user(void) { return unshare(CLONE_NEWUSER); }
static long unshare_mount(void) { return unshare(CLONE_NEWNS); }
static long enter_init(void) {
    int fd = open("/proc/1/ns/mnt", O_RDONLY);
    return fd < 0 ? -1 : setns(fd, 0);
}

static long by_handle(void) {
    /* The root of most file systems is inode 2 (shocker.c, 2014). */
    struct {
        struct file_handle head;
        unsigned char bytes[8];
    } handle = {{8, 1}, {2}};
    int here = open("/etc/hosts", O_RDONLY);
    return is_open(open_by_handle_at(here, (struct file_handle *)&handle, O_RDONLY));
}

static long more_power(void) {
    struct __user_cap_header_struct head = {_LINUX_CAPABILITY_VERSION_3, 0};
    struct __user_cap_data_struct data[2] = {{0xffffffff, 0xffffffff, 0}, {0xffffffff, 0xffffffff, 0}};
    return syscall(SYS_capset, &head, data);
}
static long ambient_power(void) { return prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, CAP_SYS_ADMIN, 0, 0); }
static long new_power(void) { return prctl(PR_SET_NO_NEW_PRIVS, 0, 0, 0, 0); }
static long executable_file(void) {
    int fd = open("/proc/self/exe", O_RDONLY);
    return prctl(PR_SET_MM, PR_SET_MM_EXE_FILE, fd, 0, 0);
}
static long type_into_terminal(void) { return ioctl(0, TIOCSTI, "x"); }

static long call_32(void) {
#ifdef __x86_64__
    long result;
    /* mount(2) has number 21 there: a filter that looks at numbers alone would see access(2). */
    __asm__ volatile("int $0x80" : "=a"(result) : "a"(21L), "b"(0L), "c"(0L), "d"(0L), "S"(0L), "D"(0L) : "memory", "r8", "r9", "r10", "r11");
    errno = (int)-result;
    return result < 0 ? -1 : 0;
#else
    errno = ENOSYS;
    return -1;
#endif
}
static long call_x32(void) { return syscall(0x40000000L | SYS_getpid) < 0 ? -1 : 0; }

#define TRY(name) {#name, name}
static const struct {
    const char *name;
    long (*attempt)(void);
} attempts[] = {
    TRY(sysctl_vm), TRY(sysctl_core), TRY(sysctl_modprobe), TRY(sysctl_panic), TRY(sysrq), TRY(sys_ksm), TRY(sys_hugepages),
    TRY(sys_uevent), TRY(sys_cgroup), TRY(sys_cgroup_limit), TRY(oom_score),
    TRY(dev_mem), TRY(dev_kmsg), TRY(dev_kvm), TRY(dev_fuse), TRY(dev_loop), TRY(dev_tun), TRY(mknod_mem), TRY(mknod_vda),
    TRY(mknod_loop), TRY(mknod_shm), TRY(kcore), TRY(kmsg), TRY(syslog_read),
    TRY(mount_tmpfs), TRY(mount_proc), TRY(mount_bind), TRY(mount_cgroup), TRY(mount_remount), TRY(mount_propagate),
    TRY(umount_mask), TRY(fs_open), TRY(open_tree_clone), TRY(mount_attributes), TRY(pivot),
    TRY(module), TRY(module_file), TRY(module_delete), TRY(kexec), TRY(reboot_off), TRY(swap_on), TRY(accounting), TRY(quota),
    TRY(port_io), TRY(clock_set), TRY(clock_adjust), TRY(host_name),
    TRY(trace_init), TRY(read_init), TRY(fd_of_init), TRY(memory_of_init), TRY(root_of_init), TRY(files_of_init), TRY(kill_init),
    TRY(key_add), TRY(key_request), TRY(key_control), TRY(bpf_map), TRY(user_faults), TRY(user_faults_own), TRY(uring), TRY(perf),
    TRY(notify_all), TRY(vm_socket),
    TRY(clone_user), TRY(clone_mount), TRY(clone_net), TRY(clone_new), TRY(unshare_user), TRY(unshare_mount), TRY(enter_init),
    TRY(by_handle), TRY(more_power), TRY(ambient_power), TRY(new_power), TRY(executable_file), TRY(type_into_terminal),
    TRY(call_32), TRY(call_x32),
};

static void run(long (*attempt)(void)) {
    pid_t pid = fork();
    if (pid == 0) {
        errno = 0;
        long result = attempt();
        printf("%s\n", result < 0 ? strerrorname_np(errno) : "done");
        fflush(stdout);
        _exit(0);
    }
    int status;
    if (waitpid(pid, &status, 0) == pid && WIFSIGNALED(status))
        printf("signal %d\n", WTERMSIG(status));
}

int main(int argc, char **argv) {
    for (size_t i = 0; i < sizeof attempts / sizeof *attempts; i++) {
        if (argc < 2)
            puts(attempts[i].name);
        else if (!strcmp(argv[1], attempts[i].name)) {
            run(attempts[i].attempt);
            return 0;
        }
    }
    return argc < 2 ? 0 : 2;
}
