"""The figures of a machine's memory, and its limit changed while it runs, behind each wall."""

from __future__ import annotations

import time

import pytest
from wall_fixtures import Make

from trivisor import Machine
from trivisor.core.errors import HostLacks, InvalidSpec
from trivisor.core.units import MIB
from trivisor.vos.process import Process

_HOLDER = "import sys; held = bytearray(b'x' * (48 << 20)); print('ready', flush=True); sys.stdin.read()"


def holder(machine: Machine) -> Process:
    """A program that holds 48 MiB until its stdin ends."""
    process = machine.spawn(["python3", "-c", _HOLDER])
    assert process.stdout.readline() == b"ready\n"
    return process


def counted(machine: Machine) -> None:
    if machine.memory.stats().used is None:
        pytest.skip("needs a memory controller")


def test_figures_follow_what_a_program_holds(running: Machine) -> None:
    counted(running)
    before = running.memory.stats()
    assert before.limit == running.spec.memory
    process = holder(running)
    during = running.memory.stats()
    process.stdin.close()
    assert process.wait(20) == 0
    assert before.used is not None and during.used is not None
    assert during.used - before.used > 40 * MIB
    deadline = time.monotonic() + 60
    while during.used - (running.memory.stats().used or 0) <= 40 * MIB:  # gVisor gives back in its own time, and tells nobody
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert during.private - before.private > 20 * MIB
    assert during.major_faults is not None and before.major_faults is not None and during.major_faults >= before.major_faults
    assert during.pressure is None or 0 <= during.pressure <= 1
    assert during.swap is not None and during.cache is not None and min(during.swap, during.cache, during.shared) >= 0


def test_figures_of_a_paused_machine(running: Machine) -> None:
    counted(running)
    if running.wall == "container" and "pause" in running.info()["facts"].get("lacks", ""):
        pytest.skip("needs a freezer")
    running.pause()
    try:
        figures = running.memory.stats()
    finally:
        running.resume()
    assert figures.limit == running.spec.memory and figures.private > 0
    # Only a guest knows what its programs hold, and this one does not answer.
    assert (figures.used is None) == (running.wall == "vm")


@pytest.mark.walls("container", "gvisor")
def test_a_limit_is_changed_while_programs_run(make: Make) -> None:
    machine = make(memory="128M")
    counted(machine)
    machine.memory.limit("192M")
    assert (machine.memory.stats().limit, machine.spec.memory) == (192 * MIB, 192 * MIB)
    process = holder(machine)
    with pytest.raises(InvalidSpec, match="its programs hold"):
        machine.memory.limit("40M" if machine.wall == "container" else "56M")
    assert machine.memory.stats().limit == 192 * MIB
    machine.memory.limit("160M")
    if machine.wall == "container":
        # It holds at once: a program that wants more is killed, and the first one lives. (Of gVisor the kernel kills the Sentry.)
        assert machine.exec(["python3", "-c", "b'x' * (200 << 20)"], timeout=60).exit_code != 0
    assert process.poll() is None
    process.stdin.close()
    assert process.wait(20) == 0
    machine.stop(timeout=0)
    machine.start()
    assert machine.memory.stats().limit == 160 * MIB


def test_limits_that_no_machine_can_have(running: Machine) -> None:
    for wish in ("1K", 0, "much", 1 << 60):
        with pytest.raises(InvalidSpec):
            running.memory.limit(wish)
    assert running.state == "running" and running.spec.memory == 256 * MIB


@pytest.mark.walls("vm")
def test_a_virtual_machine_that_does_not_run_takes_its_new_size_at_its_next_start(created: Machine) -> None:
    created.memory.limit("320M")
    assert created.spec.memory == 320 * MIB
    with pytest.raises((InvalidSpec, HostLacks)):
        created.memory.limit("1M")


@pytest.mark.walls("vm")
def test_shared_ram_is_seen_and_changed_without_a_copy(make: Make) -> None:
    machine = make(ram="shared", cpus=1)
    process = machine.spawn(["python3", "-c", "import sys; held = bytearray(b'hay' + b'stack-42'); print(1, flush=True); sys.stdin.read()"])
    assert process.stdout.readline()
    with machine.memory.view() as view:
        places = machine.memory.search(b"haystack-42")
        assert places and len(view) == 256 * MIB
        for place in places:
            view.data[place : place + 3] = b"NEW"
        assert machine.memory.search(b"NEWstack-42") == places
        machine.memory.write_physical(places[0], b"OLD")
        assert bytes(view.data[places[0] : places[0] + 3]) == b"OLD"
    with machine.memory.view(places[0] & -4096, 4096) as page:
        assert bytes(page.data[places[0] % 4096 :][:11]) == b"OLDstack-42"
    with pytest.raises(InvalidSpec, match="by pages"):
        machine.memory.view(4097, 1)
    # It is the machine's own, and counted so.
    assert machine.memory.stats().private > 64 * MIB
    process.kill()


@pytest.mark.walls("container", "gvisor")
def test_only_virtual_machines_have_ram_to_share(make: Make) -> None:
    with pytest.raises(InvalidSpec, match="no RAM to share"):
        make(ram="shared")
