"""Tracing behind each wall: the same calls with the same arguments, whoever makes them and however the command ends."""

from __future__ import annotations

import time

import pytest

from trivisor import ExecTimeout, InvalidSpec, Machine
from trivisor.vos.syscalls.events import CallEvent, Event, ExecEvent, ExitEvent, NewEvent, SignalEvent
from trivisor.vos.syscalls.policy import Policy
from trivisor.vos.syscalls.trace import Filter

BOUND = 60.0


def calls(events: list[Event], name: str) -> list[CallEvent]:
    return [event for event in events if isinstance(event, CallEvent) and event.name == name]


@pytest.mark.parametrize("user", ["", "nobody"])
def test_only_what_is_asked_for(running: Machine, user: str) -> None:
    trace = running.syscalls.trace("cat /nowhere; echo done; exit 3", ["openat", "execve"], user=user, timeout=BOUND)
    events = list(trace)
    assert (trace.exit_code, trace.stdout) == (3, b"done\n")
    assert {event.name for event in events if isinstance(event, CallEvent)} == {"openat", "execve"}
    (missing,) = [event for event in calls(events, "openat") if event.args["pathname"] == "/nowhere"]
    assert missing.error == "ENOENT"
    assert abs(missing.time - time.time()) < 3600
    first = calls(events, "execve")[0]
    assert (first.args["pathname"], first.args["argv"]) == ("/bin/sh", ("/bin/sh", "-c", "cat /nowhere; echo done; exit 3"))
    assert any(event.args["pathname"] == "/bin/cat" or event.args["pathname"] == "/usr/bin/cat" for event in calls(events, "execve")[1:])
    assert [event.command for event in events if isinstance(event, ExecEvent)] == ["sh", "cat"]
    assert sum(isinstance(event, NewEvent) for event in events) == 1
    assert [event.status for event in events if isinstance(event, ExitEvent)] == [1, 3]


def test_every_call(running: Machine) -> None:
    trace = running.syscalls.trace(["head", "-c", "3", "/etc/passwd"], timeout=BOUND)
    events = list(trace)
    assert trace.exit_code == 0
    written = calls(events, "write")[-1]
    assert (written.args["fd"], written.args["buf"], written.result) == (1, b"roo", 3)
    opened = next(event.result for event in calls(events, "openat") if event.args["pathname"] == "/etc/passwd")
    assert any(event.args["fd"] == opened and str(event.args["buf"]).startswith("b'roo") for event in calls(events, "read"))
    assert calls(events, "exit_group")[0].result is None
    assert trace.summary.calls["write"].calls == 1


def test_addresses(running: Machine) -> None:
    script = "import socket\ntry: socket.create_connection(('127.0.0.1', 9))\nexcept OSError: pass"
    (connect,) = calls(list(running.syscalls.trace(["python3", "-c", script], ["connect"], timeout=BOUND)), "connect")
    assert str(connect.args["addr"]) == "127.0.0.1:9"
    assert connect.error == "ECONNREFUSED"


def test_killed(running: Machine) -> None:
    trace = running.syscalls.trace("kill -9 $$", ["kill"], timeout=BOUND)
    events = list(trace)
    assert trace.exit_code == 137
    assert trace.exited is not None and trace.exited.signal == 9
    assert [event.signal for event in events if isinstance(event, ExitEvent)] == [9]


def test_signals_stops_and_threads(running: Machine) -> None:
    script = """
import os, signal, threading
signal.signal(signal.SIGUSR1, lambda *a: None)
os.kill(os.getpid(), signal.SIGUSR1)
threads = [threading.Thread(target=os.getppid) for _ in range(8)]
[t.start() for t in threads]; [t.join() for t in threads]
child = os.fork()
if child == 0: os.kill(os.getpid(), signal.SIGSTOP); os._exit(5)
os.waitpid(child, os.WUNTRACED); os.kill(child, signal.SIGCONT)
os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) + 1)
"""
    trace = running.syscalls.trace(["python3", "-c", script], ["getppid"], timeout=BOUND)
    events = list(trace)
    assert trace.exit_code == 6
    seen = calls(events, "getppid")
    assert len(seen) == 8
    assert all(event.pid == trace.pid for event in seen)
    assert any(event.signal == 10 for event in events if isinstance(event, SignalEvent))


def test_many_short_processes(running: Machine) -> None:
    trace = running.syscalls.trace("i=0; while [ $i -lt 100 ]; do (:) & i=$((i+1)); done; wait; exit 4", ["connect"], timeout=BOUND)
    events = list(trace)
    assert trace.exit_code == 4
    assert sum(isinstance(event, NewEvent) for event in events) == 100
    assert sum(isinstance(event, ExitEvent) for event in events) == 101


def test_a_timeout_leaves_nothing(running: Machine) -> None:
    with pytest.raises(ExecTimeout):
        list(running.syscalls.trace("sleep 1000 & sleep 1000", ["connect"], timeout=2))
    deadline = time.monotonic() + BOUND
    while b"1000" in running.exec("cat /proc/[0-9]*/cmdline", timeout=BOUND).stdout.replace(b"cat\0", b""):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_without_vdso_clock_reads_are_calls(running: Machine) -> None:
    script = "import time\nfor _ in range(50): time.monotonic()"
    seen = {}
    for no_vdso in (False, True):
        trace = running.syscalls.trace(["python3", "-c", script], ["clock_gettime"], no_vdso=no_vdso, timeout=BOUND)
        seen[no_vdso] = trace.run().calls.get("clock_gettime")
        assert trace.exit_code == 0
    assert seen[True] is not None and seen[True].calls >= 50
    assert seen[False] is None or seen[False].calls < 50


def test_a_rule_and_a_trace_of_the_same_call(running: Machine) -> None:
    policy = Policy("mkdir+mkdirat:EDQUOT")
    events = list(running.syscalls.trace(["mkdir", "/tmp/made"], ["mkdir", "mkdirat"], policy=policy, timeout=BOUND))
    assert [event.error for event in calls(events, "mkdir") + calls(events, "mkdirat")] == ["EDQUOT"]


def test_filters(running: Machine) -> None:
    trace = running.syscalls.trace("cat /nowhere /etc/passwd", ["openat"], keep=Filter.make(failed=True), timeout=BOUND)
    events = list(trace)
    assert events and all(isinstance(event, CallEvent) and event.errno for event in events)
    assert trace.summary.calls["openat"].calls == len(events)


def test_what_is_not_to_be_had(running: Machine) -> None:
    with pytest.raises(InvalidSpec, match="opnat"):
        running.syscalls.trace(["true"], ["opnat"])
    policy = Policy()
    policy.trace("openat")
    with pytest.raises(InvalidSpec, match="events"):
        running.exec(["true"], policy=policy)
    assert "trace" in running.syscalls.features
