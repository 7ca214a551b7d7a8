"""When a group has no memory left: whom the kernel killed, and having all of the group end with it.

Version 2 does the latter itself (memory.oom.group). Version 1 only tells: an eventfd that is given to the machine's keeper, which
then ends the machine. Whom it killed stands in the kernel's log alone, which mostly only root may read.
"""

from __future__ import annotations

import contextlib
import os
import re

from trivisor.launch.cgroup_place import Place, write

_LOG = "/dev/kmsg"
_RECORD = 8 << 10
_RECORDS = 100_000
_KILL = re.compile(r"oom-kill:.*,oom_memcg=([^,]*),task_memcg=[^,]*,task=(.{1,15}),pid=\d+,uid=\d+$", re.MULTILINE)
"""dump_oom_victim() in mm/oom_kill.c."""


def end_with_one(place: Place) -> int | None:
    """Have the whole group end when one program of it is killed for want of memory. Return a descriptor that tells of it, where somebody
    has to be told (version 1), to be closed by the caller. Raises OSError."""
    if place.unified:
        write(place.path / "memory.oom.group", "1")
        return None
    told = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    try:
        control = os.open(place.path / "memory.oom_control", os.O_RDONLY | os.O_CLOEXEC)
        try:
            write(place.path / "cgroup.event_control", f"{told} {control}")
        finally:
            os.close(control)
    except BaseException:
        os.close(told)
        raise
    return told


def victims(place: Place, count: int) -> tuple[str, ...]:
    """Return the names of the last `count` programs of a group that the kernel killed, as far as its log may be read and still has them."""
    group = f"/{place.path.parent.name}/{place.path.name}"
    found = []
    with contextlib.suppress(OSError):
        fd = os.open(_LOG, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            for _ in range(_RECORDS):
                try:
                    said = os.read(fd, _RECORD).decode("utf-8", "replace")
                except BrokenPipeError:  # it was overwritten meanwhile: the next read goes on
                    continue
                found += [_plain(kill[2]) for kill in _KILL.finditer(said) if kill[1].endswith(group) or f"{group}/" in kill[1]]
        finally:
            os.close(fd)
    return tuple(found[-count:])


def _plain(name: str) -> str:
    """A program names itself."""
    return "".join(letter if letter.isprintable() else "?" for letter in name)
