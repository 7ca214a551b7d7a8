"""Handlers that misbehave, programs that die: every call fails closed, and no other call waits for it."""

from __future__ import annotations

import errno
import logging
import mmap
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

import pytest
from syscall_support import NUMBERS, On, answered, call, trapped

from trivisor.core.errors import CallerError, CallGone
from trivisor.vos.syscalls import supervisor as supervisors
from trivisor.vos.syscalls.call import Call
from trivisor.vos.syscalls.direct import DirectListener
from trivisor.vos.syscalls.supervisor import Supervisor

DENIED = str(-errno.EPERM)


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "trivisor.syscalls")


def twice(call: Call) -> None:
    call.returns(1)
    call.returns(2)


def after_all(call: Call) -> None:
    call.proceed()
    raise ValueError("no, do not")


@pytest.mark.parametrize(
    "handler",
    [lambda call: None, lambda call: 5, lambda call: 1 / 0, lambda call: os._exit if call.returns(-5) else None, twice, after_all, exit],
    ids=["silent", "value", "raises", "negative", "twice", "after-all", "exits"],
)
def test_a_handler_that_fails_refuses(handler: Callable[[Call], object]) -> None:
    with answered(lambda: call("getppid"), On(("getppid",), handler)) as (child, attachment):
        assert child.result() == DENIED
        (failure,) = attachment.failures
        assert (failure.call, failure.pid) == ("getppid", child.pid)


def test_a_handler_that_hangs_is_refused_and_holds_up_nobody() -> None:
    others, release = threading.Event(), threading.Event()
    beside: list[bool] = []
    late: list[BaseException] = []

    def waits(call: Call) -> None:
        beside.append(others.wait(20))
        call.returns(9)

    def hangs(call: Call) -> None:
        others.set()
        release.wait(20)
        try:
            call.returns(5)
        except CallGone as error:
            late.append(error)
            raise

    def program() -> object:
        first: list[int] = []
        thread = threading.Thread(target=lambda: first.append(call("getsid", 0)))
        thread.start()
        time.sleep(0.02)
        quick = {call("getpgid", 0) for _ in range(100)}
        began = time.monotonic()
        refused = call("getppid")
        took = time.monotonic() - began
        thread.join()
        return quick, first, refused, 0.35 < took < 15

    on = On(("getppid",), hangs, timeout=0.4), On(("getpgid",), lambda call: call.returns(3)), On(("getsid",), waits, timeout=60)
    with answered(program, *on, patience=0.05) as (child, attachment):
        assert child.result() == f"({{3}}, [9], {DENIED}, True)"
        assert beside == [True]
        assert isinstance(attachment.failures[0].error, TimeoutError)
        release.set()
        end = time.monotonic() + 5
        while not late and time.monotonic() < end:
            time.sleep(0.01)
    assert late


def test_a_slow_handler_still_answers_beside_the_others() -> None:
    other = threading.Event()

    def slow(call: Call) -> None:
        call.returns(77 if other.wait(20) else 0)

    def quick(call: Call) -> None:
        other.set()
        call.returns(3)

    def program() -> object:
        thread_result: list[int] = []
        thread = threading.Thread(target=lambda: thread_result.append(call("getppid")))
        thread.start()
        time.sleep(0.05)
        done = call("getpgid", 0)
        thread.join()
        return done, thread_result

    with answered(program, On(("getppid",), slow, timeout=60), On(("getpgid",), quick), patience=0.03) as (child, attachment):
        assert child.result() == "(3, [77])"
        assert not attachment.failures
        deadline = time.monotonic() + 10
        while child.listener.held and time.monotonic() < deadline:
            time.sleep(0.01)  # the slow one's thread lets go after the program went on
        assert not child.listener.held


def test_a_handler_may_wait_for_what_itself_needs_answers() -> None:
    """As an exec from a handler does: its program's calls come to the same supervisor."""
    inner: list[str] = []
    with trapped(["getpgid"], lambda: call("getpgid", 0)) as second:

        def outer(call: Call) -> None:
            supervisors.step_aside()
            inner.append(second.result())
            call.returns(1)

        with answered(lambda: call("getppid"), On(("getppid",), outer), patience=5.0) as (child, attachment):
            attachment._leave.__self__.attach(second.listener, [On(("getpgid",), lambda call: call.returns(99))])
            assert child.result() == "1"
            assert inner == ["99"]
            assert not attachment.failures


def test_too_many_hanging_handlers_refuse_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisors, "MAX_BESIDE", 3)
    release = threading.Event()
    refused = mmap.mmap(-1, 1)  # the child says here that it has seen three refusals: no call of its own would come through

    def hangs(call: Call) -> None:
        release.wait(20)
        call.returns(5)

    def program() -> object:
        results: list[int] = []
        threads = [threading.Thread(target=lambda: results.append(call("getppid"))) for _ in range(6)]
        for thread in threads:
            thread.start()
        while len(results) < 3:
            time.sleep(0.01)
        early = list(results)
        refused[0] = 1
        for thread in threads:
            thread.join()
        return sorted(early), sorted(results)

    with answered(program, On(("getppid",), hangs, timeout=60), patience=0.01) as (child, _):
        end = time.monotonic() + 15
        while not refused[0] and time.monotonic() < end:
            time.sleep(0.01)  # shared memory tells nobody
        release.set()
        assert child.result() == repr(([-1] * 3, [-1] * 3 + [5] * 3))


def test_64_threads_that_all_trap() -> None:
    def program() -> object:
        counts: list[int] = []

        def work() -> None:
            counts.append(sum(call("getppid") for _ in range(50)))

        threads = [threading.Thread(target=work) for _ in range(64)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sum(counts)

    with answered(program, On(("getppid",), lambda call: call.returns(2))) as (child, _):
        assert child.result(30) == str(64 * 50 * 2)


def test_children_and_programs_inherit_it() -> None:
    def program() -> object:
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.dup2(write, 1)
            os.execv(sys.executable, ["python3", "-c", "import os; print(os.getppid())"])
        os.close(write)
        os.waitpid(pid, 0)
        said = os.read(read, 100)
        return os.getppid(), said

    with answered(program, On(("getppid",), lambda call: call.returns(31))) as (child, _):
        assert child.result() == repr((31, b"31\n"))


def test_a_program_that_dies_under_its_handler() -> None:
    gone: list[object] = []
    began = threading.Event()

    def handler(call: Call) -> None:
        began.set()
        while call.valid:
            time.sleep(0.005)
        for what in (call.path, lambda: call.install(b"x"), lambda: call.write_at(4096, b"x")):
            try:
                what()
            except CallGone as error:
                gone.append(error)
        call.returns(1)

    with answered(lambda: call("rmdir", b"/x"), On(("rmdir",), handler)) as (child, attachment):
        assert began.wait(30)
        os.kill(child.pid, signal.SIGKILL)
        assert attachment.ended.wait(30)
        end = time.monotonic() + 5
        while len(gone) < 3 and time.monotonic() < end:
            time.sleep(0.01)
        assert not attachment.failures
    assert len(gone) == 3


def test_the_end_of_the_last_program_ends_the_attachment() -> None:
    with answered(lambda: call("getppid"), On(("getppid",), lambda call: call.returns(1))) as (child, attachment):
        child.result()
        assert attachment.ended.wait(30)


def test_two_that_end_an_attachment_close_its_listener_once(monkeypatch: pytest.MonkeyPatch) -> None:
    closing, go, times = threading.Event(), threading.Event(), []
    close, us = DirectListener.close, os.getpid()

    def slowly(listener: DirectListener) -> None:
        if os.getpid() == us:
            times.append(1)
            closing.set()
            go.wait(10)
        close(listener)

    monkeypatch.setattr(DirectListener, "close", slowly)
    with answered(lambda: call("getppid"), On(("getppid",), lambda call: call.returns(1))) as (child, attachment):
        child.result()
        attachment.close()
        assert closing.wait(30)
        supervisor = attachment._leave.__self__
        supervisor._end(attachment)
        supervisor._end_all()
        go.set()
        assert attachment.ended.wait(30)
        assert len(times) == 1


def test_closing_leaves_no_thread() -> None:
    before = set(threading.enumerate())
    with answered(lambda: call("getppid"), On(("getppid",), lambda call: call.returns(1))) as (child, _):
        child.result()
    end = time.monotonic() + 5
    while set(threading.enumerate()) - before and time.monotonic() < end:
        time.sleep(0.01)
    assert not set(threading.enumerate()) - before


def test_what_nobody_is_asked_about_is_refused() -> None:
    """A call that is held, has no handler, and no rules to hand it off to."""
    with answered(lambda: call("getppid"), On(("getuid",), lambda call: call.returns(1)), extra=["getppid"]) as (child, _):
        assert child.result() == DENIED


def test_what_the_wall_refuses_cannot_proceed() -> None:
    on = On(("rmdir",), lambda call: call.proceed())
    with answered(lambda: call("rmdir", b"/tmp"), on, refused={NUMBERS["rmdir"]: errno.ENOSYS}) as (child, _):
        assert child.result() == str(-errno.ENOSYS)


def test_enforcing_handlers_cannot_proceed_with_what_may_change() -> None:
    errors: list[CallerError] = []

    def handler(call: Call) -> None:
        if call["fd"] == 1:
            return call.proceed()
        call.buffer()
        try:
            call.proceed()
        except CallerError as error:
            errors.append(error)
        return call.errno(errno.EACCES)

    on = On(("write",), handler, enforces=True)
    with answered(lambda: (call("write", 1, b"", 0), call("write", 2, b"x", 1)), on) as (child, _):
        assert child.result() == repr((0, -errno.EACCES))
    assert "may change" in str(errors[0])


def test_a_forked_owner_starts_anew() -> None:
    """What a supervisor's process forks has neither its threads nor its descriptors, and may attach on its own."""
    supervisor = Supervisor("test")
    with trapped(["getppid"], lambda: call("getppid")) as child:
        attachment = supervisor.attach(child.listener, [On(("getppid",), lambda call: call.returns(1))])
        pid = os.fork()
        if pid == 0:
            os._exit(int(child.listener.fileno() != -1 or supervisor._pid == os.getpid()))
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert child.result() == "1"
        assert attachment.ended.wait(30)
        supervisor.close()
