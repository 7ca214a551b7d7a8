"""What does it cost to shape a program's system calls, beside programs that do the like?

The loops that are measured are a C program (bench/calls.c): an interpreter of the program's own would hide the figure. Whatever is
compared runs turn by turn.
"""

from __future__ import annotations

import errno
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from bench.common import Row, Series, main, row
from trivisor import VMM, Call, Machine, Policy

IMAGE = "debian"
TRUE = ["/bin/true"]
PLACE = "/root/calls"
FILE = "/etc/passwd"
SANDLOCKED = Path(__file__).with_name("sandlocked.py")
NAMED = """
    mkdirat unlinkat renameat2 linkat symlinkat fchmodat fchownat ftruncate fallocate fsync connect bind listen accept4 sendto
    recvfrom socketpair pipe2 dup3 memfd_create inotify_add_watch getcwd chdir fchdir setxattr getxattr statfs fstatfs flock mlock
"""
"""Calls that the rules of the policy of 40 are about: none that is timed."""
RULES = 40
RETURNED = 4242
"""What handlers, sandlock's too, have getppid return."""
NOTES = """
A call answered by a Python handler: the handler returns a number, or reads the path and refuses it. sandlock's handlers do the same
on the host, where it is installed. Medians are of many short rounds, so a busy host shows in them; "at its quickest" is the least of
all rounds, of the peer as well. The peers of the other rows are the same program without the policy, turn by turn, in the same
machine; of strace's row, the same program without it on the host.
"""

Take = Callable[[], list[float]]


@contextmanager
def _compiled() -> Iterator[Path]:
    """Give the program that makes the calls, compiled."""
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder, "calls")
        source = Path(__file__).with_name("calls.c")
        subprocess.run(["cc", "-O2", "-static", "-Wall", "-Wextra", "-Werror", "-o", made, source], check=True)
        Path(folder).chmod(0o755)
        yield made


@contextmanager
def _running(vmm: VMM, wall: str, program: Path) -> Iterator[Machine]:
    with vmm.run(IMAGE, wall=wall) as vm:
        vm.files.upload(program, PLACE)
        vm.exec(TRUE, check=True)
        yield vm


def _numbers(text: str, result: str, returned: int | None, scale: float = 1000) -> list[float]:
    """Take the program's figures, if its calls returned what they should."""
    found = [float(line) / scale for line in text.split()]
    assert found
    assert returned is None or int(result) == returned, f"a call returned {result.strip()} instead of {returned}"
    return found


def _turns(rounds: int, *takes: Take) -> list[Series]:
    """Take each in turn, `rounds` times. A take is a program's start and several readings."""
    series = [Series() for _ in takes]
    for _ in range(rounds):
        for one, take in zip(series, takes, strict=True):
            one.values += take()
    return series


def _loop(vm: Machine, what: str, batches: int, count: int, policy: Policy | None, returned: int | None, scale: float = 1000) -> Take:
    """Return what takes readings of one loop in a machine: microseconds a call; nanoseconds with a `scale` of 1."""

    def take() -> list[float]:
        done = vm.exec([PLACE, what, str(batches), str(count), FILE], policy=policy, check=True, timeout=120)
        return _numbers(done.text, done.error_text, returned, scale)

    return take


def _least(found: Row, series: Series, against: Series | None = None, share: float | None = None) -> Row:
    """Return the row of the least values beside that of the medians."""
    least = min(against.values) if against and against.values else None
    bound = share * least if share and least else found.bound
    return replace(found, what=f"{found.what}, at its quickest", value=min(series.values), peer_value=least, bound=bound, spread=None)


# -- handlers -------------------------------------------------------------------------------------


def _returning() -> Policy:
    policy = Policy()

    @policy.on("getppid")
    def parent(call: Call) -> None:
        call.returns(RETURNED)

    return policy


def _looking() -> Policy:
    policy = Policy()

    @policy.on("openat")
    def opened(call: Call) -> None:
        if call.path() == FILE:
            call.errno(errno.ENOENT)
        else:
            call.proceed()

    return policy


def _sandlock(program: Path, what: str, returned: int, *call: str) -> Take:
    """Return what takes readings of the same loop under sandlock's handler; none where it is not installed."""
    argv = [sys.executable, str(SANDLOCKED), *call, "--", str(program), what, "40", "50", FILE]

    def take() -> list[float]:
        done = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=120)
        return _numbers(done.stdout, done.stderr, returned)

    return take if importlib.util.find_spec("sandlock") else list


def _handlers(vm: Machine, program: Path, rounds: int) -> list[Row]:
    plain, plain_peer = _turns(
        rounds, _loop(vm, "parent", 200, 50, _returning(), RETURNED), _sandlock(program, "parent", RETURNED, "getppid")
    )
    path, path_peer = _turns(
        rounds, _loop(vm, "look", 200, 50, _looking(), -errno.ENOENT), _sandlock(program, "look", -errno.ENOENT, "openat", "--path")
    )
    name = "sandlock's handler" if plain_peer.values else ""
    what = f"{vm.wall}: a call answered by a Python handler"
    rows = [row(what, plain, "us", bound=15, peer=name, against=plain_peer)]
    rows.append(_least(rows[-1], plain, plain_peer))
    rows.append(row(f"{what} that reads a path", path, "us", bound=30, peer=name, against=path_peer))
    rows.append(_least(rows[-1], path, path_peer))
    return rows


def _far_handlers(vm: Machine, rounds: int) -> list[Row]:
    plain, path = _turns(rounds, _loop(vm, "parent", 20, 10, _returning(), RETURNED), _loop(vm, "look", 20, 10, _looking(), -errno.ENOENT))
    what = f"{vm.wall}: a call answered by a Python handler"
    found = [row(what, plain, "us", bound=2000), row(f"{what} that reads a path", path, "us", bound=2000)]
    return [line for pair in zip(found, (plain, path), strict=True) for line in (pair[0], _least(*pair))]


# -- what the kernel does -------------------------------------------------------------------------


def _forty() -> Policy:
    """Return a policy of 40 rules: some for the kernel, some by argument, some for the answerer, none about open, read and close."""
    policy = Policy()
    for number, name in enumerate(NAMED.split()):
        when: list[dict[str, object]] = [{}, {"args": {1: ("==", 7)}}, {"after": 5}]
        policy.fail(name, "EIO", **when[number % 3])
    for number in range(RULES - len(policy.rules)):
        policy.fail("socket", "EACCES", args={0: 30 + number})
    assert len(policy.rules) == RULES
    return policy


def _kernel(vm: Machine, rounds: int) -> list[Row]:
    refuse, pretend = Policy(), Policy()
    refuse.errno("getppid", "EPERM")
    pretend.returns("getppid", 0)
    parents = ((None, None), (refuse, -errno.EPERM), (pretend, 0))
    native, refused, pretended = _turns(rounds, *(_loop(vm, "parent", 100, 1000, policy, returned, 1) for policy, returned in parents))
    without, beside = _turns(rounds, *(_loop(vm, "file", 100, 100, policy, None, 1) for policy in (None, _forty())))
    rows = []
    for what, series, peer, against, share in (
        ("open + read + close beside a policy of 40 rules", beside, "default filter", without, 1.15),
        ("a call that a rule fails in the kernel", refused, "native", native, 1.2),
        ("a call that a rule returns 0 for in the kernel", pretended, "native", native, 1.2),
    ):
        line = row(f"{vm.wall}: {what}", series, "ns", peer=peer, against=against, share=share)
        rows += [line, _least(line, series, against, share)]
    return rows


# -- trace and exec -------------------------------------------------------------------------------

_CALLS = ("openat", "connect", "execve")


def _elapsed(run: Callable[[], object]) -> Take:
    """Return what takes one reading of a whole command: milliseconds."""

    def take() -> list[float]:
        began = time.perf_counter()
        run()
        return [(time.perf_counter() - began) * 1000]

    return take


def _traced(vm: Machine, argv: list[str]) -> None:
    with vm.syscalls.trace(argv, _CALLS) as trace:
        events = list(trace)
    assert len(events) >= len(_CALLS)


def _trace(vm: Machine, program: Path, rounds: int) -> list[Row]:
    """Time a program that makes some 50,000 calls, of which a dozen are traced."""
    strace = ["strace", "--seccomp-bpf", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={','.join(_CALLS)}"]
    work = ["work", "2", "0", FILE]
    argv = [str(program), *work]

    def host(*before: str) -> None:
        subprocess.run([*before, *argv], check=True, stdin=subprocess.DEVNULL)

    takes = [_elapsed(lambda: vm.exec([PLACE, *work], check=True)), _elapsed(lambda: _traced(vm, [PLACE, *work]))]
    if shutil.which("strace"):
        takes += [_elapsed(host), _elapsed(lambda: host(*strace))]
    own, traced, *others = _turns(rounds, *takes)
    what = "a program under trace, a dozen calls of 50,000"
    rows = [row(f"{vm.wall}: {what}", traced, "ms", peer="without", against=own, share=1.05)]
    if others:
        rows.append(row("strace --seccomp-bpf -f: the same program", others[1], "ms", peer="without", against=others[0]))
    return rows


def _execs(vm: Machine, rounds: int) -> list[Row]:
    """Time commands with a policy beside such without."""
    ruled = Policy()
    ruled.fail("write", "ENOSPC", path="/data/*", after=5)
    policies = {"rules for the kernel": _forty_kernel(), "rules for the answerer": ruled, "a handler": _returning()}

    def command(policy: Policy | None) -> Take:
        timed = _elapsed(lambda: vm.exec(TRUE, policy=policy, check=True))

        def take() -> list[float]:
            vm.exec(TRUE, check=True)  # what the command before has left to be done is not to be counted here
            return timed()

        return take

    takes = [command(policy) for policy in (None, *policies.values())]
    _turns(3, *takes)
    without, *others = _turns(rounds, *takes)
    rows = []
    for name, series in zip(policies, others, strict=True):
        more = Series([ours - theirs for ours, theirs in zip(series.values, without.values, strict=True)])
        rows.append(row(f"{vm.wall}: exec with a policy ({name}), beyond exec without", more, "ms", bound=2))
    return rows


def _forty_kernel() -> Policy:
    policy = Policy()
    for name in NAMED.split():
        policy.errno(name, "EIO")
    return policy


def rows(quick: bool) -> list[Row]:
    """Measure the walls that this host offers."""
    vmm = VMM()
    offered = {report.wall for report in vmm.walls() if report.available}
    found: list[Row] = []
    with _compiled() as program:
        if "container" in offered:
            with _running(vmm, "container", program) as vm:
                found += _handlers(vm, program, 3 if quick else 20)
                found += _kernel(vm, 3 if quick else 20)
                found += _trace(vm, program, 5 if quick else 25)
                found += _execs(vm, 10 if quick else 60)
        if "vm" in offered:
            with _running(vmm, "vm", program) as vm:
                found += _far_handlers(vm, 2 if quick else 10)
                found += _execs(vm, 5 if quick else 20)
    return found


if __name__ == "__main__":
    main(rows, NOTES)
