"""Commands with a policy in a real container: operations as they go over the line, and a listener borrowed from the answerer.

What policies are compiled to is tested elsewhere; here the operations are written out, and who answers is a loop in the test.
"""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import secrets
import select
import signal
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from trivisor import VMM, Machine
from trivisor.core.errors import GuestError, GuestGone
from trivisor.core.state import State
from trivisor.launch import cgroup_layout, ending
from trivisor.launch.syscalls import SYSCALLS
from trivisor.vos.line import Line
from trivisor.vos.processes import ExecResult, Processes
from trivisor.vos.syscalls.attach import Attached, attach
from trivisor.vos.syscalls.direct import DirectListener
from trivisor.vos.syscalls.listener import CONTINUE, NR, PID, Notification

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="filters of this test are for x86-64")
NUMBERS = SYSCALLS["x86_64"]
ALLOW, NOTIFY, ERRNO, KILL = 0x7FFF0000, 0x7FC00000, 0x50000, 0x80000000
MKDIR = "import os\ntry: os.mkdir('/tmp/made'); print('made')\nexcept OSError as error: print(error.errno)"

Operations = list[tuple[str, ...]]


@pytest.fixture(scope="module")
def vm(image_home: Path) -> Iterator[Machine]:
    with VMM(image_home) as vmm, vmm.run("debian", wall="container") as machine:
        yield machine


@pytest.fixture(scope="module")
def line(vm: Machine) -> Iterator[Line]:
    opened = Line.connect(vm._folder.line, vm.name)
    yield opened
    opened.close()


def seccomp(verdict: int, *calls: str) -> tuple[str, str]:
    """A filter with a verdict for some calls; the others pass."""
    code = [
        (0x20, 0, 0, 0),
        *((0x15, len(calls) - i, 0, NUMBERS[name]) for i, name in enumerate(calls)),
        (6, 0, 0, ALLOW),
        (6, 0, 0, verdict),
    ]
    return ("seccomp", b"".join(struct.pack("<HBBI", *step) for step in code).hex())


def under(line: Line, operations: Operations) -> Processes:
    """What runs commands under these operations."""
    fixed = SimpleNamespace(compiled=lambda policy: SimpleNamespace(operations=operations, policy=None), architecture="x86_64")
    return Processes(lambda: line, "test", {}, cast(Any, fixed))


def run(line: Line, operations: Operations, argv: str | Sequence[str], **options: Any) -> ExecResult:
    return under(line, operations).exec(argv, timeout=30, **options)


@dataclass
class Receiver:
    """Who attaches to the policy's listener and answers what comes, until it is closed."""

    socket: Path
    decide: Callable[[Notification, DirectListener], tuple[int, int, int] | None]
    """(value, errno, flags), None: no answer."""
    token: bytes = field(default_factory=lambda: secrets.token_bytes(16))
    taken: list[Notification] = field(default_factory=list)
    listener: DirectListener | None = None
    attached: Attached | None = None
    held: threading.Event = field(default_factory=threading.Event)

    def operations(self, *calls: str) -> Operations:
        numbers = ",".join(str(NUMBERS[name]) for name in calls)
        return [seccomp(NOTIFY, *calls), ("token", self.token.hex()), ("handler", numbers)]

    def serve(self) -> None:
        fd, self.attached = attach(self.socket, self.token, "test", 10)
        self.listener = DirectListener(fd, "test", self.attached)
        with contextlib.suppress(GuestGone, OSError, ValueError):
            poller = select.poll()
            poller.register(self.listener.fileno(), select.POLLIN)
            while poller.poll(20_000)[0][1] == select.POLLIN:  # and POLLHUP when the last program has ended
                notification = self.listener.receive()
                if notification is None:
                    continue
                self.taken.append(notification)
                if (answer := self.decide(notification, self.listener)) is None:
                    self.held.set()
                else:
                    with contextlib.suppress(GuestError):
                        self.listener.answer(notification, *answer)


@contextlib.contextmanager
def receiver(vm: Machine, decide: Callable[[Notification, DirectListener], tuple[int, int, int] | None]) -> Iterator[Receiver]:
    one = Receiver(vm._folder.answer, decide)
    thread = threading.Thread(target=one.serve)
    thread.start()
    try:
        yield one
    finally:
        thread.join(30)
        assert not thread.is_alive(), "the listener ends with the last of its programs"
        if one.listener is not None:
            one.listener.close()


def refuse(notification: Notification, listener: DirectListener) -> tuple[int, int, int]:
    return (0, errno.EIO, 0)


def proceed(notification: Notification, listener: DirectListener) -> tuple[int, int, int]:
    return (0, 0, CONTINUE)


# -- answered by the kernel -----------------------------------------------------------------------


def test_each_exec_has_the_filter_that_it_was_given(line: Line) -> None:
    python = ["python3", "-c", MKDIR]
    for code in (errno.ENOSPC, errno.EROFS):
        assert run(line, [seccomp(ERRNO | code, "mkdir")], python).text == f"{code}\n"
    assert run(line, [], [*python[:-1], "print(7)"]).text == "7\n"
    assert run(line, [seccomp(KILL, "uname")], ["uname"]).signal == signal.SIGSYS
    assert run(line, [seccomp(ERRNO | errno.EACCES, "execve")], ["true"]).exit_code == 126


def test_without_a_filter_of_its_own_the_machines_holds(vm: Machine, line: Line) -> None:
    count = "sed -n 's/Seccomp_filters:.//p' /proc/self/status; unshare -U true || echo refused"
    plain, empty = vm.exec(count), run(line, [], count)
    assert plain.text == empty.text == "2\nrefused\n"
    own = run(line, [seccomp(ERRNO | errno.EIO, "mkdir")], count)
    assert own.text.startswith("2\n"), "instead of the default one, not with it"
    assert vm.exec("sed -n 's/Seccomp_filters:.//p' /proc/1/status").text == "1\n"


def test_builtins_are_under_the_default_filter(vm: Machine) -> None:
    """A builtin that is shown its own status shows the two filters, as a command's does."""
    status = vm.files.read_text("/proc/self/status")
    assert "Seccomp_filters:\t2\n" in status and "NoNewPrivs:\t1\n" in status


def test_paths(line: Line) -> None:
    script = (
        "mkdir -p /tmp/in && echo x > /tmp/in/file && mv /tmp/in/file /tmp/in/other && mkdir /tmp/in/sub && mv /tmp/in/other /tmp/in/sub/;"
    )
    script += "echo $?; touch /tmp/out 2>&1; cat /etc/passwd 2>&1"
    places: Operations = [("landlock", path, "rx") for path in ("/usr", "/bin", "/lib", "/lib64")]
    run(line, [], "mkdir -p /tmp/in")
    r = run(line, [*places, ("landlock", "/tmp/in", "rw"), ("landlock", "/dev/null", "rw")], script)
    assert r.text.splitlines()[0] == "0" and r.text.count("Permission denied") == 2, r
    assert run(line, [("landlock", "none")], ["true"]).exit_code == 126
    with pytest.raises(GuestError, match="/no/such: No such file"):
        run(line, [("landlock", "/no/such", "r")], ["true"])


@pytest.mark.parametrize(
    "operations",
    [
        [("nonsense",)],
        [("seccomp", "00")],
        [("rule", "1", "83", "errno=5")],
        [seccomp(NOTIFY, "mkdir"), ("handler", "83")],
        [seccomp(NOTIFY, "mkdir"), ("token", "x" * 32), ("handler", "83")],
        [("landlock", "relative", "r")],
        [("landlock-net", "some")],
    ],
)
def test_malformed_operations_start_nothing(line: Line, operations: Operations) -> None:
    with pytest.raises(GuestError, match="Invalid argument"):
        run(line, operations, ["true"])


def test_too_many_rules(line: Line) -> None:
    rules: Operations = [("rule", str(i), "83", "errno=5", "path=/" + "x" * 200) for i in range(400)]
    with pytest.raises(GuestError, match="too long"):
        run(line, [seccomp(NOTIFY, "mkdir"), ("token", "0" * 32), *rules], ["true"])


def test_user_cwd_and_terminal_come_before_the_filter(line: Line) -> None:
    """None of what makes the command what it is is asked of its own filter."""
    calls = ("setresuid", "setresgid", "setgroups", "setsid", "chdir", "ioctl", "setuid", "landlock_restrict_self")
    kernel: Operations = [seccomp(ERRNO | errno.EPERM, *calls)]
    r = run(line, kernel, ["python3", "-c", "import os; print(os.getuid(), os.getgid(), os.getcwd())"], user="nobody", cwd="/usr")
    assert r.text.split() == ["65534", "65534", "/usr"]
    process = under(line, kernel).spawn(["sh", "-c", "read a; echo got $a; echo $(id -u)"], pty=True, user="nobody")
    process.stdin.write(b"word\n")
    said = process.stdout.read()
    assert b"got word" in said and b"65534" in said
    assert process.wait(30) == 0


def test_a_setuid_program_raises_nothing_and_keeps_the_filter(vm: Machine, line: Line) -> None:
    vm.exec("cp /usr/bin/mkdir /tmp/raised && chmod 4755 /tmp/raised && rm -rf /tmp/raised-*", check=True)
    r = run(line, [], "/tmp/raised /tmp/raised-one && stat -c %u /tmp/raised-one", user="nobody")
    assert r.text == "65534\n", r
    r = run(line, [seccomp(ERRNO | errno.EDOM, "mkdir")], ["/tmp/raised", "/tmp/raised-two"], user="nobody")
    assert r.exit_code == 1 and "out of domain" in r.error_text


# -- answered by who is attached ------------------------------------------------------------------


def test_the_listener_reaches_who_bears_the_token(vm: Machine, line: Line) -> None:
    with receiver(vm, refuse) as one:
        assert run(line, one.operations("mkdir"), ["python3", "-c", MKDIR]).text == f"{errno.EIO}\n"
    assert [notification[NR] for notification in one.taken] == [NUMBERS["mkdir"]]


def test_two_commands_have_two_listeners(vm: Machine, line: Line) -> None:
    vm.exec("rm -rf /tmp/made")  # before: who attaches waits five seconds for his command, and no longer
    with receiver(vm, refuse) as one, receiver(vm, proceed) as other:
        assert run(line, one.operations("mkdir"), ["python3", "-c", MKDIR]).text == "5\n"
        assert run(line, other.operations("mkdir"), ["python3", "-c", MKDIR]).text == "made\n"
    assert len(one.taken) == len(other.taken) == 1


STARTS = {
    "fork": "pid = os.fork()\nif not pid: work(); os._exit(0)\nos.waitpid(pid, 0)",
    "vfork": "import subprocess; subprocess.run(['mkdir', '/tmp/made'], stderr=subprocess.DEVNULL, close_fds=False)",
    "clone": "import threading; t = threading.Thread(target=work); t.start(); t.join()",
    "execve": "os.execv('/usr/bin/mkdir', ['mkdir', '/tmp/made'])",
    "daemon": """
ends, held = os.pipe()
if not os.fork():
    os.setsid()
    if not os.fork(): work()
    os._exit(0)
os.close(held)
os.read(ends, 1)""",
}


@pytest.mark.parametrize("how", STARTS)
def test_the_policy_is_inherited(vm: Machine, line: Line, how: str) -> None:
    code = "import os\ndef work():\n try: os.mkdir('/tmp/made')\n except OSError as error: assert error.errno == 5\n" + STARTS[how]
    vm.exec("rm -rf /tmp/made")
    with receiver(vm, refuse) as one:
        run(line, one.operations("mkdir"), ["python3", "-c", code])
    assert len(one.taken) == 1
    assert not vm.files.exists("/tmp/made")


def test_execve_itself_is_held(vm: Machine, line: Line) -> None:
    with receiver(vm, proceed) as one:
        assert run(line, one.operations("execve"), ["/bin/sh", "-c", "/bin/true; exec /bin/true"]).exit_code == 0
    assert len(one.taken) == 3
    with receiver(vm, refuse) as one:
        assert run(line, one.operations("execve"), ["/bin/true"]).exit_code == 126


def test_64_threads_that_all_trap(vm: Machine, line: Line) -> None:
    code = """
import os, threading
refused = []
gate = threading.Barrier(64)
def work():
    gate.wait()
    for _ in range(20):
        try: os.mkdir('/tmp/made')
        except OSError as error: refused.append(error.errno)
threads = [threading.Thread(target=work) for _ in range(64)]
[t.start() for t in threads]; [t.join() for t in threads]
print(len(refused), set(refused))
"""
    with receiver(vm, refuse) as one:
        assert run(line, one.operations("mkdir"), ["python3", "-c", code]).text == "1280 {5}\n"
    assert len(one.taken) == 1280 and len({notification[PID] for notification in one.taken}) == 64


@pytest.mark.parametrize("calls", [("mkdir", "setresuid", "setresgid", "setgroups", "chdir", "setsid", "ioctl")])
def test_user_and_terminal_with_a_listener(vm: Machine, line: Line, calls: tuple[str, ...]) -> None:
    with receiver(vm, proceed) as one:
        process = under(line, one.operations(*calls)).spawn(["sh", "-c", "id -u; read a; mkdir /tmp/$a"], pty=True, user="nobody")
        process.stdin.write(b"as-nobody\n")
        assert b"65534" in process.stdout.read()
        assert process.wait(30) == 0
    assert NUMBERS["mkdir"] in {notification[NR] for notification in one.taken}
    assert {NUMBERS[name] for name in ("setresuid", "setgroups", "setsid")}.isdisjoint(notification[NR] for notification in one.taken)
    assert vm.exec("stat -c %u /tmp/as-nobody").text == "65534\n"


def test_no_descriptor_of_ours_comes_into_the_program(vm: Machine, line: Line) -> None:
    with receiver(vm, proceed) as one:
        listing = "import os; print(sorted(int(fd) for fd in os.listdir('/proc/self/fd')))"
        operations = [*one.operations("mkdir"), ("landlock", "/", "rx")]
        r = run(line, operations, ["python3", "-c", listing + "; os.path.exists('/tmp/made') or 0"])
    assert r.text == "[0, 1, 2, 3]\n", "the third is the folder's"


def test_signals_end_a_held_call(vm: Machine, line: Line) -> None:
    with receiver(vm, lambda notification, listener: None) as one:
        process = under(line, one.operations("mkdir")).spawn(["python3", "-c", MKDIR])
        assert one.held.wait(30)
        process.kill(signal.SIGKILL)
        assert process.wait(30) == 128 + signal.SIGKILL


def test_rules_without_anybody_attached(vm: Machine, line: Line) -> None:
    """The answerer's own work: rules hold without an owner, and what they log is in the machine's log."""
    number = str(NUMBERS["mkdir"])
    rules: Operations = [
        ("rule", "1", number, "log", "path=/tmp/logged*", "on=0p"),
        ("rule", "2", number, "errno=28", "path=/tmp/*", "on=0p", "after=1"),
    ]
    operations = [seccomp(NOTIFY, "mkdir"), ("token", secrets.token_hex(16)), *rules]
    r = run(line, operations, "mkdir /tmp/logged-here; mkdir /tmp/first; mkdir /tmp/second; mkdir /srv/third; ls -d /tmp/first /srv/third")
    assert r.text.split() == ["/srv/third", "/tmp/first"] and "second" in r.error_text, r
    assert _until(lambda: b"/tmp/logged-here" in b"".join(vm.logs(source="answer")))


# -- the machine's life ---------------------------------------------------------------------------


def test_pause_while_a_call_is_held(vm: Machine, line: Line) -> None:
    if cgroup_layout.layout().of("freezer") is None:
        pytest.skip("needs a freezer that can be used")
    vm.exec("rm -rf /tmp/made")
    with receiver(vm, lambda notification, listener: None) as one:
        process = under(line, one.operations("mkdir")).spawn(["python3", "-c", MKDIR])
        assert one.held.wait(30)
        begun = time.monotonic()
        vm.pause()
        assert time.monotonic() - begun < 8, "it waits for nobody's answer"
        assert vm.state is State.PAUSED
        assert one.listener is not None
        assert one.listener.answer(one.taken[0], 0, errno.EIO, 0)
        assert not select.select([], [], [], 0.3)[0]
        assert vm.state is State.PAUSED
        assert process.poll() is None
        vm.resume()
        assert process.stdout.read() == b"5\n"
        assert process.wait(30) == 0


def answerers(vm: Machine) -> list[int]:
    return [child for child in ending.children(ending.identity(vm._folder)[0]) if _said(child, "comm") == "tvinit-answer\n"]


def _said(pid: int, name: str) -> str:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has gone
        return Path(f"/proc/{pid}/{name}").read_text()
    return ""


def test_there_is_an_answerer_only_once_it_is_needed(image_home: Path) -> None:
    with VMM(image_home) as vmm, vmm.run("debian", wall="container") as own:
        assert answerers(own) == []
        assert own._folder.answer.stat().st_mode & 0o777 == 0o600
        opened = Line.connect(own._folder.line, own.name)
        try:
            run(opened, [seccomp(ERRNO | 5, "mkdir")], ["true"])
            assert answerers(own) == []
            for _ in range(2):  # one that was killed is followed by another
                with receiver(own, refuse) as one:
                    assert run(opened, one.operations("mkdir"), ["python3", "-c", MKDIR]).text == "5\n"
                os.kill(*answerers(own), signal.SIGKILL)
                assert _until(lambda: answerers(own) == [])
        finally:
            opened.close()
        folder = own._folder
    assert not folder.answer.exists()


def test_the_answerer_ends_with_the_keeper(image_home: Path) -> None:
    with VMM(image_home) as vmm, vmm.run("debian", wall="container") as own:
        opened = Line.connect(own._folder.line, own.name)
        with receiver(own, refuse) as one:
            run(opened, one.operations("mkdir"), ["mkdir", "/made"])  # it waits for who answers
        opened.close()
        (pid,) = answerers(own)
        os.kill(ending.identity(own._folder)[0], signal.SIGKILL)
        assert _until(lambda: _said(pid, "stat").rpartition(")")[2][:3] in ("", " Z ", " X "))


def _until(done: Callable[[], bool], seconds: float = 30.0) -> bool:
    deadline = time.monotonic() + seconds
    while not done() and time.monotonic() < deadline:
        time.sleep(0.01)
    return done()
