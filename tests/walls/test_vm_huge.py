"""A virtual machine's RAM in huge pages: those that were set aside, and those that the kernel makes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from migrating import until
from wall_fixtures import Make
from workers import locked

from trivisor import HostLacks, Machine
from trivisor.core.errors import InvalidSpec
from trivisor.core.units import MIB
from trivisor.vmm.engines.vm import runner

POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
PAGES = 128
pytestmark = pytest.mark.walls("vm")


def number(name: str) -> int:
    return int((POOL / name).read_text())


@pytest.fixture
def set_aside() -> Iterator[None]:
    """Huge pages for one machine of 256M, for one test at a time, whoever runs tests on this host."""
    if os.geteuid() or not POOL.exists():
        pytest.skip("needs root, and a kernel with huge pages")
    with locked(POOL / "nr_hugepages"):
        yield from _set_aside()


def _set_aside() -> Iterator[None]:
    before = number("nr_hugepages")
    (POOL / "nr_hugepages").write_text(f"{before + PAGES}\n")
    try:
        if number("free_hugepages") < PAGES:
            pytest.skip("needs 256 MiB of the host's memory that is in one piece each 2 MiB")
        yield
    finally:
        (POOL / "nr_hugepages").write_text(f"{before}\n")


def kilobytes(machine: Machine, name: str) -> int:
    pid = runner.engine(machine._folder)
    found = re.search(rf"^{name}: +(\d+) kB$", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    return int(found[1]) if found else 0


def test_a_machine_in_pages_that_were_set_aside(make: Make, set_aside: None) -> None:
    free = number("free_hugepages")
    machine = make(hugepages="reserved")
    assert number("free_hugepages") == free - PAGES
    assert machine.exec(["echo", "huge"]).text == "huge\n"
    assert machine.memory.stats().private >= 64 * MIB
    process = machine.spawn(["python3", "-c", "import sys; held = b'hay' + b'stack-2M'; print(1, flush=True); sys.stdin.read()"])
    assert process.stdout.readline()
    assert machine.memory.search(b"haystack-2M")
    with pytest.raises(HostLacks, match="128 huge pages of 2M are needed, and 0 are free") as caught:
        make(hugepages="reserved")
    assert "nr_hugepages" in caught.value.hint
    machine.stop(timeout=0)
    until(lambda: number("free_hugepages") == free)


def test_a_machine_in_pages_that_the_kernel_makes(make: Make) -> None:
    machine = make(hugepages="transparent")
    assert machine.exec(["echo", "huge"]).text == "huge\n"
    # What the kernel had not in one piece when it was wanted, it puts together later.
    until(lambda: kilobytes(machine, "AnonHugePages") > 16 << 10)


def test_what_cannot_be_in_huge_pages(make: Make) -> None:
    for wishes in ({"memory": "129M"}, {"ram": "shared"}, {"dedupe": True}, {"hugepages": "some"}):
        with pytest.raises(InvalidSpec):
            make(**{"hugepages": "reserved", **wishes})
