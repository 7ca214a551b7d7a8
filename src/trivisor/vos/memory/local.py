"""Processes of a container as this host's kernel has them: which one has a number in the container, and what it maps (proc(5))."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from trivisor.core.errors import NotFound

_MOST = 1 << 16
_MAP = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (r)(\S{3}) \S+ \S+ \S+ *(.*)")
_NOT_MEMORY = ("[vvar", "[vsyscall]", "/dev/")


def find(init: int, pid: int) -> int:
    """Return the host's number of the process that is `pid` in the container whose PID 1 is `init`. Raises NotFound."""
    level = len(_numbers(init)) - 1
    for number in _tree(init):
        numbers = _numbers(number)
        # In a container inside of the container it has one more.
        if len(numbers) > level and numbers[level] == pid:
            return number
    raise NotFound(f"the machine has no process {pid}", hint="give the pid that the machine itself knows it by")


def regions(pid: int) -> Iterator[tuple[int, int]]:
    """Yield (address, size) of what a process can read of its own memory, in order; devices are left out."""
    try:
        text = Path(f"/proc/{pid}/maps").read_text(errors="replace")
    except OSError:
        return
    for line in text.splitlines():
        found = _MAP.match(line)
        if found and not found[5].startswith(_NOT_MEMORY):
            begin, end = int(found[1], 16), int(found[2], 16)
            yield begin, end - begin


def _numbers(pid: int) -> list[int]:
    try:
        text = Path(f"/proc/{pid}/status").read_text(errors="replace")
    except OSError:
        return []
    found = re.search(r"^NSpid:((?:\s+\d+)+)$", text, re.MULTILINE)
    return [int(word) for word in found[1].split()] if found else []


def _tree(init: int) -> Iterator[int]:
    waiting, seen = [init], 0
    while waiting and seen < _MOST:
        pid = waiting.pop()
        seen += 1
        yield pid
        try:
            for thread in Path(f"/proc/{pid}/task").iterdir():
                waiting += [int(word) for word in (thread / "children").read_text().split()]
        except OSError:  # it has ended
            continue
