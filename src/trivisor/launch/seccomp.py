"""The seccomp profiles that we use, as data, and their filters. launch/bpf.py compiles them.

What a command gets without a policy is a profile's filter; with one, a filter of its own, compiled out of the same profile, the
machine's rules and the command's (docs/decisions/0008).
"""

from __future__ import annotations

import errno
import functools

from trivisor.launch.bpf import ALLOW, KILL, LOG, NOTIFY, OPEN, TRACE, Allowed, Arg, Profile, Rule, Verdicts, always, compile_policy, refuse
from trivisor.launch.bpf import compile as compile  # noqa: A004, PLC0414 - part of what this module offers

__all__ = [
    "ALLOW",
    "KILL",
    "LOG",
    "NOTIFY",
    "OPEN",
    "TRACE",
    "Allowed",
    "Arg",
    "Profile",
    "Rule",
    "Verdicts",
    "always",
    "compile",
    "compile_policy",
    "refuse",
]

_NEW_NAMESPACES = 0x7E020000
"""The CLONE_NEW* flags that clone(2) takes. CLONE_NEWTIME is not one: its bit lies in the exit signal there."""

# Docker's default profile without any capability (moby, profiles/seccomp/default_linux.go), less what only old or
# 32-bit programs call, and less ptrace and process_vm_*, which it allows on kernels since 4.8.
_COMMON = """
    accept accept4 access alarm arch_prctl bind brk cachestat capget capset chdir chmod chown clock_getres clock_gettime
    clock_nanosleep close close_range connect copy_file_range creat dup dup2 dup3 epoll_create epoll_create1 epoll_ctl epoll_pwait
    epoll_pwait2 epoll_wait eventfd eventfd2 execve execveat exit exit_group faccessat faccessat2 fadvise64 fallocate fchdir fchmod
    fchmodat fchmodat2 fchown fchownat fcntl fdatasync fgetxattr flistxattr flock fork fremovexattr fsetxattr fstat fstatfs fsync
    ftruncate futex futex_requeue futex_wait futex_waitv futex_wake futimesat get_robust_list getcpu getcwd getdents getdents64
    getegid geteuid getgid getgroups getitimer getpeername getpgid getpgrp getpid getppid getpriority getrandom getresgid getresuid
    getrlimit getrusage getsid getsockname getsockopt gettid gettimeofday getuid getxattr inotify_add_watch inotify_init
    inotify_init1 inotify_rm_watch io_cancel io_destroy io_getevents io_pgetevents io_setup io_submit ioprio_get ioprio_set kill
    landlock_add_rule landlock_create_ruleset landlock_restrict_self lchown lgetxattr link linkat listen listxattr llistxattr
    lremovexattr lseek lsetxattr lstat madvise map_shadow_stack membarrier memfd_create mincore mkdir mkdirat mlock mlock2 mlockall
    mmap mprotect mq_getsetattr mq_notify mq_open mq_timedreceive mq_timedsend mq_unlink mremap mseal msgctl msgget msgrcv msgsnd
    msync munlock munlockall munmap nanosleep newfstatat open openat openat2 pause pidfd_open pidfd_send_signal pipe pipe2
    pkey_alloc pkey_free pkey_mprotect poll ppoll prctl pread64 preadv preadv2 prlimit64 process_mrelease pselect6 pwrite64 pwritev
    pwritev2 read readahead readlink readlinkat readv recvfrom recvmmsg recvmsg removexattr rename renameat renameat2
    restart_syscall rmdir rseq rt_sigaction rt_sigpending rt_sigprocmask rt_sigqueueinfo rt_sigreturn rt_sigsuspend rt_sigtimedwait
    rt_tgsigqueueinfo sched_get_priority_max sched_get_priority_min sched_getaffinity sched_getattr sched_getparam
    sched_getscheduler sched_rr_get_interval sched_setaffinity sched_setattr sched_setparam sched_setscheduler sched_yield seccomp
    select semctl semget semop semtimedop sendfile sendmmsg sendmsg sendto set_robust_list set_tid_address setfsgid setfsuid setgid
    setgroups setitimer setpgid setpriority setregid setresgid setresuid setreuid setrlimit setsid setsockopt setuid setxattr shmat
    shmctl shmdt shmget shutdown sigaltstack signalfd signalfd4 socketpair splice stat statfs statx symlink symlinkat sync
    sync_file_range syncfs sysinfo tee tgkill time timer_create timer_delete timer_getoverrun timer_gettime timer_settime
    timerfd_create timerfd_gettime timerfd_settime times tkill truncate umask uname unlink unlinkat utime utimensat utimes vfork
    vmsplice wait4 waitid write writev
"""
_FILES_ONLY = "mknod mknodat fanotify_mark name_to_handle_at memfd_secret"
"""In the default profile, of no use to an engine."""

_CONTAINER = " chroot ptrace process_vm_readv process_vm_writev"

_CLONE: tuple[Rule, ...] = ((Arg(0, "==", 0, mask=_NEW_NAMESPACES),),)
_PERSONALITIES: tuple[Rule, ...] = tuple((Arg(0, "==", value),) for value in (0x0, 0x8, 0x20000, 0x20008, 0xFFFFFFFF))
_IOCTL: tuple[Rule, ...] = ((Arg(1, "!=", 0x5412, mask=0xFFFFFFFF), Arg(1, "!=", 0x541C, mask=0xFFFFFFFF)),)
"""Neither TIOCSTI nor TIOCLINUX, which type into the terminal of whoever started us."""
_AF_UNIX, _AF_INET, _AF_INET6, _AF_NETLINK, _AF_VSOCK = 1, 2, 10, 16, 40
_NETLINK_KOBJECT_UEVENT = 15


def _family(family: int, *more: Arg) -> Rule:
    return (Arg(0, "==", family, mask=0xFFFFFFFF), *more)


_BARE: dict[str, tuple[Rule, ...]] = {
    "clone": _CLONE,
    "personality": _PERSONALITIES,
    "ioctl": _IOCTL,
    "socket": ((Arg(0, "!=", _AF_VSOCK, mask=0xFFFFFFFF),),),
}
_NO_CLONE3 = {"clone3": errno.ENOSYS}
"""Its flags are in memory, where no filter sees them; with ENOSYS libc falls back to clone."""

DEFAULT = Profile(always(_COMMON + _FILES_ONLY) | _BARE, _NO_CLONE3)
"""For programs that we know nothing about: at least as tight as Docker's default without capabilities."""

CONTAINER = Profile(always(_COMMON + _FILES_ONLY + _CONTAINER) | _BARE, _NO_CLONE3)
"""Of a command in a container with Docker's default capabilities: at least as tight as Docker's for that set.
CAP_SYS_CHROOT brings chroot; debuggers work as they do there, which is safe since Linux 4.8."""

_ASKED = """
    mount umount2 pivot_root sethostname setdomainname unshare setns swapon swapoff settimeofday clock_settime clock_adjtime adjtimex
    syslog reboot fsopen fsconfig fsmount fspick move_mount open_tree mount_setattr
"""
OUTER = Profile({**CONTAINER.allowed, **always(_ASKED)}, _NO_CLONE3)
"""Of a container's PID 1: beyond CONTAINER, calls that a policy may have answered outside. Between stacked filters an errno outranks a
notification, so this one must let them through; no command gets it alone, since CONTAINER, or a policy's filter, lies on each."""

_SANDBOX = """
    chroot clone get_mempolicy kcmp mbind mknod mknodat modify_ldt mount personality pivot_root process_madvise process_vm_readv
    process_vm_writev ptrace set_mempolicy setdomainname sethostname setns socket umount2 unshare
"""
"""What a program calls beside the others that makes a sandbox of its own: namespaces, a root, processes that it traces."""

SANDBOX = Profile(always(_COMMON + _SANDBOX) | {"ioctl": _IOCTL}, _NO_CLONE3)
"""For a sandbox that we jail (runsc), in a user namespace. Whatever of the kernel it has no use for is out of reach: keys, BPF,
io_uring, userfaultfd, performance events, modules, file handles, clocks, the newer mount calls."""


def engine(network: bool) -> Profile:
    """Return the profile of an engine that we jail: tighter. Without `network` it makes no socket but unix ones, and the one by which
    libusb would hear of devices that come, which in a network namespace of its own hears nothing: without it, libusb does not begin."""
    families = [_family(_AF_UNIX), _family(_AF_NETLINK, Arg(2, "==", _NETLINK_KOBJECT_UEVENT, mask=0xFFFFFFFF))]
    if network:
        families += [_family(_AF_INET), _family(_AF_INET6), _family(_AF_NETLINK, Arg(2, "==", 0, mask=0xFFFFFFFF))]
    return Profile(always(_COMMON) | {"clone": _CLONE, "ioctl": _IOCTL, "socket": tuple(families)}, _NO_CLONE3)


@functools.cache
def default_profile() -> bytes:
    """Return the filter of DEFAULT."""
    return compile_policy(DEFAULT, {})


@functools.cache
def container_profile() -> bytes:
    """Return the filter of CONTAINER."""
    return compile_policy(CONTAINER, {})


@functools.cache
def outer_profile() -> bytes:
    """Return the filter of OUTER."""
    return compile_policy(OUTER, {})


@functools.cache
def engine_profile(network: bool) -> bytes:
    """Return the filter of `engine(network)`."""
    return compile_policy(engine(network), {})


@functools.cache
def sandbox_profile() -> bytes:
    """Return the filter of SANDBOX."""
    return compile_policy(SANDBOX, {})
