"""Several workers of pytest-xdist at once (`make test` has two): what is done once, what runs alone, who runs what.

Without `-n` there is one process, and all of this holds of it too.

Each worker has its own folder for temporary files, in it its own copy of the home that set-up made. What can be done once
alone, as ice for an image, is done by the worker that comes first (`once`). A test marked `alone` runs while no other
does: one that measures time or looks at what the whole host has.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from host_state import Leftovers

COUNT = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
WORKER = os.environ.get("PYTEST_XDIST_WORKER", "")
NUMBER = int(WORKER.removeprefix("gw") or 0)
"""The number of this one, for what two of them may not have alike: an account's id, a fixed port."""
_TOGETHER = {
    # They make another host for their machines to reach, with names and addresses that there can only be once.
    **dict.fromkeys(("walls/test_parity_names.py", "walls/test_parity_network.py", "walls/test_vm_nat.py"), "another host"),
    # They look at what the whole host has left.
    "security/test_parity_hogs.py": "hogs",
    # They run images that are built once.
    "walls/test_parity_images.py": "images",
    # They start a machine with the full kernel, and can have the same ice.
    **dict.fromkeys(("walls/test_vm_usb.py", "walls/test_vm_usb_made.py"), "full kernel"),
}
"""Files whose tests are one worker's, behind whatever wall."""
_WALL = re.compile(r"\[(vm|gvisor|container)[-\]]")


class Session:
    """The hooks that the workers and the process that started them need (tests/conftest.py registers it)."""

    def __init__(self, patience: float = 30.0) -> None:
        """What ends has `patience` seconds after the last test to have ended."""
        self._patience = patience

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        base = session.config._tmp_path_factory.getbasetemp()
        self._shared = shared(base)
        self._before = Leftovers(base)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Machines first, so that what is short fills the end, where a worker has nobody to share the rest with."""
        if COUNT > 1:
            items.sort(key=lambda item: item.path.parent.name not in ("walls", "security"))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        if COUNT == 1:
            return (yield)
        with ExitStack() as stack:
            # Whoever waits at the door keeps the others from passing it, so a test that wants to be alone comes to be.
            with locked(self._shared / "door", fcntl.LOCK_EX):
                how = fcntl.LOCK_EX if item.get_closest_marker("alone") else fcntl.LOCK_SH
                stack.enter_context(locked(self._shared / "room", how))
            return (yield)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_make_scheduler(self, config: pytest.Config, log: object) -> object:
        from xdist.scheduler import LoadScopeScheduling

        config.option.loadscopereorder = False  # the order is ours

        class Scheduler(LoadScopeScheduling):
            """A file's tests behind one wall are one worker's, so that they share the machine of their module."""

            def _split_scope(self, nodeid: str) -> str:
                return scope(nodeid)

        return Scheduler(config, log)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """After the last test of the last worker: no process, mount, cgroup, interface, socket or folder is left on the host."""
        if WORKER:
            return
        if left := self._before.since(self._patience):
            what = "\n".join(["left on the host by these tests:", *left])
            place = ("tests/workers.py", None, "nothing_left")
            report = pytest.TestReport("tests::nothing_left", place, {}, "failed", what, "teardown")
            session.config.hook.pytest_runtest_logreport(report=report)
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def shared(base: Path) -> Path:
    """The folder of the whole session, by that of this process."""
    return base.parent if WORKER else base


@contextmanager
def once(folder: Path, what: str) -> Iterator[bool]:
    """Whether this worker is the first to do `what`; the others wait for it. `folder` is the one they share."""
    done = folder / f"{what}-done"
    with locked(folder / f"{what}-lock"):
        yield not done.exists()
        done.touch()


@contextmanager
def locked(path: Path, how: int = fcntl.LOCK_EX) -> Iterator[None]:
    """Hold a lock on the file `path`, among processes."""
    held = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(held, how)
        yield
    finally:
        fcntl.flock(held, fcntl.LOCK_UN)  # a child that was forked meanwhile may still have it open
        os.close(held)


def scope(nodeid: str) -> str:
    """What is not divided between workers: a file's tests behind one wall, and what has to be one after the other."""
    found = _WALL.search(nodeid)
    file = nodeid.partition("::")[0]
    return _TOGETHER.get(file.removeprefix("tests/")) or file + (f" {found[1]}" if found else "")
