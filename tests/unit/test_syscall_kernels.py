"""What one thread serves, and what older kernels do not have: a filter around the test says so in their stead."""

from __future__ import annotations

import contextlib
import errno
import threading

from machine_home import in_child
from syscall_support import On, answered, call, confine, trapped

from trivisor.launch import seccomp
from trivisor.launch.seccomp import Arg, compile_policy, refuse
from trivisor.vos.syscalls.call import Call
from trivisor.vos.syscalls.supervisor import Supervisor

SET_FLAGS = 0x40082104
"""SECCOMP_IOCTL_NOTIF_SET_FLAGS, of Linux 6.6."""


def test_one_thread_serves_all_commands_of_a_machine() -> None:
    supervisor = Supervisor("several", patience=5.0)  # a host that stands still for a moment does not have another thread take over
    served: set[int] = set()

    def parent(call: Call) -> None:
        served.add(threading.get_ident())
        call.returns(7)

    on = On(("getppid",), parent)
    with contextlib.ExitStack() as stack:
        children = [stack.enter_context(trapped(["getppid"], lambda: call("getppid"))) for _ in range(5)]
        for child in children:
            supervisor.attach(child.listener, [on])
        assert [child.result() for child in children] == ["7"] * 5
        assert [thread.name for thread in threading.enumerate()].count("calls of several") == 1
        supervisor.close()
    assert len(served) == 1


def test_without_synchronous_wake_ups_calls_are_answered_all_the_same() -> None:
    def work() -> None:
        confine(compile_policy(seccomp.OPEN, {"ioctl": [((Arg(1, "==", SET_FLAGS),), refuse(errno.EINVAL))]}))
        with answered(lambda: call("getppid"), On(("getppid",), lambda call: call.returns(7))) as (child, _):
            assert call("ioctl", child.listener.fileno(), SET_FLAGS, 1) == -errno.EINVAL
            assert child.result() == "7"

    assert in_child(work) == 0
