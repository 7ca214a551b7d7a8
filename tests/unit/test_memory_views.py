"""Views of memory that another process has: copied from wherever its bytes are, and mapped only from what cannot become shorter."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
from pathlib import Path

import pytest

from trivisor.core.errors import BadAddress, GuestGone, GuestProtocolError, InvalidSpec
from trivisor.vos.memory import resident, search
from trivisor.vos.memory.foreign import Foreign
from trivisor.vos.memory.physical import Physical
from trivisor.vos.ports import Ram

PAGE = mmap.PAGESIZE
SIZE = 64 * PAGE


def address_of(mapping: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(mapping))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Data, a hole, data, and a hole at the end."""
    path = tmp_path / "ram"
    with path.open("wb") as stream:
        stream.truncate(SIZE)
        for page in (0, 1, 5, 40):
            stream.seek(page * PAGE)
            stream.write(bytes([page + 1]) * PAGE)
    return path


@pytest.mark.parametrize("flags", [mmap.MAP_PRIVATE, mmap.MAP_SHARED, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS])
def test_all_of_it_touched_or_not(file: Path, flags: int) -> None:
    with file.open("r+b") as stream:
        mapping = mmap.mmap(-1 if flags & mmap.MAP_ANONYMOUS else stream.fileno(), SIZE, flags=flags)
        mapping[3 * PAGE : 3 * PAGE + 4] = b"mine"
        mapping[40 * PAGE] = 9
        with Foreign(os.getpid()) as foreign:
            buffer = bytearray(SIZE)
            assert resident.into(foreign, memoryview(buffer), address_of(mapping)) == SIZE
            part = bytearray(10)
            assert resident.into(foreign, memoryview(part), address_of(mapping) + 3 * PAGE) == 10
        assert bytes(buffer) == mapping[:] and bytes(part) == b"mine" + bytes(6)


def test_what_is_not_mapped(file: Path) -> None:
    mapping = mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    mapping[0] = 7
    at = address_of(mapping)
    libc = ctypes.CDLL(None)
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    assert libc.mprotect(at + 8 * PAGE, PAGE, 0) == 0
    with Foreign(os.getpid()) as foreign:
        assert foreign.read(at, 2) == b"\7\0"
        with pytest.raises(BadAddress):
            foreign.read(at + 8 * PAGE - 1, 2)
        with pytest.raises(BadAddress):
            foreign.write(at + 8 * PAGE, b"x")
        assert foreign.into(memoryview(bytearray(SIZE)), at) == 8 * PAGE
        # A search goes on behind what cannot be read.
        mapping[20 * PAGE : 20 * PAGE + 6] = b"needle"
        found = search.find([(at, SIZE)], lambda where, buffer: foreign.into(buffer, where), search.compiled(b"needle"), 10)
        assert found == [at + 20 * PAGE]
        assert search.find([(at, SIZE)], lambda where, buffer: foreign.into(buffer, where), search.compiled(b"nowhere"), 10) == []
    assert libc.mprotect(at + 8 * PAGE, PAGE, 3) == 0


def test_text_is_no_pattern() -> None:
    with pytest.raises(InvalidSpec) as refused:
        search.compiled("text")  # type: ignore[arg-type]
    assert "encode" in refused.value.hint


def test_a_search_across_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "PIECE", 8192)
    data = bytearray(100_000)
    places = [0, 8190, 8192, 16380, 20000, 99_994]
    for place in places:
        data[place : place + 2] = b"ab"

    def fill(at: int, buffer: memoryview) -> int:
        chosen = data[at - 1000 : at - 1000 + len(buffer)]
        buffer[: len(chosen)] = chosen
        return len(chosen)

    assert search.find([(1000, len(data))], fill, search.compiled(b"ab"), 100) == [1000 + place for place in places]
    assert search.find([(1000, len(data))], fill, search.compiled(b"ab"), 2) == [1000, 9190]
    runs = [(0, 4), (4, 4), (16, 4)]
    assert list(search.joined(runs, 0, 100)) == [(0, 8), (16, 4)]
    assert list(search.joined(runs, 2, 17)) == [(2, 6), (16, 1)]


def test_only_what_cannot_become_shorter_is_mapped(file: Path) -> None:
    own = os.memfd_create("ram", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(own, SIZE)
    place = Path(f"/proc/self/fd/{own}")
    with Foreign(os.getpid()) as foreign:
        physical = Physical(foreign, [Ram(0, SIZE // 2, 0), Ram(1 << 32, SIZE // 2, SIZE // 2)])
        for wrong in (file, place):
            with pytest.raises(GuestProtocolError, match="something else"):
                physical.map(wrong, 0, PAGE)
        fcntl.fcntl(own, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        with physical.map(place, (1 << 32) + PAGE, PAGE) as view:
            view.data[:4] = b"here"
        assert os.pread(own, 4, SIZE // 2 + PAGE) == b"here"
        for start, size, error in ((1, PAGE, InvalidSpec), (0, SIZE, BadAddress), (1 << 33, PAGE, BadAddress)):
            with pytest.raises(error):
                physical.map(place, start, size)
    os.close(own)


def test_a_process_that_ends() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    with Foreign(pid) as foreign:
        with pytest.raises(GuestGone):
            foreign.wait(10)
        os.waitpid(pid, 0)
        with pytest.raises(GuestGone):
            foreign.read(4096, 1)
    with pytest.raises(GuestGone):
        Foreign(pid)
