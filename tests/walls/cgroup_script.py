"""Runs in a virtual machine whose kernel has its control groups as the argument says (v2, v1, delegated): limits, freezer, figures, ends;
and a container's whole life under them. Says what it did."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from trivisor import VMM, HostLacks
from trivisor.core.paths import Home
from trivisor.core.wishes import IoLimits
from trivisor.launch import cgroup_layout, cgroups
from trivisor.launch.cgroups import Cgroup, Limits

MIB = 1 << 20
BOUND = 60.0
HOME = Home(Path(sys.argv[2]))
HOG = ("dd", "if=/dev/zero", "of=/dev/null", "bs=200M", "count=1")
BOMB = "i=0; while [ $i -lt 100 ]; do sleep 100 & i=$((i + 1)); done"
VALUES = {
    "v2": {"memory.max": 32 * MIB, "memory.swap.max": 0, "cpu.max": "50000 100000", "cpuset.cpus": 0, "pids.max": 5},
    "v1": {"memory.limit_in_bytes": 32 * MIB, "cpu.cfs_quota_us": 50000, "cpuset.cpus": 0, "pids.max": 5},
}


def make(name: str, **limits: object) -> Cgroup:
    HOME.machine(name).root.mkdir(exist_ok=True)
    return Cgroup.create(HOME, name, Limits(**limits, asked=frozenset(limits)))  # type: ignore[arg-type]


def run(group: Cgroup, *argv: str) -> subprocess.Popen[bytes]:
    """Run a program in the group; in version 1 in all of its groups."""

    def join() -> None:
        for fd in group.fds:
            procs = os.open("cgroup.procs", os.O_WRONLY, dir_fd=fd)
            os.write(procs, b"0")
            os.close(procs)

    return subprocess.Popen(argv, preexec_fn=join, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


def places(group: Cgroup) -> list[Path]:
    return [Path(os.readlink(f"/proc/self/fd/{fd}")) for fd in group.fds]


def limits(kind: str) -> None:
    group = make("limits", memory=32 * MIB, cpus=0.5, cpuset="0", pids=5, **({"swap": 0} if kind == "v2" else {}))
    assert group.lacks == (), group.lacks
    folders = places(group)
    for file, value in VALUES[kind].items():
        found = next((folder / file for folder in folders if (folder / file).exists()), None)
        assert found is not None, file
        assert found.read_text().strip() == str(value), found
    hog = run(group, *HOG)
    assert hog.wait(BOUND) == -signal.SIGKILL
    assert group.counters().oom_kills == 1
    assert 16 * MIB < group.usage().peak <= 32 * MIB
    bomb = run(group, "sh", "-c", BOMB)
    bomb.wait(BOUND)
    assert group.counters().pids_refused > 0
    assert group.usage().cpu_seconds > 0
    begun = time.monotonic()
    group.remove()
    assert time.monotonic() - begun < 10
    assert not any(folder.exists() for folder in folders)


def io(kind: str) -> None:
    if kind == "v2":
        group = make("io", io=IoLimits(read_bps=MIB, write_bps=MIB))
        assert f"rbps={MIB} wbps={MIB}" in (places(group)[0] / "io.max").read_text()
        group.remove()
        return
    group = make("io", io=IoLimits(read_bps=MIB))
    assert any(str(MIB) in (folder / "blkio.throttle.read_bps_device").read_text() for folder in places(group) if "blkio" in str(folder))
    group.remove()
    try:
        make("io", io=IoLimits(write_bps=MIB))
        raise AssertionError("writing cannot be limited by version 1")
    except HostLacks as error:
        assert "cannot limit writing" in str(error), error


def freezer() -> None:
    group = make("freezer", pids=50)
    counter = run(group, "sh", "-c", "while :; do echo x; done")
    assert counter.stdout is not None
    counter.stdout.read(10)
    for _ in range(5):
        group.freeze()
        assert group.frozen
        group.thaw()
        assert not group.frozen
    group.freeze()
    found = Cgroup.find(HOME, "freezer")
    assert found is not None
    assert found.frozen
    cgroups.remove(HOME, "freezer")
    assert counter.wait(BOUND) == -signal.SIGKILL


def crowded() -> None:
    """A group of version 2 that processes live in cannot share out its controllers."""
    base = cgroup_layout.layout().hierarchies[0].base
    place = base / "crowded"
    place.mkdir()
    (base / "cgroup.subtree_control").write_text("+memory")
    sleeper = subprocess.Popen(["sleep", "1000"])
    (place / "cgroup.procs").write_text(str(sleeper.pid))
    layout = cgroup_layout.Layout("v2", (cgroup_layout.Hierarchy(place, frozenset({"memory", "freezer"}), True),), {}, {})
    HOME.machine("crowd").root.mkdir()
    try:
        Cgroup.create(HOME, "crowd", Limits(memory=MIB, asked=frozenset({"memory"})), layout=layout)
        raise AssertionError("a limit that cannot be enforced was taken")
    except HostLacks as error:
        assert "processes live in" in str(error), error
    made = Cgroup.create(HOME, "crowd", Limits(memory=MIB), layout=layout)
    assert "processes live in" in made.lacks[0], made.lacks
    made.remove()
    sleeper.kill()
    sleeper.wait()
    place.rmdir()


def container() -> None:
    """A machine behind the container wall, of this machine's own root."""
    with VMM(HOME.root) as vmm, vmm.run("host", wall="container", memory="32M", cpus=0.5, pids=30) as machine:
        facts = machine.info()["facts"]
        assert "is not limited" not in facts.get("lacks", ""), facts
        hog = machine.exec(HOG, timeout=BOUND)
        assert hog.signal == 9, hog
        assert machine.info()["oom_kills"] == 1
        assert [event.kind for event in vmm.events() if event.machine == machine.id].count("oom") == 1
        assert not machine.exec(BOMB, timeout=BOUND).ok
        machine.pause()
        assert machine.state == "paused"
        machine.resume()
        assert machine.exec(["echo", "here"], timeout=BOUND).text == "here\n"
        assert machine.stats().cpu_seconds > 0
        machine.stop(timeout=1)
        machine.start()
        assert machine.exec(["echo", "again"], timeout=BOUND).text == "again\n"


def main(kind: str) -> None:
    HOME.open()
    layout = cgroup_layout.layout()
    print(layout, flush=True)
    version = "v1" if kind == "v1" else "v2"
    assert layout.kind == version
    assert layout.lacks == {}
    limits(version)
    freezer()
    io(version)
    if kind == "v2":
        crowded()
    container()
    assert cgroups.names(HOME) == set()
    print("all of it")


if __name__ == "__main__":
    main(sys.argv[1])
