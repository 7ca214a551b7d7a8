"""Filters with verdicts of their own: an interpreter of classic BPF runs them against every call, and the kernel runs some for real."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import signal
import struct
import subprocess
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trivisor.core.errors import InvalidSpec
from trivisor.launch import seccomp, syscalls
from trivisor.launch.seccomp import ALLOW, KILL, LOG, NOTIFY, TRACE, Arg, Profile, compile_policy, refuse
from trivisor.vos.syscalls.policy import Policy

X86 = syscalls.SYSCALLS["x86_64"]
WHOLE = 2**64 - 1


def run(program: bytes, number: int, *args: int, arch: int = 0xC000003E) -> tuple[int, bool]:
    """Run a filter as the kernel would: what it returns, and whether it looked at anything but the number."""
    data = struct.pack("<IIQ6Q", number, arch, 0, *args, *[0] * (6 - len(args)))
    steps = list(struct.iter_unpack("<HBBI", program))
    at, accumulator, looked = 0, 0, False
    while True:
        code, yes, no, k = steps[at]
        at += 1
        if code == 0x06:
            return int(k), looked
        if code == 0x20:
            accumulator = struct.unpack_from("<I", data, k)[0]
            looked |= k > 4
        elif code == 0x54:
            accumulator &= k
        elif code == 0x05:
            at += k
        else:
            holds = {0x15: accumulator == k, 0x25: accumulator > k, 0x35: accumulator >= k}[code]
            at += yes if holds else no


def verdict(program: bytes, name: str, *args: int) -> int:
    return run(program, X86[name], *args)[0]


values = st.integers(0, WHOLE) | st.sampled_from([0, 1, 2, 2**31, 2**32 - 1, 2**32, 2**32 + 1, WHOLE])
masks = st.sampled_from([WHOLE, 2**32 - 1, 0x7E020000, 0xFFFFFFFF00000000, 1, 0xFFFF0000FFFF])
conditions = st.builds(Arg, st.integers(0, 5), st.sampled_from(["==", "!=", "<", "<=", ">", ">="]), values, masks)
actions = st.sampled_from([ALLOW, LOG, TRACE, NOTIFY, KILL, refuse(0), refuse(28)])


def holds(arg: Arg, args: list[int]) -> bool:
    left, right = args[arg.index] & arg.mask, arg.value & arg.mask
    return {"==": left == right, "!=": left != right, "<": left < right, "<=": left <= right, ">": left > right, ">=": left >= right}[
        arg.test
    ]


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.lists(conditions, max_size=12).map(tuple), actions), min_size=1, max_size=6),
    st.lists(values, min_size=6, max_size=6),
)
def test_the_first_verdict_whose_conditions_hold_decides(given_rules: list[tuple[tuple[Arg, ...], int]], args: list[int]) -> None:
    program = compile_policy(seccomp.DEFAULT, {"write": given_rules, "mount": given_rules}, machine="x86_64")
    decided = next((action for rule, action in given_rules if all(holds(arg, args) for arg in rule)), None)
    assert verdict(program, "write", *args) == (ALLOW if decided is None else decided)
    assert verdict(program, "mount", *args) == (refuse(errno.EPERM) if decided is None else decided)
    assert verdict(program, "read", *args) == ALLOW
    assert verdict(program, "reboot", *args) == refuse(errno.EPERM)


def forty() -> dict[str, list[tuple[tuple[Arg, ...], int]]]:
    """Forty rules with conditions, on forty calls."""
    names = [name for name in sorted(seccomp.DEFAULT.allowed) if name not in ("read", "openat", "close")][:40]
    order = ("==", ">=", "<", "!=")
    return {name: [(tuple(Arg(i, order[i], 2**33 + 7 * i) for i in range(4)), NOTIFY)] for name in names}


def test_a_call_that_no_rule_names_costs_what_it_costs_under_the_profile() -> None:
    """The kernel remembers calls that pass whatever their arguments are (seccomp_cache_prepare): no rule may cost others that."""
    rules = forty()
    program = compile_policy(seccomp.DEFAULT, rules)
    plain = compile_policy(seccomp.DEFAULT, {})
    for name, number in X86.items():
        if name not in rules:
            assert run(program, number) == run(plain, number), name
            assert not (run(plain, number)[1] and not seccomp.DEFAULT.conditions(name)), name
    assert run(program, X86["openat"]) == (ALLOW, False)


def test_forty_rules_fit_a_filter_and_too_many_are_refused() -> None:
    assert len(compile_policy(seccomp.DEFAULT, forty())) // 8 < 2500
    everywhere = {name: [(tuple(Arg(i, "==", 2**40 + number) for i in range(6)), KILL)] for name, number in X86.items()}
    with pytest.raises(InvalidSpec, match="4096"):
        compile_policy(seccomp.DEFAULT, everywhere)


def test_names_of_no_call_are_refused_with_the_nearest() -> None:
    for compiled in (
        lambda: seccomp.compile(seccomp.always("read opennat")),
        lambda: seccomp.compile({}, errnos={"opennat": 1}),
        lambda: compile_policy(seccomp.OPEN, {"opennat": [((), KILL)]}),
    ):
        with pytest.raises(InvalidSpec, match="opennat") as refused:
            compiled()
        assert "openat" in refused.value.hint
    assert syscalls.number("open", "aarch64") is None  # a call that only others have is no mistake
    assert seccomp.compile(seccomp.always("open read"), machine="aarch64")


def test_calls_go_by_number_too() -> None:
    here = syscalls.table()
    policy = Policy()
    assert policy.deny(here["connect"]).calls == ("connect",)
    assert policy.fail([here["write"], "pwrite64"], "EIO", args={"count": 7}).calls == ("write", "pwrite64")
    policy.on(here["uname"], "sethostname", here["uname"])(lambda call: call.proceed())
    policy.trace(here["execve"])
    assert policy.handlers[0].calls == ("uname", "sethostname") and policy.tracing and policy.tracing.calls == ("execve",)
    assert [syscalls.name(number, "aarch64") for number in (56, 63, 160, 435)] == ["openat", "read", "uname", "clone3"]
    for wrong in (-1, 334, 1 << 40, True, 244):
        with pytest.raises(InvalidSpec, match=f"no system call {wrong}") as refused:
            syscalls.name(wrong, "aarch64")
        assert "aarch64" in refused.value.hint


def test_the_profiles_name_only_calls_that_there_are() -> None:
    for machine in syscalls.SYSCALLS:
        for profile in (seccomp.DEFAULT, seccomp.CONTAINER, seccomp.OUTER, seccomp.SANDBOX, seccomp.engine(False), seccomp.engine(True)):
            compile_policy(profile, {}, machine=machine)


def test_the_tables_agree_with_the_headers_of_this_machine() -> None:
    header = "/usr/include/x86_64-linux-gnu/asm/unistd_64.h"
    if not os.path.exists(header):
        pytest.skip("needs linux-libc-dev")
    with open(header) as lines:
        known = {
            words[1][5:]: int(words[2])
            for line in lines
            if (words := line.split())[:1] == ["#define"] and words[1][:5] == "__NR_" and len(words) == 3
        }
    assert {name: number for name, number in X86.items() if name in known} == {name: n for name, n in known.items() if name in X86}
    assert set(known) <= set(X86)


def test_the_table_of_arm64_agrees_with_the_generic_headers() -> None:
    """The kernel gives arm64 no table of its own: its numbers are asm-generic's, which this machine's headers have, too."""
    if shutil.which("cc") is None or not os.path.exists("/usr/include/asm-generic/unistd.h"):
        pytest.skip("needs cc and linux-libc-dev")
    wanted = "RENAMEAT NEW_STAT SET_GET_RLIMIT SYS_CLONE3 MEMFD_SECRET"  # arch/arm64/include/uapi/asm/unistd.h
    source = "".join(f"#define __ARCH_WANT_{word}\n" for word in wanted.split()) + "#include <asm-generic/unistd.h>\n"
    said = subprocess.run(["cc", "-E", "-dM", "-x", "c", "-"], input=source, capture_output=True, text=True, check=True).stdout
    defined = {words[1]: words[2] for line in said.splitlines() if len(words := line.split()) == 3}
    known = {name[5:]: int(defined.get(value, value)) for name, value in defined.items() if name.startswith("__NR_")}
    for no_call in ("arch_specific_syscall", "syscalls"):
        del known[no_call]
    assert len(known) > 300
    arm = syscalls.SYSCALLS["aarch64"]
    assert {name: arm.get(name) for name in known} == known
    assert all(syscalls.name(number, "aarch64") == name and syscalls.number(name, "aarch64") == number for name, number in known.items())
    assert all(number > max(known.values()) for name, number in arm.items() if name not in known), "what these headers are too old for"


def test_the_outer_profile_lets_through_what_may_be_answered_and_each_command_is_denied_it() -> None:
    outer, inner = seccomp.outer_profile(), seccomp.container_profile()
    for name in (
        "mount",
        "umount2",
        "mknod",
        "mknodat",
        "chroot",
        "pivot_root",
        "sethostname",
        "setdomainname",
        "unshare",
        "setns",
        "swapon",
    ):
        assert verdict(outer, name) == ALLOW
        assert verdict(inner, name) == (ALLOW if name in ("mknod", "mknodat", "chroot") else refuse(errno.EPERM))
    for name in ("bpf", "keyctl", "io_uring_setup", "kexec_load", "init_module", "userfaultfd", "perf_event_open"):
        assert verdict(outer, name) == refuse(errno.EPERM)
    assert verdict(outer, "clone", 0x10000000) == refuse(errno.EPERM)


# -- by the kernel ---------------------------------------------------------------------------------


class _Fprog(ctypes.Structure):
    _fields_ = [("len", ctypes.c_ushort), ("filter", ctypes.c_void_p)]


def under(program: bytes, body: Callable[[], int]) -> int:
    """Run `body` in a forked child under the filter, and return what waitpid says of it."""
    child = os.fork()
    if child == 0:
        status = 99
        try:
            libc = ctypes.CDLL(None, use_errno=True)
            memory = ctypes.create_string_buffer(program, len(program))
            fprog = _Fprog(len(program) // 8, ctypes.addressof(memory))
            libc.prctl(38, 1, 0, 0, 0)
            assert libc.prctl(22, 2, ctypes.byref(fprog), 0, 0) == 0, os.strerror(ctypes.get_errno())
            status = body()
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1]


def code_of(call: Callable[[], object]) -> int:
    try:
        call()
    except OSError as error:
        return error.errno or 98
    return 0


def test_the_kernel_fails_calls_whose_arguments_meet_the_conditions() -> None:
    rules = {"lseek": [((Arg(2, "==", os.SEEK_END, 0xFFFFFFFF), Arg(1, ">=", 2**33)), refuse(errno.ENOSPC))]}
    program = compile_policy(seccomp.DEFAULT, rules)
    fd = os.memfd_create("seek")
    try:
        assert under(program, lambda: code_of(lambda: os.lseek(fd, 2**33, os.SEEK_END))) == errno.ENOSPC << 8
        assert under(program, lambda: code_of(lambda: os.lseek(fd, 2**33 - 1, os.SEEK_END))) == 0
        assert under(program, lambda: code_of(lambda: os.lseek(fd, 2**33, os.SEEK_SET))) == 0
    finally:
        os.close(fd)


def test_the_kernel_returns_zero_for_a_call_that_is_not_made() -> None:
    fd = os.memfd_create("kept")
    try:
        program = compile_policy(Profile(default=None), {"ftruncate": [((), refuse(0))]})
        assert under(program, lambda: code_of(lambda: os.ftruncate(fd, 4096))) == 0
        assert os.fstat(fd).st_size == 0
    finally:
        os.close(fd)


def test_the_kernel_kills_and_logs() -> None:
    program = compile_policy(seccomp.DEFAULT, {"sync": [((), KILL)], "getppid": [((), LOG)]})
    assert os.WTERMSIG(under(program, lambda: code_of(os.sync))) == signal.SIGSYS
    assert under(program, lambda: 0 if os.getppid() > 0 else 1) == 0
