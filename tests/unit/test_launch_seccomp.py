"""Filters: an interpreter of classic BPF runs them against every call, and the kernel runs some of them for real."""

from __future__ import annotations

import errno
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from launch_support import launch

from trivisor.core.errors import HostLacks
from trivisor.launch import seccomp
from trivisor.launch.seccomp import Arg
from trivisor.launch.syscalls import SYSCALLS

X86 = SYSCALLS["x86_64"]
ALLOW = 0x7FFF0000
KILL = 0x80000000
EPERM = 0x00050000 | errno.EPERM
ENOSYS = 0x00050000 | errno.ENOSYS


def verdict(program: bytes, number: int, *args: int, arch: int = 0xC000003E) -> int:
    """Run a filter as the kernel would; jumps only go forward, so this ends."""
    data = struct.pack("<IIQ6Q", number, arch, 0, *args, *[0] * (6 - len(args)))
    steps = list(struct.iter_unpack("<HBBI", program))
    at, accumulator = 0, 0
    while True:
        code, yes, no, k = steps[at]
        at += 1
        if code == 0x06:
            return int(k)
        if code == 0x20:
            accumulator = struct.unpack_from("<I", data, k)[0]
        elif code == 0x54:
            accumulator &= k
        elif code == 0x05:
            at += k
        else:
            assert code in (0x15, 0x35)
            at += yes if (accumulator == k if code == 0x15 else accumulator >= k) else no


def default(name: str, *args: int) -> int:
    return verdict(seccomp.default_profile(), X86[name], *args)


@given(st.sets(st.sampled_from(sorted(X86))), st.integers(0, 600))
def test_exactly_the_allowed_calls_pass(names: set[str], stray: int) -> None:
    program = seccomp.compile(seccomp.always(names), machine="x86_64")
    allowed = {X86[name] for name in names}
    for number in (*range(470), stray, 0x3FFFFFFF):
        assert (verdict(program, number) == ALLOW) == (number in allowed)


arguments = st.integers(0, 2**64 - 1) | st.sampled_from([0, 1, 2, 2**32, 2**32 + 1, 2**64 - 1])
masks = st.sampled_from([2**64 - 1, 2**32 - 1, 0x7E020000, 0xFFFFFFFF00000000, 1])
conditions = st.builds(Arg, st.integers(0, 5), st.sampled_from(["==", "!="]), arguments, masks)


@given(
    st.lists(st.lists(conditions, min_size=1, max_size=3).map(tuple), min_size=1, max_size=4).map(tuple),
    st.lists(arguments, min_size=6, max_size=6),
)
def test_rules_on_arguments_mean_what_they_say(rules: tuple[tuple[Arg, ...], ...], args: list[int]) -> None:
    program = seccomp.compile({"write": rules} | seccomp.always("read"), machine="x86_64")

    def holds(arg: Arg) -> bool:
        return ((args[arg.index] & arg.mask) == (arg.value & arg.mask)) == (arg.test == "==")

    passes = any(all(holds(arg) for arg in rule) for rule in rules)
    assert verdict(program, X86["write"], *args) == (ALLOW if passes else EPERM)
    assert verdict(program, X86["read"], *args) == ALLOW


def test_other_architectures_are_refused() -> None:
    program = seccomp.compile(seccomp.always(X86), machine="x86_64")
    assert verdict(program, 1, arch=0x40000003) == KILL  # i386: other numbers for the same calls
    assert verdict(program, 0x40000000 | X86["read"]) == ENOSYS  # x32
    assert verdict(seccomp.compile(seccomp.always("read"), machine="aarch64"), 63, arch=0xC00000B7) == ALLOW
    with pytest.raises(HostLacks):
        seccomp.compile({}, machine="vax")


def test_the_default_profile_is_as_tight_as_dockers() -> None:
    needs_capability = """
        mount umount2 pivot_root chroot setns unshare reboot swapon swapoff init_module finit_module delete_module kexec_load
        kexec_file_load bpf perf_event_open add_key keyctl request_key acct quotactl sethostname setdomainname settimeofday
        clock_settime open_by_handle_at fsopen fsmount fsconfig fspick move_mount open_tree mount_setattr userfaultfd io_uring_setup
        io_uring_enter io_uring_register lookup_dcookie iopl ioperm syslog vhangup process_madvise move_pages mbind set_mempolicy
        get_mempolicy migrate_pages kcmp nfsservctl uselib ustat sysfs create_module query_module get_kernel_syms fanotify_init
        ptrace process_vm_readv process_vm_writev pidfd_getfd
    """
    for name in needs_capability.split():
        assert default(name) == EPERM, name
    assert default("clone3") == ENOSYS
    assert default("clone", 0x10000000) == EPERM  # CLONE_NEWUSER
    assert default("clone", 0x3D0F00) == ALLOW  # a thread
    assert default("socket", 40) == EPERM  # AF_VSOCK
    assert default("socket", 2) == ALLOW
    assert default("ioctl", 0, 0x5412) == EPERM  # TIOCSTI
    assert default("ioctl", 0, 0x1_0000_5412) == EPERM  # the kernel reads 32 bits
    assert default("ioctl", 0, 0x5401) == ALLOW
    assert default("personality", 0x0040000) == EPERM  # ADDR_NO_RANDOMIZE
    assert default("personality", 0xFFFFFFFF) == ALLOW
    for name in ("read", "execve", "futex", "openat", "exit_group", "rseq"):
        assert default(name) == ALLOW, name


def test_an_engine_without_network_makes_unix_sockets_only() -> None:
    for network in (False, True):
        program = seccomp.engine_profile(network)
        assert verdict(program, X86["socket"], 1) == ALLOW
        for family in (2, 10):
            assert verdict(program, X86["socket"], family) == (ALLOW if network else EPERM)
        for family in (16, 17, 40, 38):  # of netlink only routing, no packet, vsock or alg sockets
            assert verdict(program, X86["socket"], family, 3, 9) == EPERM
        assert verdict(program, X86["socket"], 16, 3, 15) == ALLOW, "uevents, of its own namespace"
        for name in ("ptrace", "mknod", "personality", "unshare", "mount"):
            assert verdict(program, X86[name]) == EPERM


def test_filters_stay_small() -> None:
    """A call walks a tree: the deepest takes few instructions."""
    assert len(seccomp.default_profile()) // 8 < 400


def test_the_kernel_takes_them() -> None:
    default_filter = ("seccomp", seccomp.default_profile().hex())
    done = launch((("no-new-privs",), default_filter, ("exec", "/bin/sh", "-c", "grep Seccomp: /proc/self/status; unshare -U true")))
    assert b"Seccomp:\t2" in done.stdout
    assert b"Operation not permitted" in done.stderr
