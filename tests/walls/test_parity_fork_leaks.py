"""Machines forked and deleted many times over: the host and the home are what they were before."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Collection, Iterator

import pytest
from host_state import folders, mounts, processes, sockets
from machine_home import VmHome

from trivisor import VMM, Machine
from trivisor.core.paths import Home
from trivisor.launch.cgroups import family_name
from trivisor.vmm.snapshots import table

_LEAST = {"container": 10, "vm": 2, "gvisor": 2}
_MOST = {"container": 200, "vm": 20, "gvisor": 20}


@pytest.fixture
def parent(wall_home: VmHome, wall: str) -> Iterator[Machine]:
    with VMM(wall_home.root) as vmm:
        machine = vmm.create("debian", wall=wall)
        machine.start()
        machine.exec("echo kept > /root/kept", check=True)
        yield machine
        machine.delete(force=True)


def there(machine: Machine) -> dict[str, Collection[str]]:
    """All that this test's home has on the host, of what machines and snapshots bring with them."""
    context = machine._context
    home = context.home.root
    family = family_name(Home(home))
    return {
        # A parent that is frozen may go on by another process, whose keeper was given another descriptor.
        "processes": sorted(re.sub(r" keep \d+ ", " keep ", command) for command in processes(home).values()),
        "mounts": {line.split()[4] for line in mounts(home)},
        "sockets": {str(path) for path in sockets(home)},
        "groups": {os.path.join(at, name) for at, names, _ in os.walk("/sys/fs/cgroup") if family in at for name in names},
        "machines": folders(home),
        "files": {str(path) for part in ("snapshots", "tmp", "networks", "ice") for path in (home / part).glob("*")},
        "frozen": {str(path) for path in (home / "snapshots").glob("*/*")},
        "records": {kept.id for kept in table.rows(context.records)},
        "pins": {" ".join(pin) for pin in context.images.store.pins()},
    }


@pytest.mark.parametrize("often", [pytest.param(_LEAST, id="some"), pytest.param(_MOST, id="many", marks=pytest.mark.soak)])
def test_nothing_is_left_of_forks_that_came_and_went(parent: Machine, wall: str, often: dict[str, int]) -> None:
    """Forks of forks, so that some outlive what they came from, deleted in another order than they were made."""
    parent.fork()[0].delete(force=True)  # what is kept for the next is there after the first
    before, descriptors, line = there(parent), len(os.listdir("/proc/self/fd")), [parent]
    for turn in range(often[wall]):
        line += line[turn % len(line)].fork()
        if len(line) > 3:
            line.pop(1 + turn % 2).delete(force=True)
    assert line[-1].files.read_text("/root/kept") == "kept\n"
    for machine in line[1:]:
        machine.delete(force=True)
    deadline = time.monotonic() + 10  # killed ones go in their own time
    while (after := there(parent)) != before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert after == before
    assert len(os.listdir("/proc/self/fd")) <= descriptors + 2
    assert parent.files.read_text("/root/kept") == "kept\n"
