"""A list of processes read from memory: one of our own making, and such as only a hostile kernel has."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trivisor.core.errors import BadAddress, NotFound
from trivisor.vos.memory import tasks
from trivisor.vos.memory.kernel import Kernel
from trivisor.vos.memory.paging import Tables

OFFSETS = {
    "task_struct.tasks": 0,
    "task_struct.pid": 16,
    "task_struct.tgid": 20,
    "task_struct.mm": 24,
    "task_struct.real_parent": 32,
    "task_struct.cred": 40,
    "task_struct.comm": 48,
    "cred.uid": 4,
    "mm_struct.pgd": 0,
    "mm_struct.arg_start": 8,
    "mm_struct.arg_end": 16,
}
KERNEL = Kernel({"init_task": 0x1000}, OFFSETS, b"")
CRED, MM, WORDS = 0x8000, 0x9000, 0xA000
SIZE = 1 << 20


class Guest:
    """A megabyte of memory, mapped where it lies, with tasks a page apart."""

    def __init__(self) -> None:
        self.data = bytearray(SIZE)
        self.put(SIZE - 4096, "<Q", SIZE - 8192 | 7)
        self.put(SIZE - 8192, "<Q", 7 | 0x80)
        self.put(CRED, "<II", 0, 1000)
        self.put(MM, "<QQQ", SIZE - 4096, WORDS, WORDS + 11)
        self.data[WORDS : WORDS + 11] = b"sleep\0\x1b[1m\0"

    def put(self, at: int, form: str, *values: int) -> None:
        struct.pack_into(form, self.data, at, *values)

    def task(self, at: int, following: int, pid: int, *, mm: int = MM, parent: int = 0x1000, name: bytes = b"name") -> None:
        self.put(at, "<QQiiQQQ", following, 0, pid, pid, mm, parent, CRED)
        self.data[at + 48 : at + 64] = name.ljust(16, b"\0")

    def read(self, address: int, size: int) -> bytes:
        if address + size > SIZE:
            raise BadAddress("not memory")
        return bytes(self.data[address : address + size])

    def tables(self) -> Tables:
        return Tables(self.read, SIZE - 4096)

    def listed(self) -> list[tasks.GuestProcess]:
        tables = self.tables()
        return tasks.processes(tables, KERNEL, lambda top: self.tables())


def test_a_list() -> None:
    guest = Guest()
    guest.task(0x1000, 0x2000, 0, mm=0)
    guest.task(0x2000, 0x3000, 1, name=b"init")
    guest.task(0x3000, 0x1000, 2, mm=0, parent=0x2000, name=b"\xff\n" * 8)
    first, second = guest.listed()
    assert first == tasks.GuestProcess(1, 0, 1000, "init", ("sleep", "?[1m"), 0x2000, SIZE - 4096)
    assert (second.parent, second.argv, second.top) == (1, (), None)
    assert second.name.isprintable() and len(second.name) == 16
    assert tasks.space_of(guest.tables(), KERNEL, 1) == SIZE - 4096
    for pid in (2, 7):
        with pytest.raises(NotFound):
            tasks.space_of(guest.tables(), KERNEL, pid)


def test_a_list_that_meets_itself_or_leads_nowhere() -> None:
    guest = Guest()
    guest.task(0x1000, 0x2000, 0)
    guest.task(0x2000, 0x3000, 1)
    guest.task(0x3000, 0x2000, 2)
    assert [process.pid for process in guest.listed()] == [1, 2]
    guest.task(0x3000, 1 << 46, 2)
    with pytest.raises(BadAddress):
        guest.listed()


def test_a_list_without_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "MAX_TASKS", 100)
    guest = Guest()
    for at in range(0x1000, 0xC0000, 64):
        guest.task(at, at + 64, 1, mm=0)
    with pytest.raises(BadAddress, match="no end"):
        guest.listed()


def test_what_hangs_on_a_pointer_to_nowhere_is_left_out() -> None:
    guest = Guest()
    guest.task(0x1000, 0x2000, 0)
    guest.task(0x2000, 0x3000, 1, mm=1 << 45)
    guest.task(0x3000, 0x1000, 2, parent=1 << 45)
    guest.put(MM, "<QQQ", SIZE - 4096, 0, (1 << 64) - 1)
    assert [(process.pid, process.argv, process.uid) for process in guest.listed()] == [(1, (), 1000), (2, (), -1)]


@pytest.mark.parametrize("lost", ["task_struct.comm", "cred.uid"])
def test_a_kernel_that_does_not_say_where(lost: str) -> None:
    kernel = Kernel(KERNEL.symbols, {name: at for name, at in OFFSETS.items() if name != lost}, b"")
    with pytest.raises(NotFound, match=lost):
        tasks.processes(Guest().tables(), kernel, lambda top: Guest().tables())
    with pytest.raises(NotFound, match="init_task"):
        tasks.processes(Guest().tables(), Kernel({}, OFFSETS, b""), lambda top: Guest().tables())


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0x1000, 0xB000), st.binary(min_size=1, max_size=16)), max_size=20))
def test_any_memory(changes: list[tuple[int, bytes]]) -> None:
    guest = Guest()
    for number in range(1, 7):
        guest.task(number << 12, (number % 6 + 1) << 12, number)
    for at, change in changes:
        guest.data[at : at + len(change)] = change
    try:
        found = guest.listed()
    except BadAddress:
        return
    assert all(process.name.isprintable() or not process.name for process in found)
    assert all(word.isprintable() or not word for process in found for word in process.argv)
