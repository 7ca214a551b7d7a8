#include <errno.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <signal.h>
#include <stddef.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "answers.h"

/* The answerer copies a few bytes that hostile programs point to, and compares them; it needs /proc, setns(2) and, for its
 * children, whatever a program may do to files. What it surely never needs is refused: other programs, the network, the kernel's
 * own switches, other processes' memory but for reading. */
static const int REFUSED[] = {
    SYS_execve, SYS_execveat, SYS_ptrace, SYS_process_vm_writev, SYS_socket, SYS_connect, SYS_bind, SYS_listen, SYS_bpf, SYS_perf_event_open,
    SYS_init_module, SYS_finit_module, SYS_delete_module, SYS_kexec_load, SYS_reboot, SYS_swapon, SYS_swapoff, SYS_unshare, SYS_pivot_root,
    SYS_add_key, SYS_request_key, SYS_keyctl, SYS_settimeofday, SYS_clock_settime, SYS_userfaultfd, SYS_syslog, SYS_acct, SYS_quotactl,
    425 /* io_uring_setup */,
#ifdef SYS_ioperm
    SYS_ioperm, SYS_iopl, SYS_kexec_file_load,
#endif
};

#if defined(__x86_64__)
#define OUR_ARCH AUDIT_ARCH_X86_64
#else
#define OUR_ARCH AUDIT_ARCH_AARCH64
#endif

enum { REFUSED_COUNT = sizeof REFUSED / sizeof *REFUSED, OPEN_FILES = 2048, DATA = 256 << 20 };

static bool install(void) {
    struct sock_filter code[REFUSED_COUNT + 8];
    unsigned short n = 0;
    code[n++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, arch));
    code[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, OUR_ARCH, 1, 0);
    code[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS);
    code[n++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr));
    for (unsigned char i = 0; i < REFUSED_COUNT; i++)
        code[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (uint32_t)REFUSED[i], (unsigned char)(REFUSED_COUNT - i), 0);
    code[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
    code[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM);
    struct sock_fprog filter = {.len = n, .filter = code};
    return prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter) == 0;
}

static void limit(__rlimit_resource_t which, rlim_t most) {
    struct rlimit now;
    if (getrlimit(which, &now) < 0)
        return;
    rlim_t value = now.rlim_max < most ? now.rlim_max : most;
    now = (struct rlimit){value, value};
    setrlimit(which, &now);
}

bool answer_jail(pid_t parent) {
    if (prctl(PR_SET_PDEATHSIG, SIGKILL) < 0 || getppid() != parent)
        return false;
    prctl(PR_SET_NAME, "tvinit-answer");
    prctl(PR_SET_DUMPABLE, 0);
    limit(RLIMIT_CORE, 0);
    limit(RLIMIT_NOFILE, OPEN_FILES);
#ifndef __SANITIZE_ADDRESS__
    limit(RLIMIT_DATA, DATA);
#endif
    return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 && install();
}
