"""Hosts of other kinds than this one: a virtual machine is the host, whose kernel has what this one may lack.

Control groups of version 2 alone, version 1 alone, and version 2 as it is delegated to a user who is not root; AppArmor. What runs there is
our own code with this host's Python (cgroup_script.py, apparmor_script.py).
"""

from __future__ import annotations

import ctypes
import re
import sqlite3
import sys
import sysconfig
from pathlib import Path

import msgspec
import pytest
from wall_fixtures import Make

import trivisor
from trivisor import Machine
from trivisor.vmm.engines.vm.making import UPPER_DISK

BOUND = 240.0
USER = 1234
V1 = ("memory", "cpu,cpuacct", "cpuset", "blkio", "pids", "freezer")
HIERARCHIES = {
    "v2": "mount -t cgroup2 none /sys/fs/cgroup",
    "v1": "mount -t tmpfs none /sys/fs/cgroup; cd /sys/fs/cgroup; "
    + "; ".join(f"mkdir {names} && mount -t cgroup -o {names} none {names}" for names in V1),
    # What systemd does: a group of the user's own, and the files in it by which groups are made and joined.
    "delegated": "mount -t cgroup2 none /sys/fs/cgroup; cd /sys/fs/cgroup; echo +cpu +cpuset +io +memory +pids >cgroup.subtree_control; "
    f"mkdir -p user.slice/own; echo +cpu +cpuset +io +memory +pids >user.slice/cgroup.subtree_control; cd user.slice/own; "
    f"chown {USER}:{USER} . cgroup.procs cgroup.subtree_control cgroup.threads; mkdir -p inner; chown -R {USER}:{USER} inner; "
    "echo +cpu +cpuset +io +memory +pids >cgroup.subtree_control",
}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def machine(make: Make) -> Machine:
    if sys.version_info[:2] != (3, 11) or sysconfig.get_platform() != "linux-x86_64":
        pytest.skip("needs the Python of the image, 3.11: what is compiled is compiled for one version")
    folders = {
        "/srv/stdlib": sysconfig.get_path("stdlib"),
        "/srv/site": str(Path(str(msgspec.__file__)).parents[1]),
        "/srv/src": str(Path(trivisor.__file__).parents[1]),
        "/srv/tests": str(Path(__file__).parent),
    }
    machine = make(cpus=2, memory="512M", volumes={target: f"{source}:ro" for target, source in folders.items()})
    for library in libraries():
        machine.files.upload(library, f"/usr/lib/{library.name}")
    return machine


def libraries() -> list[Path]:
    """What this host's Python is linked to and the image may lack, by the names that it is linked to."""
    assert ctypes.sizeof(ctypes.c_int) and sqlite3.sqlite_version, "both are loaded"
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    return [Path(found[1]) for path in mapped if (found := re.match(r"(/.*/lib(?:sqlite3|ffi)\.so\.\d+)", path))]


def run(machine: Machine, script: str, prepared: str = "", before: str = "", become: str = "") -> None:
    """Run a script of this folder in the machine, with a folder for its home as the last argument."""
    # The home lies on the machine's disk itself: the root is an overlay, which has no disk and carries no other.
    given = f"mkdir /mnt/disk; mount {UPPER_DISK} /mnt/disk; mkdir /mnt/disk/own; chown {USER}:{USER} /mnt/disk/own"
    machine.exec(f"set -e; {given}; {prepared}", check=True, timeout=BOUND)
    python = {"PYTHONPATH": "/srv/src:/srv/site:/srv/stdlib:/srv/stdlib/lib-dynload", "PYTHONDONTWRITEBYTECODE": "1", "HOME": "/tmp"}
    result = machine.exec(f"cd /tmp; {before} exec {become} python3 /srv/tests/{script} /mnt/disk/own/home", env=python, timeout=BOUND)
    assert result.ok, f"{result.text}\n{result.error_text}"
    assert result.text.endswith("all of it\n")


@pytest.mark.parametrize("kind", [kind if kind == "v2" else pytest.param(kind, marks=pytest.mark.soak) for kind in HIERARCHIES])
def test_control_groups(machine: Machine, kind: str) -> None:
    before = become = ""
    if kind == "delegated":
        # Only root can put the first process into what it gives away.
        before = "echo $$ >/sys/fs/cgroup/user.slice/own/inner/cgroup.procs;"
        become = f"setpriv --reuid={USER} --regid={USER} --clear-groups"
    run(machine, f"cgroup_script.py {kind}", f"mkdir -p /sys/fs/cgroup; {HIERARCHIES[kind]}", before, become)


def test_apparmor(machine: Machine) -> None:
    """A container is under Docker's profile where it is loaded."""
    if not machine.files.exists("/sys/module/apparmor/parameters/enabled"):
        pytest.skip("needs a guest's kernel with AppArmor")
    run(machine, "apparmor_script.py")
