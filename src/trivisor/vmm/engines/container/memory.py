"""Where a container's programs are on this host, and how they are made to stand still."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trivisor.core.errors import GuestGone
from trivisor.launch.cgroups import Cgroup
from trivisor.vmm.engine import Box
from trivisor.vos.ports import MemoryPort, Still


def port(box: Box) -> MemoryPort:
    """Return what the container wall does for the memory of one machine."""
    return MemoryPort("container", frozenset({"process"}), lambda still: hold(box, still))


@contextmanager
def hold(box: Box, still: bool) -> Iterator[Still]:
    """Say where a container's PID 1 is; with `still`, and a freezer, its programs do not run meanwhile. Raises GuestGone."""
    init = Still(_init(box))
    group = Cgroup.find(box.home, box.id) if still else None
    if group is None or not group.can_freeze or group.frozen:
        yield init
        return
    group.freeze()
    try:
        yield init
    finally:
        group.thaw()


def _init(box: Box) -> int:
    """Return the host's number of PID 1: below the keeper, the first that is 1 in a pid namespace of its own."""
    try:
        waiting = [int(box.dir.keeper.read_text().split()[0])]
        while waiting:
            folder = Path("/proc") / str(waiting.pop(0))
            numbers = re.search(r"^NSpid:\s+(.*)$", (folder / "status").read_text(), re.MULTILINE)
            words = numbers[1].split() if numbers else []
            if len(words) > 1 and words[-1] == "1":
                return int(folder.name)
            for thread in (folder / "task").iterdir():
                waiting += [int(word) for word in (thread / "children").read_text().split()]
    except (OSError, ValueError, IndexError) as error:
        raise GuestGone("its programs have ended", machine=box.spec.name) from error
    raise GuestGone("its programs have ended", machine=box.spec.name)
