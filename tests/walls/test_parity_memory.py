"""`vm.memory` of machines that run, behind the walls that have each part of it."""

from __future__ import annotations

import re
import runpy
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from trivisor import Machine, UnsupportedByWall
from trivisor.core.errors import BadAddress, InvalidSpec, NotFound, WaitTimeout
from trivisor.vos.process import Process

BOUND = 60.0
_PROGRAM = """
import sys
held = bytearray(b'hay' + b'stack-%d' % 42)
print('ready', flush=True)
for line in sys.stdin:
    exec(line)
    print(bytes(held).hex(), flush=True)
"""


@pytest.fixture
def program(running: Machine) -> Iterator[Process]:
    """A program that holds b"haystack-42" and does what it is told with it."""
    process = running.spawn(["python3", "-c", _PROGRAM])
    assert process.stdout.readline() == b"ready\n"
    yield process
    process.kill()
    process.wait(10)


def told(program: Process, line: str) -> bytes:
    program.stdin.write(line.encode() + b"\n")
    return bytes.fromhex(program.stdout.readline().decode())


def place(running: Machine, program: Process) -> int:
    """Where the program has its word. A number that it has just made up tells its own bytes from copies of older ones."""
    told(program, "held[:] = b'needle-' + (b'%08d' % 4711)")
    found = running.memory.search(b"needle-00004711", pid=program.pid)
    assert found
    for address in found:
        before = running.memory.read(address, 15, pid=program.pid)
        running.memory.write(address, b"N", pid=program.pid)
        if told(program, "pass") == b"Needle-00004711":
            return address
        running.memory.write(address, before, pid=program.pid)
    raise AssertionError(f"none of {found} is the program's own")


@pytest.mark.walls("vm", "container")
def test_a_program_s_memory_is_read_written_and_searched(running: Machine, program: Process) -> None:
    address = place(running, program)
    assert running.memory.read(address, 15, pid=program.pid) == b"Needle-00004711"
    assert address in running.memory.search(re.compile(rb"Need..-\d{8}"), pid=program.pid)
    assert running.memory.search(b"Needle-00004711", pid=program.pid, start=address, end=address + 15) == [address]
    assert running.memory.search(b"Needle-00004711", pid=program.pid, start=address + 1, end=address + 15) == []
    running.memory.write(address, b"changed", pid=program.pid)
    assert told(program, "pass") == b"changed00004711"


@pytest.mark.walls("vm", "container")
def test_a_word_is_watched_until_a_program_writes_it(running: Machine, program: Process) -> None:
    address = place(running, program)
    with pytest.raises(WaitTimeout):
        running.memory.watch(address, 8, pid=program.pid, timeout=0.05)
    seen = threading.Event()

    def write() -> None:
        """Again and again: nobody tells when the watch has had its first look."""
        while not seen.wait(0.1):
            told(program, "held[0] ^= ord('N') ^ ord('X')")

    writer = threading.Thread(target=write)
    writer.start()
    try:
        change = running.memory.watch(address, 8, pid=program.pid, timeout=BOUND)
    finally:
        seen.set()
        writer.join()
    assert (change.address, {change.before, change.after}) == (address, {b"Needle-0", b"Xeedle-0"})


@pytest.mark.walls("vm", "container")
def test_what_is_not_there(running: Machine, program: Process) -> None:
    memory = running.memory
    with pytest.raises(NotFound, match="no process 99999"):
        memory.read(4096, 1, pid=99999)
    for address in (0, 1 << 46, 0x8000_0000_0000 - 4096):
        with pytest.raises(BadAddress):
            memory.read(address, 8, pid=program.pid)
    for address, size in ((-1, 8), (1 << 64, 1), (0, 0), (0, 2 << 30), ((1 << 64) - 1, 2)):
        with pytest.raises(InvalidSpec):
            memory.read(address, size, pid=program.pid)
    with pytest.raises(InvalidSpec, match="bytes"):
        memory.search(b"", pid=program.pid)
    assert running.state == "running"


@pytest.mark.walls("gvisor", "container")
def test_walls_without_it_say_so(running: Machine) -> None:
    for look in (running.memory.view, running.memory.processes, lambda: running.memory.symbols, lambda: running.memory.read(0, 1)):
        with pytest.raises(UnsupportedByWall, match="memory of"):
            look()
    if running.wall == "gvisor":
        with pytest.raises(UnsupportedByWall, match="its processes"):
            running.memory.read(0, 1, pid=1)


@pytest.mark.walls("vm")
def test_a_view_of_all_its_memory(running: Machine, program: Process) -> None:
    address = place(running, program)
    page = running.memory.page(address, pid=program.pid)
    physical = page.physical + address - page.virtual
    assert page.user and page.writable
    with running.memory.view() as view:
        assert len(view) == running.spec.memory
        assert bytes(view.data[physical : physical + 15]) == b"Needle-00004711"
    assert physical in running.memory.search(b"Needle-00004711")
    assert running.memory.read_physical(physical, 6) == b"Needle"
    running.memory.write_physical(physical, b"P")
    assert told(program, "pass") == b"Peedle-00004711"
    with running.memory.view(physical, 6) as small:
        assert (small.start, bytes(small.data)) == (physical, b"Peedle")
    for start, size in ((running.spec.memory, 1), (running.spec.memory - 1, 2), (1 << 40, None)):
        with pytest.raises(BadAddress, match="not memory"):
            running.memory.view(start, size)


@pytest.mark.walls("vm")
def test_a_view_is_what_its_pages_are_read_one_by_one(make: Callable[..., Machine]) -> None:
    """Pages that QEMU has never touched come out of the ice; both ways of reading must agree, before and after it is touched."""
    machine = make(cpus=1, disk="8G")
    machine.pause()
    memory = machine.memory
    with memory.view() as fresh:
        whole = b"".join(memory.read_physical(at, 16 << 20) for at in range(0, machine.spec.memory, 16 << 20))
        assert fresh.data == whole
    with memory.view() as touched:
        assert touched.data == whole


@pytest.mark.walls("vm")
def test_the_kernel_s_symbols_and_memory(running: Machine) -> None:
    said = running.exec("grep -E ' (init_task|linux_banner|_text|do_exit)$' /proc/kallsyms").text
    known = {name: int(address, 16) for address, _, name in (line.split()[:3] for line in said.splitlines())}
    assert len(known) == 4
    assert {name: running.memory.symbols[name] for name in known} == known
    banner = running.memory.read(running.memory.symbols["linux_banner"], 14)
    assert banner == b"Linux version "
    assert not running.memory.page(running.memory.symbols["_text"]).user
    with pytest.raises(BadAddress):
        running.memory.read(0xFFFF_FF00_0000_0000, 1)


@pytest.mark.walls("vm")
def test_a_list_of_processes_from_outside_is_what_ps_says(running: Machine) -> None:
    """Of a machine that is paused, so that what is compared is of one moment: a program's own list, made just before."""
    lister = """if True:
        import os, sys, time
        def said(file):
            for pid in filter(str.isdigit, os.listdir('/proc')):
                try:
                    yield pid, open('/proc/' + pid + '/' + file).read().strip()
                except OSError: # it ended since
                    pass
        while [text for _, text in said('cmdline')].count('sleep\\0001000\\0') < 8: # some are not yet what they will be
            time.sleep(0.02)
        for row in said('stat'):
            print(*row)
        print('done', flush=True)
        sys.stdin.read()
    """
    sleepers = running.spawn("for i in 1 2 3 4 5 6 7 8; do sleep 1000 & done; echo; wait")
    assert sleepers.stdout.readline()
    shell = running.spawn(["python3", "-c", lister])
    rows = []
    while (row := shell.stdout.readline()) != b"done\n":
        assert row, shell.stderr.read()
        rows.append(row)
    running.pause()
    try:
        seen = running.memory.processes()
    finally:
        running.resume()
    inside = {}
    for row in rows:
        pid, _, rest = row.decode().partition(" ")
        name = rest[rest.index("(") + 1 : rest.rindex(")")]
        inside[int(pid)] = (name[:15], int(rest[rest.rindex(")") + 1 :].split()[1]))
    outside = {process.pid: (process.name, process.parent) for process in seen}
    # The kernel's workers come, go and are renamed by themselves; one that has just come bears its parent's name.
    kernels = {pid for pid, row in (*inside.items(), *outside.items()) if row[0].startswith("kworker") or row == ("kthreadd", 2)}
    for pid in kernels:
        inside.pop(pid, None)
        outside.pop(pid, None)
    assert outside == inside
    assert sum(process.argv == ("sleep", "1000") for process in seen) == 8
    assert {process.uid for process in seen} == {0}
    sleepers.kill()
    shell.kill()


@pytest.mark.walls("vm")
def test_the_example_looks_inside(running: Machine) -> None:
    example = runpy.run_path(str(Path(__file__).parents[2] / "examples/look_inside.py"))
    assert example["processes"](running)[0].name == "init"
    change = example["spent"](running)
    assert (change.before, change.after) == (b"purse:0000000777", b"purse:0000000042")
