"""Figures of memory as kernels write them: control groups of both versions, a guest's proc(5), and what a hostile one might say."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from trivisor.launch import cgroup_memory
from trivisor.launch.cgroup_memory import MemoryUse
from trivisor.launch.cgroup_place import Place
from trivisor.vos.memory.stats import MemoryStats, of_guest

_STAT = "anon 100\nfile 70\nshmem 20\npgmajfault 3\n"
_PSI = "some avg10=12.50 avg60=0.00 avg300=0.00 total=1\nfull avg10=1.00 avg60=0.00 avg300=0.00 total=1\n"


def place(folder: Path, files: dict[str, str], *, unified: bool) -> Place:
    for name, text in files.items():
        (folder / name).write_text(text)
    return Place(folder, frozenset({"memory"}), unified)


def test_v2(tmp_path: Path) -> None:
    files = {"memory.max": "4096\n", "memory.current": "170\n", "memory.swap.current": "5\n", "memory.stat": _STAT, "memory.pressure": _PSI}
    group = place(tmp_path, files, unified=True)
    assert cgroup_memory.read(group) == MemoryUse(4096, 170, 120, 50, 5, 3, 0.125)
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.pressure").unlink()
    found = cgroup_memory.read(group)
    assert found.limit is None and found.pressure is None


def test_v1(tmp_path: Path) -> None:
    stat = "cache 1\ntotal_cache 70\ntotal_rss 100\ntotal_shmem 20\ntotal_swap 5\ntotal_pgmajfault 3\n"
    files = {"memory.limit_in_bytes": "4096\n", "memory.usage_in_bytes": "170\n", "memory.stat": stat}
    group = place(tmp_path, files, unified=False)
    assert cgroup_memory.read(group) == MemoryUse(4096, 170, 120, 50, 5, 3, None)
    (tmp_path / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert cgroup_memory.read(group).limit is None


def test_a_guest() -> None:
    meminfo = "MemTotal: 1000 kB\nMemAvailable:  400 kB\nBuffers: 10 kB\nCached: 90 kB\nShmem: 20 kB\nSwapTotal: 8 kB\nSwapFree: 5 kB\n"
    found = of_guest(2048, 1, 2, meminfo=meminfo, vmstat="pgfault 9\npgmajfault 7\n", pressure=_PSI)
    assert found == MemoryStats(
        limit=2048, used=600 << 10, cache=80 << 10, swap=3 << 10, pressure=0.125, major_faults=7, private=1, shared=2
    )
    silent = of_guest(2048, 1, 2, meminfo="", vmstat="", pressure="")
    assert silent == MemoryStats(limit=2048, used=None, cache=None, swap=None, pressure=None, major_faults=None, private=1, shared=2)


@given(*[st.text(alphabet="MemTotal Avib:kB0123456789\npgjfusoe=.", max_size=200)] * 3)
def test_whatever_a_guest_says(meminfo: str, vmstat: str, pressure: str) -> None:
    found = of_guest(1, 2, 3, meminfo=meminfo, vmstat=vmstat, pressure=pressure)
    assert all(value is None or value >= 0 for value in (found.used, found.cache, found.swap, found.major_faults, found.pressure))
