"""Equal pages of machines kept once, behind each wall that can have it so."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest
from wall_fixtures import Make
from workers import locked

from trivisor import VMM, Machine, UnsupportedByWall
from trivisor.core.errors import InvalidSpec
from trivisor.core.units import MIB
from trivisor.vmm.dedupe import KSM
from trivisor.vos.process import Process

BOUND = 60.0
_HOLDER = "import sys; held = b''.join(b'%4096d' % i for i in range(6144)); print('ready', flush=True); sys.stdin.read()"
"""Holds 24 MiB whose pages differ from each other, and not from the next machine's."""


@pytest.fixture
def scanning(wall_vmm: VMM) -> Iterator[None]:
    """The host's kernel looks for equal pages: for one test at a time, whoever runs tests on this host."""
    if os.geteuid() or not KSM.is_dir():
        pytest.skip("needs root, and a kernel with KSM")
    with locked(KSM / "run"):
        yield from _scanning(wall_vmm)


def _scanning(wall_vmm: VMM) -> Iterator[None]:
    known = [KSM / name for name in ("run", "smart_scan", "pages_to_scan", "sleep_millisecs") if (KSM / name).exists()]
    before = [setting.read_text() for setting in known]
    with wall_vmm.dedupe.scanning(pages=20_000):
        assert wall_vmm.dedupe.report().scanning
        yield
    assert [setting.read_text() for setting in known] == before


def holder(machine: Machine) -> Process:
    process = machine.spawn(["python3", "-c", _HOLDER])
    assert process.stdout.readline() == b"ready\n"
    return process


def merged(machine: Machine, least: int) -> int:
    """Wait for the host's kernel, which tells nobody when it has looked at all, to have merged so much."""
    deadline = time.monotonic() + BOUND
    while (found := machine.memory.stats().merged or 0) < least and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


@pytest.mark.alone  # the host's kernel scans, which others would see
@pytest.mark.walls("vm", "container")
def test_equal_pages_of_two_machines_are_kept_once(make: Make, wall_vmm: VMM, scanning: None) -> None:
    one, two = make(dedupe=True), make(dedupe=True)
    programs = [holder(one), holder(two)]
    found = [merged(machine, 23 * MIB) for machine in (one, two)]
    assert min(found) >= 23 * MIB, wall_vmm.dedupe.report()
    assert wall_vmm.dedupe.report().saved >= 23 * MIB
    assert all(program.poll() is None for program in programs)
    if one.wall == "vm":
        one.memory.dedupe(False)
        assert one.memory.stats().merged == 0 and not one.spec.dedupe
        one.memory.dedupe()
    else:
        with pytest.raises(UnsupportedByWall):
            one.memory.dedupe(False)
        one.stop(timeout=0)
        one.memory.dedupe(False)
        assert not one.spec.dedupe
    for program in programs:
        program.kill()


@pytest.mark.walls("gvisor")
def test_a_wall_that_cannot(make: Make) -> None:
    with pytest.raises(UnsupportedByWall):
        make(dedupe=True)


@pytest.mark.walls("vm")
def test_memory_that_others_map_is_not_merged(make: Make) -> None:
    with pytest.raises(InvalidSpec):
        make(dedupe=True, ram="shared")
