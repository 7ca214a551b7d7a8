"""How much of the host's swap a machine may have, and that it is driven into it, behind the walls whose memory is the host's."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from wall_fixtures import Make

from trivisor import Machine, UnsupportedByWall
from trivisor.core.errors import InvalidSpec
from trivisor.core.units import MIB
from trivisor.launch import cgroup_layout
from trivisor.vos.process import Process

BOUND = 120.0
_HOLDER = "import os, sys; held = bytearray(os.urandom(1 << 20)) * 72; print('ready', flush=True); sys.stdin.read()"


def needs_swap_to_be_counted() -> None:
    memory = cgroup_layout.layout().of("memory")
    if memory is None:
        pytest.skip(f"needs the memory controller: {cgroup_layout.layout()}")
    if not memory.unified and not (memory.base / "memory.memsw.limit_in_bytes").exists():
        pytest.skip("needs a kernel that counts swap (swapaccount=1)")


@pytest.fixture(scope="module")
def swap_space(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Swap for these tests: that of the host, or 128 MiB in a file, as root on a file system that can."""
    if len(Path("/proc/swaps").read_text().splitlines()) > 1:
        yield
        return
    if os.geteuid():
        pytest.skip("needs swap, or root to make some")
    file = tmp_path_factory.mktemp("swap") / "swap"
    with file.open("wb") as made:
        os.posix_fallocate(made.fileno(), 0, 128 * MIB)
    file.chmod(0o600)
    subprocess.run(["mkswap", file], check=True, stdout=subprocess.DEVNULL)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.swapon(os.fsencode(file), 0) < 0:
        pytest.skip(f"needs swap, which cannot be made here: {os.strerror(ctypes.get_errno())}")
    try:
        yield
    finally:
        libc.swapoff(os.fsencode(file))
        file.unlink()


def hold(machine: Machine) -> Process:
    process = machine.spawn(["python3", "-c", _HOLDER])
    assert process.stdout.readline() == b"ready\n"
    return process


@pytest.mark.alone  # the host has swap meanwhile, which others would see
@pytest.mark.walls("container", "gvisor")
def test_a_machine_is_driven_into_swap_as_far_as_it_may(make: Make, swap_space: None) -> None:
    needs_swap_to_be_counted()
    machine = make(memory="64M", swap="96M")
    process = hold(machine)
    figures = machine.memory.stats()
    assert figures.swap is not None and figures.swap >= 8 * MIB
    assert figures.used is not None and figures.used <= 64 * MIB
    with pytest.raises(InvalidSpec, match="less than the"):
        machine.memory.swap("1M")
    machine.memory.swap("128M")
    machine.memory.swap(None)
    assert machine.spec.swap is None and process.poll() is None
    process.kill()


@pytest.mark.alone
@pytest.mark.walls("container")
def test_without_swap_the_program_is_killed(make: Make, swap_space: None) -> None:
    needs_swap_to_be_counted()
    machine = make(memory="64M", swap="96M")
    machine.memory.swap(0)
    assert machine.spec.swap == 0
    assert machine.exec(["python3", "-c", _HOLDER], timeout=BOUND).out_of_memory
    machine.stop(timeout=0)
    machine.memory.swap("64M")
    machine.start()
    assert machine.exec(["python3", "-c", _HOLDER], timeout=BOUND).ok


@pytest.mark.walls("vm")
def test_a_guest_takes_no_swap_from_the_host(running: Machine) -> None:
    with pytest.raises(UnsupportedByWall):
        running.memory.swap("64M")
    assert running.state == "running" and running.spec.swap is None
