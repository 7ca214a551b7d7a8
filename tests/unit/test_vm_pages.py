"""RAM on its way into a file, of a process that is this one: whatever lies behind it, the file has what the memory had, and its holes."""

from __future__ import annotations

import ctypes
import mmap
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from trivisor.core.errors import EngineError
from trivisor.vmm.engines.vm import disks, pages
from trivisor.vmm.engines.vm.pages import Pages, opened
from trivisor.vos.memory.foreign import Foreign

PAGE = mmap.PAGESIZE
SIZE = 8 << 20
KINDS = ("ice", "anonymous", "shared")


@contextmanager
def taken(memory: mmap.mmap, path: Path) -> Iterator[Pages]:
    with path.open("wb") as target, Foreign(os.getpid()) as foreign, opened(foreign, address_of(memory), SIZE, target.fileno()) as taking:
        taking.before()
        yield taking
        taking.after()


def address_of(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def ice(path: Path) -> bytes:
    """Make a file with data, holes and zeros in it; return its content."""
    with path.open("wb") as stream:
        stream.truncate(SIZE)
        for at in range(0, SIZE // 2, 1 << 19):
            stream.seek(at)
            stream.write(os.urandom(random.Random(at).randrange(1, 40) * PAGE))
    return path.read_bytes()


@pytest.fixture(params=KINDS)
def memory(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[mmap.mmap]:
    """Memory as a QEMU has it, in the middle of which something has been written since."""
    ice(tmp_path / "ice")
    if request.param == "shared":
        fd = os.memfd_create("ram")
        os.ftruncate(fd, SIZE)
        made = mmap.mmap(fd, SIZE)
    else:
        fd = os.open(tmp_path / "ice", os.O_RDWR)
        flags = mmap.MAP_PRIVATE | (mmap.MAP_ANONYMOUS if request.param == "anonymous" else 0)
        made = mmap.mmap(-1 if request.param == "anonymous" else fd, SIZE, flags=flags)
    rng = random.Random(1)
    for page in rng.sample(range(SIZE // PAGE), 300):
        made[page * PAGE : (page + 1) * PAGE] = bytes(PAGE) if page % 5 == 0 else rng.randbytes(PAGE)
    yield made
    os.close(fd)


@pytest.mark.parametrize("room", [64 << 20, 3 * PAGE], ids=["at once", "bit by bit"])
def test_all_that_is_there_is_taken(memory: mmap.mmap, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    monkeypatch.setattr(pages, "_BUFFER", room)
    with taken(memory, tmp_path / "ram") as taking:
        memory[5 * PAGE : 6 * PAGE] = b"changed " * (PAGE // 8)
        taking.take()
        then = memory[:]
        memory[7 * PAGE : 8 * PAGE] = b"too late" * (PAGE // 8)
    assert (tmp_path / "ram").read_bytes() == then


def test_what_is_to_be_taken_has_its_memory_ready_in_small_pages(tmp_path: Path) -> None:
    memory = mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.write(b"x" * SIZE)
    with taken(memory, tmp_path / "taken") as taking:
        assert taking._buffer is not None
        rules = Path("/proc/self/smaps").read_text().partition(f"\n{address_of(taking._buffer):x}-")[2].partition("VmFlags:")
        found = {words[0]: words[1] for line in rules[0].splitlines()[1:] if len(words := line.split()) > 1}
        assert int(found["Rss:"]) << 10 >= SIZE and found["AnonHugePages:"] == "0"
        assert "nh" in rules[2].splitlines()[0].split()
        taking.take()


def test_zeros_become_holes(tmp_path: Path) -> None:
    memory = mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory[: SIZE // 2] = bytes(SIZE // 2)
    memory[SIZE // 4] = 1
    with taken(memory, tmp_path / "ram") as taking:
        taking.take()
    assert (tmp_path / "ram").read_bytes() == memory[:]
    assert (tmp_path / "ram").stat().st_blocks * 512 <= 128 << 10


def test_what_is_not_one_piece_is_refused(tmp_path: Path) -> None:
    ice(tmp_path / "ice")
    with (tmp_path / "ice").open("r+b") as stream, (tmp_path / "ram").open("wb") as target, Foreign(os.getpid()) as foreign:
        late = mmap.mmap(stream.fileno(), SIZE - PAGE, flags=mmap.MAP_PRIVATE, offset=PAGE)
        with pytest.raises(EngineError, match="where its file does"), opened(foreign, address_of(late), PAGE, target.fileno()):
            pass
        with pytest.raises(EngineError, match="one piece"), opened(foreign, PAGE, PAGE, target.fileno()):
            pass


def test_a_disk_that_leads_elsewhere_is_known(tmp_path: Path) -> None:
    head = bytearray(104)
    head[:8] = b"QFI\xfb" + (3).to_bytes(4, "big")
    for change, alone in ((None, True), ((8, 8), False), ((72, 4), False), ((4, 2), False), ((0, 0), False)):
        changed = bytearray(head)
        if change is not None:
            at, value = change
            changed[at : at + 8] = value.to_bytes(8, "big") if at != 4 else changed[at : at + 8]
            if at == 4:
                changed[4:8] = value.to_bytes(4, "big")
        (tmp_path / "disk").write_bytes(changed)
        assert disks.alone(tmp_path / "disk") is alone
    (tmp_path / "disk").write_bytes(head[:50])
    assert not disks.alone(tmp_path / "disk")
