"""seccomp filters, compiled here: no libseccomp needed, and one program holds all rules.

A filter names the calls that pass, always or under conditions on their arguments; the rest fail with an errno. The
program is a binary search over runs of numbers, so that a call costs about eight instructions; kernels since 5.11
cache the verdict of unconditional calls besides. A foreign architecture kills the process; x32 numbers fail with ENOSYS.

BPF here: seccomp(2), "struct seccomp_data"; Documentation/networking/filter.rst. Pointers cannot be looked at.
"""

from __future__ import annotations

import errno
import functools
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from trivisor.core.errors import HostLacks
from trivisor.launch.syscalls import SYSCALLS

_AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_X32 = 0x40000000
_KILL_PROCESS, _ERRNO, _ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
_LOAD, _JUMP, _JEQ, _JGE, _AND, _RET = 0x20, 0x05, 0x15, 0x35, 0x54, 0x06
_NR, _ARCH, _ARGS = 0, 4, 16
_NEW_NAMESPACES = 0x7E020000
"""The CLONE_NEW* flags that clone(2) takes. CLONE_NEWTIME is not one: its bit lies in the exit signal there."""

_Instruction = tuple[int, int, int, int]  # code, jt, jf, k: struct sock_filter
_Code = list[_Instruction]


@dataclass(frozen=True)
class Arg:
    """A condition on argument `index` (0 to 5): (argument & mask) is, or is not, `value`. All 64 bits count."""

    index: int
    test: Literal["==", "!="]
    value: int
    mask: int = 0xFFFFFFFFFFFFFFFF


Rule = tuple[Arg, ...]
"""Passes if all its conditions hold."""

Allowed = Mapping[str, tuple[Rule, ...]]
"""A call's name to its rules, of which one must pass; no rules: it always passes."""


def always(names: str | Iterable[str]) -> dict[str, tuple[Rule, ...]]:
    """Return `names` (words, or a list) as calls that always pass."""
    return dict.fromkeys(names.split() if isinstance(names, str) else names, ())


def _ret(value: int) -> _Instruction:
    return (_RET, 0, 0, value)


def _half(at: int, value: int, mask: int, offset: int) -> _Code:
    """Code that falls through if that half of an argument is `value`, and else jumps over `offset` instructions."""
    code: _Code = [(_LOAD, 0, 0, at)]
    if mask != 0xFFFFFFFF:
        code.append((_AND, 0, 0, mask))
    return [*code, (_JEQ, 0, offset, value & mask)]


def _rule(rule: Rule) -> _Code:
    """Code that allows if all of `rule` holds, and else falls off its end."""
    tail: _Code = [_ret(_ALLOW)]
    for arg in reversed(rule):
        low, high = _ARGS + 8 * arg.index, _ARGS + 8 * arg.index + 4
        masks, values = (arg.mask & 0xFFFFFFFF, arg.mask >> 32), (arg.value & 0xFFFFFFFF, arg.value >> 32)
        if arg.test == "==":
            second = _half(low, values[0], masks[0], len(tail))
            first = _half(high, values[1], masks[1], len(second) + len(tail))
        else:
            # Equal halves go on to the next test; a half that differs means that the condition holds.
            second = _half(low, values[0], masks[0], 0)
            second[-1] = (_JEQ, len(tail), 0, second[-1][3])
            first = _half(high, values[1], masks[1], len(second))
        tail = [*first, *second, *tail]
    return tail


def _verdict(rules: tuple[Rule, ...], refuse: int) -> _Code:
    if not rules:
        return [_ret(_ALLOW)]
    return [step for rule in rules for step in _rule(rule)] + [_ret(refuse)]


def _tree(runs: list[tuple[int, _Code]]) -> _Code:
    """Binary search: `runs` are (first number, code), ascending; the accumulator holds the number."""
    if len(runs) == 1:
        return runs[0][1]
    middle = len(runs) // 2
    left, right = _tree(runs[:middle]), _tree(runs[middle:])
    if len(left) <= 255:
        return [(_JGE, len(left), 0, runs[middle][0]), *left, *right]
    return [(_JGE, 0, 1, runs[middle][0]), (_JUMP, 0, 0, len(left)), *left, *right]


def compile(  # noqa: A001
    allowed: Allowed,
    *,
    errnos: Mapping[str, int] | None = None,
    default: int = errno.EPERM,
    machine: str = "",
) -> bytes:
    """Return a BPF program (struct sock_filter, little-endian) for the operation `seccomp`.

    `machine` is as os.uname() names it, "" this one; calls that it does not have are passed over.
    `errnos` gives calls an errno of their own.
    Raises HostLacks for a machine that we have no numbers for.
    """
    machine = machine or os.uname().machine
    if machine not in SYSCALLS:
        raise HostLacks(f"no system call table for {machine}", hint=f"there are tables for {', '.join(SYSCALLS)}")
    table = SYSCALLS[machine]
    refuse = _ERRNO | default
    verdicts: dict[int, _Code] = {table[name]: _verdict(rules, refuse) for name, rules in allowed.items() if name in table}
    verdicts |= {table[name]: [_ret(_ERRNO | code)] for name, code in (errnos or {}).items() if name in table}
    refused = [_ret(refuse)]
    edges = sorted({0} | {number + step for number in verdicts for step in (0, 1)})
    runs = [(edge, verdicts.get(edge, refused)) for edge in edges]
    runs = [runs[0]] + [right for left, right in pairwise(runs) if left[1] != right[1]]
    code: _Code = [(_LOAD, 0, 0, _ARCH), (_JEQ, 1, 0, _AUDIT[machine]), _ret(_KILL_PROCESS), (_LOAD, 0, 0, _NR)]
    if machine == "x86_64":
        code += [(_JGE, 0, 1, _X32), _ret(_ERRNO | errno.ENOSYS)]
    code += _tree(runs)
    return b"".join(struct.pack("<HBBI", *step) for step in code)


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


def _family(family: int, *more: Arg) -> Rule:
    return (Arg(0, "==", family, mask=0xFFFFFFFF), *more)


@functools.cache
def default_profile() -> bytes:
    """Return the filter for programs that we know nothing about: at least as tight as Docker's default without
    capabilities. What is not in it fails with EPERM, and clone3 with ENOSYS, so that libc falls back to clone."""
    allowed = always(_COMMON + _FILES_ONLY) | {
        "clone": _CLONE,
        "personality": _PERSONALITIES,
        "ioctl": _IOCTL,
        "socket": ((Arg(0, "!=", _AF_VSOCK, mask=0xFFFFFFFF),),),
    }
    return compile(allowed, errnos={"clone3": errno.ENOSYS})


@functools.cache
def container_profile() -> bytes:
    """Return the filter of a container with Docker's default capabilities: at least as tight as Docker's for that set.
    CAP_SYS_CHROOT brings chroot; debuggers work as they do there, which is safe since Linux 4.8."""
    allowed = always(_COMMON + _FILES_ONLY + _CONTAINER) | {
        "clone": _CLONE,
        "personality": _PERSONALITIES,
        "ioctl": _IOCTL,
        "socket": ((Arg(0, "!=", _AF_VSOCK, mask=0xFFFFFFFF),),),
    }
    return compile(allowed, errnos={"clone3": errno.ENOSYS})


@functools.cache
def engine_profile(network: bool) -> bytes:
    """Return the filter for an engine that we jail: tighter. Without `network` it makes no socket but unix ones."""
    families = [_family(_AF_UNIX)]
    if network:
        families += [_family(_AF_INET), _family(_AF_INET6), _family(_AF_NETLINK, Arg(2, "==", 0, mask=0xFFFFFFFF))]
    allowed = always(_COMMON) | {"clone": _CLONE, "ioctl": _IOCTL, "socket": tuple(families)}
    return compile(allowed, errnos={"clone3": errno.ENOSYS})


_SANDBOX = """
    chroot clone get_mempolicy kcmp mbind mknod mknodat modify_ldt mount personality pivot_root process_madvise process_vm_readv
    process_vm_writev ptrace set_mempolicy setdomainname sethostname setns socket umount2 unshare
"""
"""What a program calls beside the others that makes a sandbox of its own: namespaces, a root, processes that it traces."""


@functools.cache
def sandbox_profile() -> bytes:
    """Return the filter for a sandbox that we jail (runsc), in a user namespace. Whatever of the kernel it has no use for is out of
    reach: keys, BPF, io_uring, userfaultfd, performance events, modules, file handles, clocks, the newer mount calls."""
    allowed = always(_COMMON + _SANDBOX) | {"ioctl": _IOCTL}
    return compile(allowed, errnos={"clone3": errno.ENOSYS})
