"""Devices that come and go while a virtual machine runs."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from machine_home import VmHome

from trivisor import VMM, Machine
from trivisor.core.errors import AlreadyExists, GuestGone, InvalidSpec, InvalidState, NotFound, StorageError, UnsupportedByWall
from trivisor.vos.devices import BlockDevice, CharDevice, Disk, Random

pytestmark = [pytest.mark.slow, pytest.mark.walls("vm")]
MIB = 1 << 20


class Memory(BlockDevice):
    """A disk in memory with sectors that cannot be read."""

    def __init__(self, size: int = 8 * MIB, **given: float) -> None:
        super().__init__(size, **given)  # type: ignore[arg-type]
        self.data = bytearray(size)
        self.bad: set[int] = set()
        self.hang = 0.0

    def read(self, offset: int, length: int) -> bytes:
        if self.bad & set(range(offset // 512, (offset + length) // 512)):
            raise OSError("a bad sector")
        time.sleep(self.hang)
        return bytes(self.data[offset : offset + length])

    def write(self, offset: int, data: bytes) -> None:
        self.data[offset : offset + len(data)] = data


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"first sector".ljust(512, b"\0"))
    os.truncate(path, 8 * MIB)
    return path


@pytest.fixture
def machine(running: Machine) -> Iterator[Machine]:
    yield running
    for device in running.devices.list():
        running.devices.detach(device.name)


def qcow2(path: Path, *words: str) -> Path:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *words, path, "64M"], check=True)
    return path


def text(machine: Machine, command: str) -> str:
    result = machine.exec(["sh", "-c", command], timeout=60)
    assert result.exit_code == 0, result.stderr
    return result.text.strip()


def test_a_disk_comes_and_goes_twenty_times(machine: Machine, raw: Path) -> None:
    for number in range(20):
        attached = machine.devices.attach(Disk(raw), "data")
        node = machine.devices.node("data")
        assert attached.plugged and attached.path == str(raw)
        assert node is not None
        if number == 0:
            assert text(machine, f"head -c 12 {node}; printf written | dd of={node} bs=512 seek=1 conv=fsync 2>/dev/null") == "first sector"
        machine.devices.detach("data")
        assert machine.devices.list() == []
        assert node.removeprefix("/dev/") not in {entry.name for entry in machine.files.list("/sys/block")}
    assert raw.read_bytes()[512:519] == b"written"


def test_several_at_once(machine: Machine, tmp_path: Path, raw: Path) -> None:
    names = []
    for number in range(4):
        path = tmp_path / f"{number}.qcow2"
        names.append(machine.devices.attach(Disk(qcow2(path))).name)
    assert len({machine.devices.node(name) for name in names}) == 4
    assert [device.name for device in machine.devices.list()] == names == ["disk1", "disk2", "disk3", "disk4"]
    machine.devices.attach(Random(), "dice")
    machine.devices.attach(Disk(raw, readonly=True), "fixed")
    node = machine.devices.node("fixed")
    assert text(machine, f"cat /sys/block/{Path(str(node)).name}/ro") == "1"
    for _ in range(2):
        machine.devices.attach(Random())
    with pytest.raises(InvalidSpec, match="no free port"):
        machine.devices.attach(Random())
    assert "hw_random" in text(machine, "ls /sys/class/misc")


def test_what_is_no_disk_of_its_own_is_refused(machine: Machine, tmp_path: Path, raw: Path) -> None:
    base = qcow2(tmp_path / "base.qcow2")
    overlay = qcow2(tmp_path / "overlay.qcow2", "-b", str(base), "-F", "qcow2")
    apart = qcow2(tmp_path / "apart.qcow2", "-o", f"data_file={tmp_path / 'data'}")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "empty").touch()
    for path, error in [
        (overlay, "backing file"),
        (apart, "another file"),
        (tmp_path, "folder"),
        (tmp_path / "fifo", "neither a file"),
        (tmp_path / "empty", "empty disk"),
        (Path("/dev/null"), "neither a file"),
    ]:
        with pytest.raises(InvalidSpec, match=error):
            machine.devices.attach(Disk(path))
    with pytest.raises(InvalidSpec, match="not a qcow2"):
        machine.devices.attach(Disk(raw, format="qcow2"))
    with pytest.raises(NotFound):
        machine.devices.attach(Disk(tmp_path / "none"))
    with pytest.raises(InvalidSpec):
        machine.devices.attach(Disk(raw), "No Name")
    assert machine.devices.list() == []


def test_the_same_disk_twice_is_refused(machine: Machine, wall_vmm: VMM, tmp_path: Path, raw: Path) -> None:
    machine.devices.attach(Disk(raw), "one")
    link = tmp_path / "link"
    link.hardlink_to(raw)
    with pytest.raises(InvalidSpec, match="attached as one already"):
        machine.devices.attach(Disk(link), "two")
    with pytest.raises(AlreadyExists):
        machine.devices.attach(Disk(tmp_path / "link"), "one")
    other = wall_vmm.run("debian", wall="vm")
    with pytest.raises(InvalidSpec, match="in use"):
        other.devices.attach(Disk(raw))
    assert other.devices.list() == []
    other.delete(force=True)


def test_limits(machine: Machine, raw: Path) -> None:
    machine.devices.attach(Disk(raw, bandwidth="2M"), "slow")
    node = machine.devices.node("slow")
    begun = time.monotonic()
    text(machine, f"dd if={node} of=/dev/null bs=1M count=5 iflag=direct 2>/dev/null")
    assert time.monotonic() - begun > 1
    machine.devices.detach("slow")
    machine.devices.attach(Disk(raw, iops=10), "few")
    begun = time.monotonic()
    text(machine, f"dd if={machine.devices.node('few')} of=/dev/null bs=512 count=25 iflag=direct 2>/dev/null")
    assert time.monotonic() - begun > 1


def test_one_that_is_mounted_is_pulled_out(machine: Machine, raw: Path) -> None:
    """The guest's programs get I/O errors, and the guest lives on."""
    subprocess.run(["mkfs.ext4", "-q", "-F", raw], check=True)
    machine.devices.attach(Disk(raw), "data")
    text(machine, f"mkdir -p /mnt/pulled; mount {machine.devices.node('data')} /mnt/pulled; echo old >/mnt/pulled/file; sync")
    machine.devices.detach("data")
    assert machine.devices.list() == []
    failed = machine.exec("dd if=/dev/zero of=/mnt/pulled/new bs=64k count=64 conv=fsync", timeout=60)
    assert failed.exit_code and b"rror" in failed.stderr
    text(machine, "umount -l /mnt/pulled; echo lives >/root/lives; sync")
    machine.devices.attach(Disk(raw), "data")
    assert text(machine, f"mount {machine.devices.node('data')} /mnt/pulled; cat /mnt/pulled/file; umount /mnt/pulled") == "old"


def test_kept_for_each_start(wall_vmm: VMM, raw: Path) -> None:
    machine = wall_vmm.create("debian", wall="vm")
    assert not machine.devices.attach(Disk(raw), "data").plugged
    with pytest.raises(InvalidState) as refused:
        machine.devices.attach(Memory())
    assert "not kept" in refused.value.hint
    machine.start()
    assert machine.devices.list()[0].plugged
    node = machine.devices.node("data")
    assert text(machine, f"head -c 12 {node}") == "first sector"
    machine.devices.attach(Memory(), "ours")
    machine.stop()
    assert [(device.name, device.plugged) for device in machine.devices.list()] == [("data", False)]
    raw.rename(raw.with_name("away"))
    with pytest.raises(NotFound, match="there is no disk") as caught:
        machine.start()
    assert "detach data" in caught.value.hint
    assert machine.state != "running"
    machine.devices.detach("data")
    machine.start()
    machine.pause()
    with pytest.raises(InvalidState):
        machine.devices.attach(Random())


def test_a_disk_made_of_python(machine: Machine) -> None:
    disk = Memory()
    attached = machine.devices.attach(disk, "py")
    assert (attached.kind, attached.owner) == ("block", os.getpid())
    node = machine.devices.node("py")
    text(machine, f"printf hello | dd of={node} bs=512 seek=3 conv=sync,fsync 2>/dev/null")
    assert disk.data[1536:1541] == b"hello"
    disk.bad = {3}
    failed = machine.exec(f"dd if={node} of=/dev/null bs=512 skip=3 count=1 iflag=direct")
    assert failed.exit_code and b"Input/output error" in failed.stderr
    assert text(machine, f"dd if={node} bs=512 skip=4 count=1 iflag=direct 2>/dev/null | wc -c") == "512"
    assert "a bad sector" in str(disk.faults[-1])


def test_a_function_that_hangs_is_an_io_error(machine: Machine) -> None:
    disk = Memory(timeout=0.3)
    machine.devices.attach(disk, "py")
    disk.hang = 3.0
    failed = machine.exec(f"dd if={machine.devices.node('py')} of=/dev/null bs=512 skip=100 count=1 iflag=direct", timeout=60)
    assert failed.exit_code and b"Input/output error" in failed.stderr
    assert isinstance(disk.faults[0], TimeoutError)


def test_a_disk_whose_owner_is_killed(machine: Machine, wall_home: VmHome) -> None:
    """The guest gets I/O errors, the machine lives, and whoever is left takes the disk away."""
    code = (
        "import sys\nfrom trivisor import VMM\nfrom trivisor.vos.devices import BlockDevice\n"
        "class Zeros(BlockDevice):\n    def read(self, offset, length):\n        return bytes(length)\n"
        f"VMM({str(wall_home.root)!r}).get({machine.id!r}).devices.attach(Zeros(1 << 20), 'theirs')\n"
        "print('attached', flush=True)\nsys.stdin.read()\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"attached\n"
        node = machine.devices.node("theirs")
        read = f"dd if={node} of=/dev/null bs=512 count=1 iflag=direct"
        assert machine.exec(read).exit_code == 0
        owner.send_signal(signal.SIGKILL)
    assert b"Input/output error" in machine.exec(read, timeout=60).stderr
    assert machine.devices.list()[0].owner == owner.pid
    machine.devices.detach("theirs")
    assert text(machine, "echo lives") == "lives"


def test_a_line_to_python(machine: Machine) -> None:
    class Shout(CharDevice):
        def receive(self, data: bytes) -> bytes | None:
            return data.upper()

    device = Shout()
    machine.devices.attach(device, "shout")
    node = machine.devices.node("shout")
    said = "import os,sys; f = os.open(sys.argv[1], os.O_RDWR); os.write(f, b'hello'); print(os.read(f, 9).decode())"
    assert machine.exec(["python3", "-c", said, str(node)], check=True).text == "HELLO\n"
    machine.devices.detach("shout")
    with pytest.raises(GuestGone):
        device.send(b"gone")


def test_other_walls_say_that_they_cannot(wall_vmm: VMM, raw: Path) -> None:
    report = {report.wall: report for report in wall_vmm.walls()}["container"]
    if not report.available:
        pytest.skip(f"needs the container wall: {report.why}")
    machine = wall_vmm.create("mini", wall="container")
    with pytest.raises(UnsupportedByWall):
        machine.devices.attach(Disk(raw))
    assert machine.devices.list() == []


def test_a_damaged_list_of_devices(wall_vmm: VMM, wall_home: VmHome) -> None:
    machine = wall_vmm.create("debian", wall="vm")
    (wall_home.root / "machines" / machine.id / "devices.json").write_text('{"a": {"disk": {"x": 1}}}')
    with pytest.raises(StorageError, match="cannot be read"):
        machine.devices.list()


def test_what_the_document_shows(wall_home: VmHome) -> None:
    text = (Path(__file__).parents[2] / "docs/devices.md").read_text()
    (source,) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    environment = {**os.environ, "TRIVISOR_HOME": str(wall_home.root)}
    done = subprocess.run([sys.executable, "-c", source], env=environment, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("1048576\n\n", "")
