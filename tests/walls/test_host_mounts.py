"""A machine's mounts are made detached and attached in its own namespace: the host's table shows none of them, whoever is killed when."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from machine_home import VmHome
from missing import lacks

from trivisor import VMM

LIFE = """
import sys
from trivisor import VMM
with VMM(sys.argv[1]) as vmm:
    print("ready", flush=True)
    with vmm.run("debian", wall="container", disk="64M", network=sys.argv[2]) as machine:
        machine.exec(["/bin/true"], check=True)
"""
DELAYS = [number * 0.003 for number in range(16)]
"""From before its first step to after its last, on a host with nothing else to do."""


def disks(home: Path) -> set[str]:
    """The loop devices whose file is, or was, the home's. One goes away while it is looked at."""
    found = set()
    for file in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            text = file.read_text()
        except OSError:
            continue
        found |= {f"/dev/{file.parts[3]}"} if str(home) in text else set()
    return found


def mounts(home: Path) -> set[str]:
    """What the host's table has of the home. Other programs mount at the same time, too."""
    ours = disks(home)
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return {line for line in lines if str(home) in line or not ours.isdisjoint(line.split())}


@pytest.mark.parametrize("network", ["none", "nat"])
def test_a_caller_that_is_killed_leaves_no_mount(wall_home: VmHome, network: str) -> None:
    with VMM(wall_home.root) as vmm:
        report = next(report for report in vmm.walls() if report.wall == "container")
        if os.geteuid() or not report.available or not report.features.get("disk_size"):
            lacks("needs root, the container wall and loop devices")
        seen: set[str] = set()
        for delay in DELAYS:
            child = subprocess.Popen([sys.executable, "-c", LIFE, str(wall_home.root), network], stdout=subprocess.PIPE)
            with child:
                assert child.stdout is not None
                assert child.stdout.readline() == b"ready\n"
                time.sleep(delay)  # the moment is what is tried
                child.kill()
            seen |= mounts(wall_home.root)
        deadline = time.monotonic() + 60
        while vmm.list():  # nothing that its owner outlived; what that was just starting may hold a lock for an instant
            assert time.monotonic() < deadline
        assert not seen
        while disks(wall_home.root):  # the kernel lets go of a disk after the last of its namespace
            assert time.monotonic() < deadline, disks(wall_home.root)
            time.sleep(0.02)
        assert not mounts(wall_home.root)
