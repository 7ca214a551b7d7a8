"""The jail of a running QEMU, seen from the host: whose it is, what it may, what it sees."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from machine_home import VmHome
from wall_fixtures import Make

from trivisor import Machine
from trivisor.core.paths import MachineDir
from trivisor.launch import jail
from trivisor.vmm.engines.vm import runner

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to look into another user's process")
NAMESPACES = ("mnt", "pid", "net", "ipc", "uts", "cgroup")


def place(machine: Machine) -> MachineDir:
    return MachineDir(Path(machine.info()["folder"]))


def process(machine: Machine) -> Path:
    return Path(f"/proc/{runner.engine(place(machine))}")


def status(path: Path) -> dict[str, str]:
    return {key: value.strip() for key, _, value in (line.partition(":") for line in (path / "status").read_text().splitlines())}


def files(root: Path) -> Iterator[Path]:
    """Every name in QEMU's root, as it sees it, but for its proc."""
    for folder, folders, names in os.walk(root, followlinks=False):
        if Path(folder) == root and "proc" in folders:
            folders.remove("proc")
        yield from (Path(folder, name) for name in (*folders, *names))


@pytest.fixture(autouse=True)
def full_jail() -> None:
    if lacks := jail.probe().lacks:
        pytest.skip(f"this host's jail lacks {', '.join(lacks)}")


def test_no_privileges(running: Machine) -> None:
    facts = status(process(running))
    for capabilities in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(facts[capabilities], 16) == 0, capabilities
    assert facts["NoNewPrivs"] == "1"
    assert facts["Seccomp"] == "2"
    assert int(facts["Seccomp_filters"]) >= 2, "ours and QEMU's own"
    assert facts["Groups"] == ""
    limits = (process(running) / "limits").read_text()
    assert next(line.split()[4:6] for line in limits.splitlines() if line.startswith("Max core")) == ["0", "0"]


def test_an_id_that_nobody_else_has(running: Machine, make: Make) -> None:
    other = make()
    ids = []
    for machine in (running, other):
        facts = status(process(machine))
        (uid,), (gid,) = set(facts["Uid"].split()), set(facts["Gid"].split())
        assert uid == gid
        assert jail.FIRST_ID <= int(uid) < jail.FIRST_ID + jail.SLOTS
        info = place(machine).disk.stat()
        assert (info.st_uid, stat.S_IMODE(info.st_mode)) == (int(uid), 0o600)
        ids.append(uid)
    assert len(set(ids)) == 2


def test_namespaces_of_its_own(running: Machine, make: Make) -> None:
    machines = [process(running), process(make()), Path("/proc/self")]
    for name in NAMESPACES:
        assert len({os.readlink(path / "ns" / name) for path in machines}) == 3, name
    interfaces = (machines[0] / "net/dev").read_text().splitlines()[2:]
    assert [line.split(":")[0].strip() for line in interfaces] == ["lo"]
    assert status(machines[0])["NSpid"].split()[1:] == ["1"] or len(status(machines[0])["NSpid"].split()) == 2


def test_it_sees_its_own_files_and_no_others(running: Machine, wall_home: VmHome) -> None:
    """Its program, libraries and firmware; its machine's files; four devices. Nothing of the home, of users, of the system."""
    root = process(running) / "root"
    seen = {str(path)[len(str(root)) :] for path in files(root)}
    for hidden in ("/etc", "/root", "/home", "/var", "/tmp", "/run", "/sys", "/bin", "/usr/bin/sh", "/usr/sbin", str(wall_home.root)):
        assert hidden not in seen
    assert {path for path in seen if path.startswith("/dev/")} == {"/dev/null", "/dev/zero", "/dev/random", "/dev/urandom"}
    assert {path for path in seen if path.startswith("/machine/")} <= {"/machine/disk.qcow2", "/machine/root.squashfs", "/machine/ram"}
    executable = [path for path in seen if path.startswith("/usr/bin/")]
    assert len(executable) <= 1, executable
    writable = [line.split() for line in (process(running) / "mountinfo").read_text().splitlines() if "rw" in line.split()[5].split(",")]
    assert {line[4] for line in writable} <= {"/machine/disk.qcow2", "/dev/null", "/dev/zero", "/dev/random", "/dev/urandom"}
    for line in (process(running) / "mountinfo").read_text().splitlines():
        assert "nosuid" in line.split()[5], line


def test_its_environment_and_descriptors(running: Machine) -> None:
    environment = dict(word.split("=", 1) for word in (process(running) / "environ").read_text().rstrip("\0").split("\0"))
    assert environment.keys() <= {"PATH", "HOME"}
    for fd in (process(running) / "fd").iterdir():
        try:
            target = os.readlink(fd)
        except FileNotFoundError:  # closed since
            continue
        assert target.startswith(("socket:", "pipe:", "anon_inode:", "/machine/", "/memfd:", "/dev/null", "/dev/urandom")), target


def test_its_processes_are_hidden_from_it(running: Machine) -> None:
    """In its pid namespace there is nobody else, so there is nobody whom it could signal or trace."""
    inside = os.readlink(process(running) / "ns/pid")
    mates = []
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                if os.readlink(path / "ns/pid") == inside:
                    mates.append(path.name)
            except (FileNotFoundError, PermissionError, ProcessLookupError):
                continue
    assert mates == [process(running).name]


def test_the_image_and_the_ice_cannot_be_written(running: Machine, wall_home: VmHome) -> None:
    """Not even by an escaped QEMU: neither by their owner and mode, nor through its mounts."""
    uid = int(status(process(running))["Uid"].split()[0])
    shared = [path for path in (*(wall_home.root / "store/blobs").rglob("*"), *(wall_home.root / "ice").rglob("ram")) if path.is_file()]
    assert shared
    for path in shared:
        info = path.stat()
        assert info.st_uid != uid
        assert not stat.S_IMODE(info.st_mode) & 0o022, path


def test_info_says_what_the_jail_is(running: Machine) -> None:
    assert running.info()["facts"]["jail"] == str(jail.probe())
