"""Control groups: layouts read from text, settings as values, and the real ones of this host, v1 and v2 each by themselves."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from syscall_support import trapped

from trivisor.core.errors import HostLacks
from trivisor.core.paths import Home
from trivisor.core.spec import Spec
from trivisor.core.units import MIB
from trivisor.core.wishes import IoLimits
from trivisor.launch import cgroup_freeze, cgroup_layout, cgroups
from trivisor.launch.cgroup_layout import Layout
from trivisor.launch.cgroup_limits import DEFAULT_PIDS, Limits, device, settings
from trivisor.launch.cgroup_place import poll_until
from trivisor.launch.cgroups import Cgroup
from trivisor.vos.syscalls.direct import DirectListener
from trivisor.vos.syscalls.listener import CONTINUE, Notification

NAMES = "cpuset cpu io memory pids"
ALL = Limits(memory=64 * MIB, swap=MIB, cpus=0.5, cpuset="0", pids=7, io=IoLimits(read_bps=1000, read_iops=10))


# -- where groups can be made ---------------------------------------------------------------------


def mounted(place: Path, kind: str, options: str, number: int = 30, root: str = "/") -> str:
    place.mkdir(parents=True, exist_ok=True)
    return f"{number} 1 0:{number} {root} {place} rw,relatime - {kind} {kind} rw,{options}\n"


def group(place: Path, *, controllers: str = "", mine: bool = False) -> Path:
    place.mkdir(parents=True, exist_ok=True)
    for file, text in {"cgroup.controllers": controllers, "cgroup.procs": "", "cgroup.subtree_control": "", "cgroup.events": ""}.items():
        (place / file).write_text(text)
    if mine:
        (place / "mine").touch()
    return place


def mine(place: Path) -> bool:
    return (place / "mine").exists()


def test_v2_of_root(tmp_path: Path) -> None:
    at = group(tmp_path / "cgroup", controllers=NAMES + " hugetlb", mine=True)
    (at / "cgroup.events").unlink()
    layout = cgroup_layout.read(mounted(at, "cgroup2", "nsdelegate"), "0::/init.scope\n", writable=mine)
    assert layout.kind == "v2"
    assert layout.lacks == {}
    assert [found.base for found in layout.hierarchies] == [at]
    assert {layout.of(name) for name in cgroup_layout.CONTROLLERS} == set(layout.hierarchies)


def test_v2_as_systemd_delegates_it(tmp_path: Path) -> None:
    """The highest group that is the user's own, with the controllers that it was given."""
    at = group(tmp_path / "cgroup", controllers=NAMES)
    user = group(at / "user.slice/user-1000.slice", controllers="cpu memory pids")
    service = group(user / "user@1000.service", controllers="memory pids", mine=True)
    scope = group(service / "app.slice/run-1.scope", controllers="", mine=True)
    layout = cgroup_layout.read(mounted(at, "cgroup2", "nsdelegate"), f"0::/{scope.relative_to(at)}\n", writable=mine)
    assert [found.base for found in layout.hierarchies] == [service]
    assert set(layout.lacks) == {"cpu", "cpuset", "io"}
    assert "user@1000.service was given no io controller" in layout.lacks["io"]
    assert "Delegate=" in layout.remedies["io"]
    # A session's scope lies beside what is delegated.
    session = group(user / "session-3.scope")
    layout = cgroup_layout.read(mounted(at, "cgroup2", "nsdelegate"), f"0::/{session.relative_to(at)}\n", writable=mine)
    assert layout.hierarchies == ()
    assert set(layout.lacks) == set(cgroup_layout.CONTROLLERS)
    assert "systemd-run" in layout.remedies["memory"]


def test_v1(tmp_path: Path) -> None:
    text = ""
    for number, names in enumerate(("cpu,cpuacct", "cpuset", "blkio", "memory", "pids", "freezer", "name=systemd"), 30):
        text += mounted(group(tmp_path / names, mine=True), "cgroup", names, number)
    layout = cgroup_layout.read(
        text, "".join(f"{n}:{names}:/\n" for n, names in enumerate(("cpu,cpuacct", "blkio", "memory"))), writable=mine
    )
    assert layout.kind == "v1"
    assert layout.lacks == {}
    assert layout.unified is None
    found = layout.of("io")
    assert found is not None
    assert found.base.name == "blkio"


def test_hybrid(tmp_path: Path) -> None:
    text = mounted(group(tmp_path / "memory", mine=True), "cgroup", "memory", 30)
    text += mounted(group(tmp_path / "freezer", mine=True), "cgroup", "freezer", 31)
    text += mounted(group(tmp_path / "unified", mine=True), "cgroup2", "nsdelegate", 32)
    layout = cgroup_layout.read(text, "1:memory:/\n2:freezer:/\n0::/\n", writable=mine)
    assert layout.kind == "hybrid"
    found = layout.of("freezer")
    assert found is not None
    assert found.unified
    assert set(layout.lacks) == {"cpu", "cpuset", "pids", "io"}


def test_a_subtree_that_a_container_was_given(tmp_path: Path) -> None:
    at = group(tmp_path / "with space", mine=True, controllers="memory")
    line = mounted(at, "cgroup2", "nsdelegate", root="/docker/abc").replace("with space", "with\\040space")
    layout = cgroup_layout.read(line, "0::/docker/abc\n", writable=mine)
    assert [found.base for found in layout.hierarchies] == [at]


def test_none() -> None:
    layout = cgroup_layout.read("22 27 0:21 / /proc rw - proc proc rw\n", "0::/\n")
    assert layout.kind == "none"
    assert set(layout.lacks) == set(cgroup_layout.CONTROLLERS)


# -- what limits mean -----------------------------------------------------------------------------


def written(limits: Limits, *, unified: bool, disk: Path) -> dict[str, str]:
    return {setting.file: setting.value for name in limits.given for setting in settings(limits, name, unified=unified, disk=disk)}


def test_settings(tmp_path: Path) -> None:
    try:
        number = device(tmp_path)
    except HostLacks:
        pytest.skip("needs temporary files on a disk")
    assert written(ALL, unified=True, disk=tmp_path) == {
        "memory.max": str(64 * MIB),
        "memory.swap.max": str(MIB),
        "cpu.max": "50000 100000",
        "cpuset.cpus": "0",
        "pids.max": "7",
        "io.max": f"{number} rbps=1000 riops=10",
    }
    assert written(ALL, unified=False, disk=tmp_path) == {
        "memory.limit_in_bytes": str(64 * MIB),
        "memory.memsw.limit_in_bytes": str(65 * MIB),
        "cpu.cfs_period_us": "100000",
        "cpu.cfs_quota_us": "50000",
        "cpuset.cpus": "0",
        "pids.max": "7",
        "blkio.throttle.read_bps_device": f"{number} 1000",
        "blkio.throttle.read_iops_device": f"{number} 10",
    }


def test_v1_cannot_limit_writing(tmp_path: Path) -> None:
    with pytest.raises(HostLacks, match="buffered writes"):
        list(settings(Limits(io=IoLimits(write_bps=1)), "io", unified=False, disk=tmp_path))


def test_no_disk() -> None:
    with pytest.raises(HostLacks, match="no disk"):
        device(Path("/proc"))


def test_limits_of_a_spec() -> None:
    limits = Limits.of(Spec.make(image="x", name="x", wall="container", memory="64M"))
    assert limits == Limits(memory=64 * MIB, cpus=1, pids=DEFAULT_PIDS, asked=frozenset({"memory"}))
    assert Limits.of(Spec.make(image="x", name="x", wall="vm", cpus=2, cpuset="0"), {"cpuset", "io"}) == Limits(
        cpuset="0", asked=frozenset({"cpuset"})
    )


# -- the groups of this host ----------------------------------------------------------------------


def layout_of(kind: str) -> Layout:
    """This host's layout, reduced to one kind of hierarchy."""
    whole = cgroup_layout.layout()
    kept = tuple(found for found in whole.hierarchies if found.unified == (kind == "v2"))
    if not kept:
        pytest.skip(f"needs a writable cgroup {kind} hierarchy")
    have = {name for found in kept for name in found.controllers}
    missing = dict.fromkeys((name for name in cgroup_layout.CONTROLLERS if name not in have), "taken away by this test")
    return replace(whole, hierarchies=kept, lacks=missing, remedies=missing)


def needs(layout: Layout, *names: str) -> None:
    for name in names:
        if layout.of(name) is None:
            pytest.skip(f"needs the {name} controller in {layout}")


@pytest.fixture(params=["v1", "v2"])
def layout(request: pytest.FixtureRequest) -> Layout:
    return layout_of(request.param)


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    made = Home(tmp_path / "home")
    made.open()
    yield made
    for name in cgroups.names(made):
        cgroups.sweep(made, {name})


def make(home: Home, limits: Limits, layout: Layout, name: str = "one") -> Cgroup:
    home.machine(name).root.mkdir(exist_ok=True)
    return Cgroup.create(home, name, limits, layout=layout)


def run(group: Cgroup, code: str) -> subprocess.Popen[bytes]:
    """Run Python in the group."""
    fds = group.fds

    def join() -> None:
        for folder in fds:
            fd = os.open("cgroup.procs", os.O_WRONLY, dir_fd=folder)
            os.write(fd, b"0")
            os.close(fd)

    return subprocess.Popen([sys.executable, "-c", code], preexec_fn=join, stdout=subprocess.PIPE)


def test_memory_is_bounded_and_a_kill_is_counted(home: Home, layout: Layout) -> None:
    needs(layout, "memory")
    with make(home, Limits(memory=48 * MIB, asked=frozenset({"memory"})), layout) as group:
        hog = run(group, f"x = b'x' * {256 * MIB}")
        assert hog.wait(60) == -signal.SIGKILL
        assert group.counters().oom_kills == 1
        assert 32 * MIB < group.usage().peak <= 48 * MIB
        group.remove()


def test_pids_are_bounded(home: Home, layout: Layout) -> None:
    needs(layout, "pids")
    with make(home, Limits(pids=5), layout) as group:
        bomb = run(
            group, "import os, time\ntry:\n  while os.fork(): pass\n  time.sleep(100)\nexcept OSError as e: print(e.errno, flush=True)"
        )
        assert bomb.stdout is not None
        assert bomb.stdout.readline() == b"11\n"
        bomb.wait(60)
        assert group.counters().pids_refused > 0
        assert group.usage().pids == 4
        group.remove()
        assert not group.pids()


def test_cpus_and_cpuset(home: Home, layout: Layout) -> None:
    needs(layout, "cpu", "cpuset")
    with make(home, Limits(cpus=0.2, cpuset="0", asked=frozenset({"cpus", "cpuset"})), layout) as group:
        code = "import os, time\nprint(os.sched_getaffinity(0), flush=True)\nend = time.monotonic() + 1\nwhile time.monotonic() < end: pass"
        code += "\nprint(time.process_time(), flush=True)"
        began = time.monotonic()
        affinity, used = run(group, code).communicate(timeout=60)[0].decode().splitlines()
        took = time.monotonic() - began
        assert affinity == "{0}" and float(used) < 0.4 * took, "a fifth of a processor all that time, and what the period rounds up to"
        assert 0 < group.usage().cpu_seconds < 0.5 * took
        group.remove()


def test_frozen(home: Home, layout: Layout) -> None:
    with make(home, Limits(), layout) as group:
        counter = run(group, "while True: print('x', flush=True)")
        assert counter.stdout is not None
        counter.stdout.read(10)
        assert not group.frozen
        for _ in range(20):
            group.freeze()
            assert group.frozen
            group.thaw()
            assert not group.frozen
        group.freeze()
        again = Cgroup.find(home, "one")
        assert again is not None
        assert again.frozen, "another process finds it so"
        again.remove()
        assert counter.wait(10) == -signal.SIGKILL, "frozen or not"
        assert Cgroup.find(home, "one") is None
        counter.stdout.close()


def _held(listener: DirectListener) -> Notification:
    """Take up the next call."""
    assert select.select([listener.fileno()], [], [], 60)[0]
    notification = listener.receive()
    assert notification is not None
    return notification


@pytest.mark.parametrize("call", ["mkdir", "execve"])
def test_frozen_while_a_call_is_held(home: Home, layout: Layout, call: str) -> None:
    """Who waits for an answer, and who forked one (vfork(2)) that does at its execve, freezes no sooner than it is answered."""

    def program() -> object:
        if call == "mkdir":
            with contextlib.suppress(FileExistsError):
                os.mkdir("/")
            return os.getpid()
        subprocess.run(["/bin/true"], check=True, close_fds=False)  # so that it is a vfork
        return os.getpid()

    with make(home, Limits(), layout) as group, trapped([call], program) as child:
        place = next(place for place in group._places if "freezer" in place.controllers)
        (place.path / "cgroup.procs").write_text(str(child.pid))
        notification = _held(child.listener)
        group.freeze(30)
        # Told to freeze, a task that waits looks about for an instant and waits on.
        assert group.frozen and poll_until(lambda: cgroup_freeze.still(place), 30)
        child.listener.answer(notification, 0, 0, CONTINUE)
        with pytest.raises(TimeoutError):
            child.result(0.5)  # nothing of the program runs before the thaw
        assert group.frozen and poll_until(lambda: cgroup_freeze.still(place), 30)
        group.thaw()
        assert not group.frozen
        assert child.result() == str(child.pid)
        child.listener.close()
        group.remove()


def test_what_runs_is_not_still(home: Home, layout: Layout) -> None:
    with make(home, Limits(), layout) as group:
        counter = run(group, "while True: print('x', flush=True)")
        assert counter.stdout is not None
        place = next(place for place in group._places if "freezer" in place.controllers)
        for _ in range(20):
            counter.stdout.read(4096)
            assert not cgroup_freeze.still(place)
        group.remove()
        assert counter.wait(10) == -signal.SIGKILL
        counter.stdout.close()


def test_kill_takes_all(home: Home, layout: Layout) -> None:
    """Whatever forks, ignores signals or left its session."""
    with make(home, Limits(pids=100 if layout.of("pids") else None), layout) as group:
        code = "import os, signal\nsignal.signal(15, signal.SIG_IGN)\nprint(1, flush=True)\nwhile True:\n  if os.fork() == 0: os.setsid()"
        bomb = (
            run(group, code)
            if layout.of("pids")
            else run(group, "import os, time\nprint(1, flush=True)\nos.fork(); os.fork(); time.sleep(99)")
        )
        assert bomb.stdout is not None
        bomb.stdout.readline()
        time.sleep(0.1)
        group.kill()
        assert not group.pids()
        group.remove()
        group.remove()
        bomb.wait(10)
        bomb.stdout.close()


def test_what_is_missing(home: Home, layout: Layout) -> None:
    """Asked for: an error that leaves nothing behind. Not asked for: said."""
    bare = replace(layout, hierarchies=tuple(replace(found, controllers=found.controllers & {"freezer"}) for found in layout.hierarchies))
    bare = replace(bare, lacks={"memory": "it is not here"}, remedies={"memory": "get it"})
    assert "memory is not limited: it is not here" in make(home, Limits(memory=MIB), bare).lacks
    with pytest.raises(HostLacks, match="memory cannot be limited on this host: it is not here") as caught:
        make(home, Limits(memory=MIB, asked=frozenset({"memory"})), bare, "two")
    assert caught.value.hint == "get it"
    cgroups.remove(home, "one")
    assert cgroups.names(home) == set()


def test_a_value_that_the_kernel_refuses(home: Home, layout: Layout) -> None:
    needs(layout, "cpuset")
    with pytest.raises(HostLacks, match="cpuset cannot be limited so") as caught:
        make(home, Limits(cpuset="4000", asked=frozenset({"cpuset"})), layout)
    assert "the host has the processors 0" in caught.value.hint
    assert cgroups.names(home) == set()


def test_sweep(home: Home, tmp_path: Path) -> None:
    other = Home(tmp_path / "other")
    other.open()
    whole = cgroup_layout.layout()
    if not whole.hierarchies:
        pytest.skip("needs a writable cgroup hierarchy")
    for place, name in ((home, "one"), (home, "two"), (other, "three")):
        make(place, Limits(memory=64 * MIB), whole, name).close()
    assert cgroups.names(home) == {"one", "two"}
    said = cgroups.sweep(home, {"one"})
    assert said
    assert all(line.startswith("cgroup ") for line in said)
    assert cgroups.names(home) == {"two"}
    assert cgroups.names(other) == {"three"}
    cgroups.remove(home, "two")
    cgroups.remove(home, "two")
    cgroups.remove(other, "three")
    for found in whole.hierarchies:
        assert not (found.base / cgroups.family_name(home)).exists()


def test_many_at_once(home: Home) -> None:
    """The home's own group comes and goes under all of them."""
    whole = cgroup_layout.layout()
    if not whole.hierarchies:
        pytest.skip("needs a writable cgroup hierarchy")
    faults: list[BaseException] = []

    def life(name: str) -> None:
        try:
            for _ in range(20):
                make(home, Limits(memory=64 * MIB, cpus=1, pids=50), whole, name).remove()
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=life, args=(f"m{number}",)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not faults
    assert cgroups.names(home) == set()
