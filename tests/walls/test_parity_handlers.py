"""Python functions answer the system calls of programs in machines: the same behind every wall that can hold a call."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from trivisor import Machine
from trivisor.core.errors import UnsupportedByWall
from trivisor.vos.syscalls.call import Call
from trivisor.vos.syscalls.policy import Policy

pytestmark = pytest.mark.walls("container", "vm")


def python(machine: Machine, source: str, policy: Policy, **named: object) -> str:
    """Run a program under `policy`; what it printed."""
    done = machine.exec(["python3", "-c", textwrap.dedent(source)], policy=policy, timeout=60, **named)  # type: ignore[arg-type]
    assert done.exit_code == 0, done.error_text
    return done.text.strip()


def test_answers_of_every_kind(running: Machine) -> None:
    policy = Policy()

    @policy.on("openat")
    def opened(call: Call) -> None:
        match call.path():
            case "/virtual":
                call.give(b"from Python\n")
            case "/etc/secret":
                call.errno(errno.EACCES)
            case "/etc/other":
                call.open("/etc/hostname")
            case "/etc/none":
                call.open()
            case _:
                call.proceed()

    @policy.on("getppid")
    def parent(call: Call) -> None:
        call.returns(4242)

    @policy.on("uname")
    def named(call: Call) -> None:
        call.write_struct("buf", {"sysname": "Plan9", "machine": "vax"})
        call.returns(0)

    source = """
        import os
        def read(path):
            try:
                with open(path) as file: return file.read().strip()
            except OSError as error: return error.errno
        paths = ("/virtual", "/etc/secret", "/etc/other", "/etc/none")
        print([read(path) for path in paths], os.getppid(), os.uname().sysname, os.uname().machine)
    """
    assert python(running, source, policy) == f"['from Python', 13, '{running.name}', 2] 4242 Plan9 vax"


def test_an_open_file_and_a_pipe_are_given(running: Machine, tmp_path: Path) -> None:
    """Of the host's: the program reads them, and gets to nothing else by them."""
    (tmp_path / "given").write_text("from a file of the host\n")
    policy = Policy()

    @policy.on("openat")
    def opened(call: Call) -> None:
        match call.path():
            case "/file":
                with (tmp_path / "given").open() as file:
                    call.give(file)
            case "/pipe":
                read, write = os.pipe()
                os.write(write, b"through a pipe\n")
                os.close(write)
                call.give(read)
                os.close(read)
            case _:
                call.proceed()

    source = """
        import os
        print(open("/file").read() + open("/pipe").read(), os.path.exists(os.readlink("/proc/self/fd/%d" % os.open("/file", 0))))
    """
    assert python(running, source, policy) == "from a file of the host\nthrough a pipe\n False"


def test_signals_during_a_held_call(running: Machine) -> None:
    """They wait until it is answered: the call is neither cut short nor held a second time."""
    policy, held = Policy(), []

    @policy.on("getppid", timeout=20)
    def slow(call: Call) -> None:
        held.append(call.id)
        time.sleep(0.5)
        call.returns(11)

    source = """
        import os, signal
        came = []
        signal.signal(signal.SIGALRM, lambda *_: came.append(1))
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        print(os.getppid(), end=" ")
        print(len(came) == 1)
    """
    assert python(running, source, policy) == "11 True"
    assert len(held) == 1


def test_what_a_handler_sees(running: Machine) -> None:
    policy, seen = Policy(), []

    @policy.on("openat")
    def opened(call: Call) -> None:
        if call.path() == "rel/../x":
            seen.append((call.name, call.full_path(), str(call.flags), call["mode"]))
            call.errno(errno.ENOENT)
        else:
            call.proceed()

    @policy.on("write")
    def written(call: Call) -> None:
        data = call.buffer()
        if data.startswith(b"long"):
            seen.append((len(data), data[-4:]))
        call.proceed()

    source = """
        import os
        os.chdir("/usr")
        try: os.open("rel/../x", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError: pass
        os.write(os.open("/dev/null", os.O_WRONLY), b"long" + bytes(10000) + b"tail")
    """
    python(running, source, policy)
    assert seen == [("openat", "/usr/x", "O_WRONLY|O_CREAT|O_CLOEXEC", 0o600), (10008, b"tail")]


def test_connect_is_answered_by_a_function(running: Machine) -> None:
    policy, addresses = Policy(), []

    @policy.on("connect")
    def connected(call: Call) -> None:
        addresses.append(str(call.sockaddr()))
        ours, theirs = socket.socketpair()
        call.give(theirs, fd=call["sockfd"])
        theirs.close()
        ours.sendall(b"220 fake\r\n")
        ends.append(ours)

    ends: list[socket.socket] = []
    source = """
        import socket
        with socket.socket() as sock:
            sock.connect(("192.0.2.1", 25))
            print(sock.recv(100))
            sock.sendall(b"bye")
    """
    assert python(running, source, policy) == r"b'220 fake\r\n'"
    assert addresses == ["192.0.2.1:25"]
    with ends[0] as ours:
        ours.settimeout(10)
        assert ours.recv(100) == b"bye"


def test_much_is_carried_both_ways(running: Machine) -> None:
    """More than any window: neither side loses a byte, whoever is slow."""
    policy = Policy()

    @policy.on("connect")
    def connected(call: Call) -> None:
        ours, theirs = socket.socketpair()
        call.give(theirs, fd=call["sockfd"])
        theirs.close()
        threading.Thread(target=echo, args=(ours,), daemon=True).start()

    def echo(ours: socket.socket) -> None:
        with ours:
            while data := ours.recv(1 << 16):
                ours.sendall(data)

    source = """
        import socket, threading, time
        whole = bytes(range(256)) * 8192
        with socket.socket() as sock:
            sock.connect(("192.0.2.1", 7))
            def send():
                sock.sendall(whole)
                sock.shutdown(socket.SHUT_WR)
            threading.Thread(target=send).start()
            time.sleep(0.3)
            got = bytearray()
            while data := sock.recv(65536): got += data
            print(len(got), got == whole)
    """
    assert python(running, source, policy) == f"{256 * 8192} True"


def test_opened_on_behalf_of_another_user(running: Machine) -> None:
    policy = Policy()

    @policy.on("openat")
    def opened(call: Call) -> None:
        if call.path() in ("secret", "/tmp/behalf/made"):
            call.open()
        else:
            call.proceed()

    running.exec("rm -rf /tmp/behalf; mkdir -m 777 /tmp/behalf; cd /tmp/behalf; echo s > secret; chmod 600 secret", check=True)
    source = """
        import os
        os.umask(0o027)
        try: open("/tmp/behalf/secret")
        except PermissionError: print("plain", end=" ")
        os.chdir("/tmp/behalf")
        try: open("secret")
        except PermissionError: print("denied", end=" ")
        made = os.open("/tmp/behalf/made", os.O_CREAT | os.O_WRONLY, 0o666)
        print(oct(os.fstat(made).st_mode), os.fstat(made).st_uid)
    """
    assert python(running, source, policy, user="1000:1000") == "plain denied 0o100640 1000"


def test_a_handler_that_fails_or_hangs_refuses(running: Machine) -> None:
    policy, over = Policy(), threading.Event()

    @policy.on("getsid")
    def raises(call: Call) -> None:
        raise ValueError("a bug")

    @policy.on("getpgid", timeout=0.5)
    def hangs(call: Call) -> None:
        over.wait(50)

    @policy.on("getppid")
    def ends(call: Call) -> None:
        over.set()
        call.proceed()

    source = """
        import os, time
        try: os.getsid(0)
        except PermissionError: print("refused", end=" ")
        began = time.monotonic()
        try: os.getpgid(0)
        except PermissionError: print("late", time.monotonic() - began < 40)
        os.getppid()
    """
    assert python(running, source, policy) == "refused late True"


def test_handlers_may_call_back_into_the_machine(running: Machine) -> None:
    policy = Policy()

    @policy.on("getppid", timeout=20)
    def asks(call: Call) -> None:
        inner = running.exec(["cat", "/etc/hostname"], timeout=15)
        call.returns(len(inner.text.strip()))

    assert python(running, "import os; print(os.getppid())", policy) == str(len(running.name))


def test_rules_come_before_handlers(running: Machine) -> None:
    policy, seen = Policy(), []
    policy.fail("openat", "ENOSPC", path="/tmp/full*", times=1)

    @policy.on("openat")
    def opened(call: Call) -> None:
        seen.append(call.path())
        call.proceed()

    source = """
        import os
        for _ in range(2):
            try: os.open("/tmp/full", os.O_CREAT | os.O_WRONLY)
            except OSError as error: print(error.errno, end=" ")
    """
    assert python(running, source, policy) == "28"
    assert seen.count("/tmp/full") == 1


def test_programs_inherit_it_and_threads_share_it(running: Machine) -> None:
    policy, pids = Policy(), set()

    @policy.on("getppid")
    def parent(call: Call) -> None:
        pids.add(call.pid)
        call.returns(7)

    source = """
        import os, subprocess, sys, threading
        child = subprocess.run([sys.executable, "-c", "import os; print(os.getppid())"], capture_output=True, text=True)
        print(child.stdout.strip(), end=" ")
        results = []
        threads = [threading.Thread(target=lambda: results.append(os.getppid())) for _ in range(64)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        print(sum(results))
    """
    assert python(running, source, policy) == "7 448"
    assert len(pids) >= 2


def test_a_killed_owner_fails_closed_and_the_machine_lives(running: Machine) -> None:
    """The owner is another process: it is killed while its handler holds a call."""
    source = f"""
        import sys, time
        from trivisor import VMM
        from trivisor.vos.syscalls.policy import Policy
        policy = Policy()

        @policy.on("getsid", timeout=60)
        def holds(call):
            print("held", flush=True)
            time.sleep(60)

        vmm = VMM({str(running._context.home.root)!r})
        vm = vmm.get({running.name!r})
        script = "import os\\ntry: os.getsid(0)\\nexcept OSError as e: n = e.errno\\nopen('/tmp/left.new', 'w').write(str(n))"
        script += "\\nos.rename('/tmp/left.new', '/tmp/left')"
        vm.spawn(["python3", "-c", script], policy=policy, detach=True, stdin=False)
        time.sleep(60)
    """
    running.exec(["rm", "-f", "/tmp/left"])
    owner = subprocess.Popen([sys.executable, "-c", textwrap.dedent(source)], stdout=subprocess.PIPE)
    try:
        assert owner.stdout is not None and owner.stdout.readline() == b"held\n"
    finally:
        os.kill(owner.pid, signal.SIGKILL)
        owner.wait()
        owner.stdout.close()
    end = time.monotonic() + 60
    while not running.files.exists("/tmp/left") and time.monotonic() < end:
        time.sleep(0.05)
    assert running.files.read_text("/tmp/left") == "1"
    assert running.exec(["true"]).ok


def test_pausing_while_a_call_is_held(running: Machine) -> None:
    policy, held = Policy(), []

    @policy.on("getppid", timeout=20)
    def slow(call: Call) -> None:
        held.append(call.id)
        time.sleep(1)
        call.returns(5)

    process = running.spawn(["python3", "-c", "import os; print(os.getppid())"], policy=policy)
    end = time.monotonic() + 20
    while not held and time.monotonic() < end:
        time.sleep(0.01)
    running.pause()
    time.sleep(0.1)
    running.resume()
    assert process.stdout.read(timeout=30).strip() == b"5"
    process.wait(10)


@pytest.mark.walls("gvisor")
def test_gvisor_says_that_it_cannot(running: Machine) -> None:
    policy = Policy()
    policy.on("getppid")(lambda call: call.returns(1))
    with pytest.raises(UnsupportedByWall) as raised:
        running.exec(["true"], policy=policy)
    assert "container" in raised.value.hint
