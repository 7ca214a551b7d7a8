"""The processes of a guest as its kernel's memory has them: the list that begins at init_task, followed from outside.

Nothing in the guest is asked, and none of what it says is believed further than it goes: the list is as long as MAX_TASKS at most, ends
where it meets itself, and a pointer to nowhere ends what hangs on it.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from trivisor.core.errors import BadAddress, NotFound
from trivisor.vos.memory.kernel import Kernel
from trivisor.vos.memory.paging import Tables

MAX_TASKS = 1 << 16
_MAX_ARGUMENTS = 4096
_COMM = 16
_TASK = ("tasks", "pid", "tgid", "comm", "mm", "real_parent", "cred")
_OTHERS = ("cred.uid", "mm_struct.pgd", "mm_struct.arg_start", "mm_struct.arg_end")


@dataclass(frozen=True)
class GuestProcess:
    """One process of the machine."""

    pid: int
    parent: int
    uid: int
    name: str
    """As the kernel has it: at most 15 bytes, chosen by the program."""
    argv: tuple[str, ...]
    """What it was started with, as far as that is in memory; the program may have changed it. Empty for the kernel's own."""
    task: int
    """Address of its task_struct."""
    top: int | None
    """Virtual address of its top page table; None for the kernel's own."""


def processes(tables: Tables, kernel: Kernel, space: Callable[[int], Tables]) -> list[GuestProcess]:
    """Return the processes in the order in which they were made, without the idle one. Raises BadAddress, NotFound.

    `tables` are the kernel's; `space` gives those below a top table at a virtual address.
    """
    offsets = _offsets(kernel)
    return [_process(tables, offsets, task, at, space) for at, task in _walk(tables, kernel, offsets)]


def space_of(tables: Tables, kernel: Kernel, pid: int) -> int:
    """Return where the top page table of one process is. Raises NotFound for one that is not there, or is the kernel's own."""
    offsets = _offsets(kernel)
    for _, task in _walk(tables, kernel, offsets):
        if task.number("tgid") == pid:
            if not (mm := task.pointer("mm")):
                raise NotFound(f"process {pid} is the kernel's own, or ends: it has no memory of its own", hint="leave out pid")
            return _pointer(tables, mm + offsets["mm_struct.pgd"])
    raise NotFound(f"the machine has no process {pid}", hint="memory.processes() lists those there are")


class _Task:
    """The part of a task_struct that is looked at, read in one go."""

    def __init__(self, tables: Tables, at: int, offsets: dict[str, int]) -> None:
        self._offsets = offsets
        self._first = min(offsets[f"task_struct.{name}"] for name in _TASK)
        last = max(offsets[f"task_struct.{name}"] for name in _TASK)
        self._data = tables.read(at + self._first, last + _COMM - self._first)

    def number(self, name: str) -> int:
        return int(struct.unpack_from("<i", self._data, self._at(name))[0])

    def pointer(self, name: str) -> int:
        return int(struct.unpack_from("<Q", self._data, self._at(name))[0])

    def text(self, name: str) -> str:
        at = self._at(name)
        return _printable(self._data[at : at + _COMM].split(b"\0")[0])

    def _at(self, name: str) -> int:
        return self._offsets[f"task_struct.{name}"] - self._first


def _offsets(kernel: Kernel) -> dict[str, int]:
    needed = (*(f"task_struct.{name}" for name in _TASK), *_OTHERS)
    if missing := [name for name in needed if name not in kernel.offsets]:
        raise NotFound(
            f"the machine's kernel does not say where its {missing[0]} is",
            hint="its image needs types (CONFIG_DEBUG_INFO_BTF), as Debian's",
        )
    return kernel.offsets


def _walk(tables: Tables, kernel: Kernel, offsets: dict[str, int]) -> Iterator[tuple[int, _Task]]:
    try:
        first = kernel.symbols["init_task"]
    except KeyError:
        raise NotFound("the machine's kernel has no symbol init_task") from None
    link = offsets["task_struct.tasks"]
    seen, at = {first}, _pointer(tables, first + link) - link
    while at not in seen:
        if len(seen) > MAX_TASKS:
            raise BadAddress("its list of processes has no end")
        seen.add(at)
        task = _Task(tables, at, offsets)
        yield at, task
        at = task.pointer("tasks") - link


def _process(tables: Tables, offsets: dict[str, int], task: _Task, at: int, space: Callable[[int], Tables]) -> GuestProcess:
    mm = task.pointer("mm")
    parent, uid = 0, -1
    top: int | None = None
    argv: tuple[str, ...] = ()
    try:
        parent = _number(tables, task.pointer("real_parent") + offsets["task_struct.tgid"])
        uid = _number(tables, task.pointer("cred") + offsets["cred.uid"])
        if mm:
            top = _pointer(tables, mm + offsets["mm_struct.pgd"])
            begin, end = (_pointer(tables, mm + offsets[f"mm_struct.arg_{name}"]) for name in ("start", "end"))
            argv = _arguments(space(top), begin, end)
    except BadAddress:
        pass  # what was found until here is what there is
    return GuestProcess(task.number("tgid"), parent, uid, task.text("comm"), argv, at, top)


def _arguments(tables: Tables, begin: int, end: int) -> tuple[str, ...]:
    size = min(end - begin, _MAX_ARGUMENTS)
    if size <= 0:
        return ()
    data = tables.read(begin, size)
    return tuple(_printable(word) for word in data.removesuffix(b"\0").split(b"\0"))


def _pointer(tables: Tables, at: int) -> int:
    return int(struct.unpack("<Q", tables.read(at, 8))[0])


def _number(tables: Tables, at: int) -> int:
    return int(struct.unpack("<I", tables.read(at, 4))[0])


def _printable(data: bytes) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in data.decode(errors="replace"))
