"""The vm wall with its real engine: every way to start, what clones share and what not, who sees what."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from images_for_tests import mini_image

from trivisor import VMM, Machine
from trivisor.core.errors import EngineError, HostLacks, InvalidSpec, TrivisorError
from trivisor.core.paths import Home, MachineDir
from trivisor.launch import jail
from trivisor.launch.jail import JailReport
from trivisor.vmm.engines.vm import kit, proc, runner
from trivisor.vmm.engines.vm.engine import VmEngine

pytestmark = pytest.mark.slow
Make = Callable[..., Machine]


def _quiet(_: str) -> None:
    pass


@pytest.fixture(scope="session")
def vm_home(tmp_path_factory: pytest.TempPathFactory, image_home: Path) -> Home:
    """A home of the tests' own with the image "mini" and the kit of the home that set-up made; its ice is shared by the session."""
    home = Home(tmp_path_factory.mktemp("vm") / "home")
    home.open()
    for made in (image_home / "kits").glob("micro-*"):
        if made.is_dir():
            shutil.copytree(made, home.kits / made.name)
    mini_image(home)
    try:
        kit.get(home, "micro", _quiet)
    except HostLacks as error:
        pytest.skip(str(error))
    return home


@pytest.fixture
def vmm(vm_home: Home) -> Iterator[VMM]:
    with VMM(vm_home.root) as opened:
        yield opened
        for machine in opened.list():
            machine.delete(force=True)


@pytest.fixture
def running(vmm: VMM) -> Make:
    """Make and start a machine of the image "mini"."""

    def make(**spec: object) -> Machine:
        machine = vmm.create("mini", wall="vm", **spec)
        machine.start()
        return machine

    return make


def way(machine: Machine) -> str:
    return str(machine.info()["facts"]["start"]).partition(",")[0]


def text(machine: Machine, command: str) -> str:
    result = machine.exec(["sh", "-c", command], timeout=60)
    assert result.exit_code == 0, result.stderr
    return result.text.strip()


def test_from_blank_then_from_the_images_ice(running: Make) -> None:
    first, second, third = (running(disk="64M", name=name) for name in ("one", "two", "three"))
    assert [way(machine) for machine in (first, second, third)] == ["from blank ice", "from the image's ice", "from the image's ice"]
    for command in ("cat /etc/machine-id", "cat /proc/sys/kernel/random/uuid", "cat /etc/hostname", "head -c 16 /dev/urandom | sha256sum"):
        assert len({text(machine, command) for machine in (first, second, third)}) == 3, command
    assert [text(machine, "uname -n") for machine in (first, second, third)] == ["one", "two", "three"]
    before, now, after = time.time(), int(text(third, "date +%s")), time.time()
    assert before - 3 < now < after + 3


def test_the_disk_outlives_a_stop(running: Make) -> None:
    for _ in range(2):
        machine = running(disk="64M")
        text(machine, "echo kept >/root/file; sync")
        machine.stop()
        machine.start()
        assert way(machine) == "from blank ice"
        assert text(machine, "cat /root/file") == "kept"
        text(machine, "echo changed >/root/file")
        machine.stop()
        machine.start()
        assert text(machine, "cat /root/file") == "changed", "an orderly stop writes everything"


def test_clones_write_to_nobody_else(running: Make) -> None:
    running(disk="64M", name="zero").delete(force=True)
    one, two = running(disk="64M", name="one"), running(disk="64M", name="two")
    text(one, "echo mine >/root/file; seq 200000 >/dev/shm/numbers; sync")
    assert text(two, "ls /root /dev/shm") == "/dev/shm:\n\n/root:"
    three = running(disk="64M", name="three")
    assert text(three, "ls /root") == ""


def test_ram_disk_is_gone_after_a_stop(running: Make) -> None:
    machine = running(disk="ram")
    text(machine, "echo gone >/root/file")
    machine.stop()
    machine.start()
    assert text(machine, "ls /root") == ""


def test_cold_boot(vm_home: Home) -> None:
    with VMM(vm_home.root, engines=[VmEngine(vm_home, ice="off")]) as vmm:
        machine = vmm.create("mini", wall="vm", cpus=2, disk="64M", env={"COLOUR": "blue sky"})
        try:
            machine.start()
            assert way(machine) == "booted"
            assert text(machine, "cat /sys/devices/system/cpu/online; echo $COLOUR") == "0-1\nblue sky"
        finally:
            machine.delete(force=True)


def test_pause_is_a_freeze(vmm: VMM, running: Make) -> None:
    machine = running(disk="64M")
    engine = VmEngine(vmm._context.home)
    box = vmm._context.box(vmm._context.row(machine.id))
    pid = runner.engine(box.dir)
    assert pid is not None
    assert not engine.paused(box)
    machine.pause()
    assert engine.paused(box)
    before = proc.usage([pid]).cpu_seconds
    time.sleep(0.3)
    assert proc.usage([pid]).cpu_seconds - before < 0.05
    machine.resume()
    assert not engine.paused(box)
    assert text(machine, "echo on") == "on"
    usage = engine.usage(box)
    assert 0 < usage.private < 100 << 20
    assert usage.shared > 0
    assert usage.cpu_seconds > 0


def test_qemu_sees_its_own_files_only(vmm: VMM, running: Make) -> None:
    machine = running(disk="64M")
    pid = runner.engine(vmm._context.home.machine(machine.id))
    report = jail.probe()
    if not report.namespaces:
        pytest.skip("needs namespaces")
    root = Path(f"/proc/{pid}/root")
    assert not (root / "etc").exists()
    assert not (root / "home").exists()
    assert (
        sorted(entry.name for entry in (root / "machine").iterdir()) == ["disk.qcow2", "ram", "root.squashfs"]
        or not (root / "machine/ram").exists()
    )
    status = Path(f"/proc/{pid}/status").read_text()
    assert re.search(r"^CapEff:\s+0+$", status, re.MULTILINE)
    assert re.search(r"^NoNewPrivs:\s+1$", status, re.MULTILINE)
    assert re.search(r"^Seccomp:\s+2$", status, re.MULTILINE)
    net = Path(f"/proc/{pid}/net/dev").read_text().splitlines()[2:]
    assert [line.split(":")[0].strip() for line in net] == ["lo"]
    if report.own_id:
        assert re.search(r"^Uid:\s+2\d{9}\s", status, re.MULTILINE)


def test_where_the_host_forbids_namespaces(vm_home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    lesser = JailReport((), False, jail.probe().landlock, "forbidden", "allow them")
    monkeypatch.setattr(jail, "probe", lambda: lesser)
    with VMM(vm_home.root) as vmm:
        machine = vmm.create("mini", wall="vm", disk="64M")
        try:
            machine.start()
            assert text(machine, "echo here") == "here"
            assert "lacks namespaces" in machine.info()["facts"]["jail"]
            assert not (vm_home.machine(machine.id).root / "ram").exists()
        finally:
            machine.delete(force=True)


def test_ice_that_qemu_refuses_is_thrown_away(vm_home: Home, vmm: VMM) -> None:
    """Its digest is right and QEMU still cannot take it: the start fails clearly, the next one succeeds."""
    running = vmm.create("mini", wall="vm", memory="128M", disk="ram")
    before = {path for path in vm_home.ice.iterdir() if path.is_dir()}
    running.start()
    running.stop()
    (folder,) = {path for path in vm_home.ice.iterdir() if path.is_dir()} - before
    facts = json.loads((folder / "ice.json").read_text())
    state = (folder / "state").read_bytes()[:2000]
    (folder / "state").write_bytes(state)
    (folder / "ice.json").write_text(json.dumps({**facts, "state_digest": hashlib.sha256(state).hexdigest()}))
    for ran in vm_home.cache.glob("ran-*"):
        ran.unlink()
    with pytest.raises(EngineError) as caught:
        running.start()
    assert "thrown away" in caught.value.hint
    assert running.state in ("failed", "stopped")
    running.start()
    assert text(running, "echo well") == "well"


def test_two_first_starts_make_one_ice(vm_home: Home) -> None:
    """Memory of a size that nothing else here uses: its blank ice is not there yet."""
    said: list[list[str]] = [[], []]
    faults: list[TrivisorError] = []
    machines = []
    with VMM(vm_home.root) as vmm:

        def start(number: int, machine: Machine) -> None:
            try:
                machine.start(progress=said[number].append)
            except TrivisorError as error:
                faults.append(error)

        try:
            machines = [vmm.create("mini", wall="vm", memory="160M", disk="ram") for _ in range(2)]
            before = {path for path in vm_home.ice.iterdir() if path.is_dir()}
            threads = [threading.Thread(target=start, args=(number, machine)) for number, machine in enumerate(machines)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(120)
            assert not faults
            made = {path for path in vm_home.ice.iterdir() if path.is_dir()} - before
            assert sum("booting" in word for words in said for word in words) == 1
            # One that comes to it when the other is up already makes the image's, as of every second start.
            assert len(made) == 1 + sum("preparing the image" in word for words in said for word in words) <= 2
            assert sum("waiting" in word for words in said for word in words) == 1
        finally:
            for machine in machines:
                machine.delete(force=True)


def test_killed_while_it_freezes_nothing_is_left(vm_home: Home) -> None:
    """The process that makes ice dies: its machine dies with it, and the next opening sweeps the rest."""
    pid = os.fork()
    if pid == 0:
        try:
            with VMM(vm_home.root) as vmm:
                vmm.create("mini", wall="vm", memory="144M", disk="ram", lifetime="process").start()
        finally:
            os._exit(1)
    deadline = time.monotonic() + 30
    while not list(vm_home.tmp.glob(f"{pid}-*-ice-*/machine/engine")) and not list(vm_home.tmp.glob(f"{pid}-*-ice-*/machine/keeper")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    (place,) = (MachineDir(path) for path in vm_home.tmp.glob(f"{pid}-*-ice-*/machine"))
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    while proc.keeper_pid(place) is not None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with VMM(vm_home.root) as vmm:
        assert list(vm_home.tmp.iterdir()) == []
        assert vmm.list() == []


def test_network(vmm: VMM, running: Make) -> None:
    if os.geteuid() != 0 and shutil.which("passt") is None:
        pytest.skip("needs root or passt")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(EngineError, match=f"host port {port} on 127.0.0.1 is taken"):
            running(network="nat", ports={port: 80}, disk="ram", name="refused")
    machine = running(network="nat", ports={port: 80}, disk="ram", name="served")
    assert "nameserver " in text(machine, "cat /etc/resolv.conf")
    assert text(machine, "cat /sys/class/net/eth0/address").startswith("52:54:00:")
    machine.delete(force=True)
    with socket.create_server(("127.0.0.1", port)):
        pass  # the helper went with its machine


def test_bad_kernels(vmm: VMM, tmp_path: Path) -> None:
    with pytest.raises(InvalidSpec, match="no kernel 'tiny'"):
        vmm.create("mini", wall="vm", kernel="tiny")
    fake = tmp_path / "vmlinuz"
    fake.write_bytes(b"not a kernel" * 100)
    with pytest.raises(InvalidSpec, match="not a Linux kernel"):
        vmm.create("mini", wall="vm", kernel=str(fake))
    assert vmm.list() == []


def test_report(vm_home: Home) -> None:
    report = VmEngine(vm_home).report()
    assert report.available
    assert report.details["accelerator"].startswith(("kvm: ", "tcg: KVM is not used: "))
    assert {"qemu", "jail", "network", "kits"} <= set(report.details)
    missing = VmEngine(vm_home, "/no/such/qemu").report()
    assert not missing.available
    assert missing.remedy
