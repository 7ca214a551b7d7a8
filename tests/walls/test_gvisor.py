"""What is only the gVisor wall's: each runsc and platform, the jail, a line that comes back, a host without freezer or root."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import socket
import time
from pathlib import Path

import pytest
from machine_home import VmHome
from missing import lacks
from rootless_home import life_of_nobody

from trivisor import VMM, EngineError, GuestGone, Machine, State
from trivisor.core.errors import HostLacks
from trivisor.core.paths import Home
from trivisor.launch import ids
from trivisor.launch.cgroups import Cgroup
from trivisor.vmm.engines.gvisor import control, door, probe, runsc
from trivisor.vmm.engines.gvisor.engine import GvisorEngine
from trivisor.vmm.procs import tree

USER = 61236
"""An id that no account has."""
BOUND = 60.0
COUNT = "i=0; while :; do i=$((i + 1)); echo $i > /run/count; done"
_PIDFD_GETFD = 438


def binaries() -> list[str]:
    """The runsc in PATH and the one that $TRIVISOR_RUNSC names."""
    found = [os.environ.get("TRIVISOR_RUNSC"), shutil.which("runsc")]
    return list(dict.fromkeys(path for path in found if path))


@pytest.fixture(autouse=True)
def available(wall_home: VmHome) -> None:
    with VMM(wall_home.root) as vmm:
        report = next(report for report in vmm.walls() if report.wall == "gvisor")
    if not report.available:
        lacks(f"needs the gvisor wall: {report.why} ({report.remedy})")


@pytest.fixture
def machine(wall_vmm: VMM) -> Machine:
    made = wall_vmm.create("debian", wall="gvisor")
    made.start()
    return made


def processes(machine: Machine) -> list[int]:
    """Everything on the host that is the machine's, its keeper not: the first is what that keeps."""
    return [int(pid) for pid in tree(machine._context.folder(machine._context.row(machine.id)))][1:]


def status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


# -- every binary, every platform ---------------------------------------------------------------------


@pytest.mark.parametrize("binary", binaries())
@pytest.mark.parametrize("platform", runsc.PLATFORMS)
def test_a_life(wall_home: VmHome, binary: str, platform: str) -> None:
    home = Home(wall_home.root)
    found, shape = runsc.inspect(binary, home), ids.probe(home.root)
    fault = probe.trial(found, platform, shape) if platform in found.platforms else f"runsc {found.version} was not built with it"
    if fault:
        pytest.skip(f"needs the platform {platform}: {fault}")
    with VMM(home.root, engines=[GvisorEngine(home, binary, platform=platform)]) as vmm:
        machine = vmm.create("debian", wall="gvisor")
        try:
            machine.start()
            assert (machine.info()["facts"]["runsc"], machine.info()["facts"]["platform"]) == (found.version, platform)
            assert machine.exec(["cat"], stdin=b"through").stdout == b"through"
            assert machine.exec("kill -7 $$").signal == 7
            machine.files.write("/root/kept", b"kept" * 100_000)
            frozen(machine)
            machine.stop()
            assert machine.state is State.STOPPED
            machine.start()
            assert machine.files.read("/root/kept") == b"kept" * 100_000
            with machine.spawn(["cat"], pty=True) as terminal:
                terminal.stdin.write(b"\x03")
                assert terminal.wait(BOUND) == 130
        finally:
            machine.delete(force=True)


def frozen(machine: Machine) -> None:
    """Pause it while a program counts: not one step further. Then let it go on."""
    with machine.spawn(COUNT):
        while not machine.files.exists("/run/count"):
            pass
        machine.pause()
        spent = [clock(pid) for pid in everything(machine)]
        time.sleep(0.3)  # in which it could run
        assert [clock(pid) for pid in everything(machine)] == spent
        machine.resume()
        before = int(machine.files.read_text("/run/count") or 0)
        deadline = time.monotonic() + BOUND
        while int(machine.files.read_text("/run/count") or 0) <= before:
            assert time.monotonic() < deadline


def everything(machine: Machine) -> list[int]:
    """As `processes`, of a machine whose keeper's engine is asked of the records: nothing frozen answers."""
    return sorted(processes(machine))


def clock(pid: int) -> tuple[str, ...]:
    """The processor time that a process took (proc(5), fields 14 and 15 of stat)."""
    return tuple(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13])


def test_the_best_platform_is_tried_once_a_boot(wall_home: VmHome, monkeypatch: pytest.MonkeyPatch) -> None:
    home = Home(wall_home.root)
    found, shape = runsc.inspect(runsc.locate(), home), ids.probe(home.root)
    verdict = probe.verdict(found, shape, home)
    assert verdict.platform in found.platforms
    monkeypatch.setattr(probe, "trial", lambda *_: pytest.fail("it was tried again"))
    assert probe.verdict(found, shape, home) == verdict


def test_no_platform_works(wall_home: VmHome, monkeypatch: pytest.MonkeyPatch) -> None:
    home = Home(wall_home.root)
    found, shape = runsc.inspect(runsc.locate(), home), ids.probe(home.root)
    monkeypatch.setattr(probe, "trial", lambda *_: "it does not")
    with pytest.raises(HostLacks, match="it does not"):
        probe._look(found, shape)


def test_not_installed(wall_home: VmHome) -> None:
    engine = GvisorEngine(Home(wall_home.root), "/no/such/runsc")
    report = engine.report()
    assert not report.available
    assert "/no/such/runsc" in report.why
    assert report.remedy


# -- the jail -----------------------------------------------------------------------------------------


def test_all_of_it_is_jailed(machine: Machine) -> None:
    """Each process: other namespaces than ours, ids that own nothing here, no new privileges, a filter."""
    first = ids.probe(machine._context.home.root).ids(machine._context.row(machine.id).slot).users[0][1]
    deadline = time.monotonic() + BOUND
    while len(found := processes(machine)) < 4:  # runsc, the gofer, the Sentry, and what it traces; some may be missed while one ends
        assert time.monotonic() < deadline
    looked = 0
    for pid in found:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended since
            for kind in ("user", "mnt", "pid", "net", "ipc", "uts", "cgroup"):
                assert os.readlink(f"/proc/{pid}/ns/{kind}") != os.readlink(f"/proc/self/ns/{kind}"), (pid, kind)
            facts = status(pid)
            assert (facts["NoNewPrivs"], facts["Seccomp"]) == ("1", "2")
            if os.geteuid() == 0:
                assert all(first <= int(uid) < first + 65536 for uid in facts["Uid"].split())
            looked += 1
    assert looked >= 3


def test_the_jail_holds_nothing_of_the_host(machine: Machine) -> None:
    engine = processes(machine)[0]
    # What the launcher makes the root from has names that begin with a dot.
    seen = {name for name in os.listdir(f"/proc/{engine}/root") if not name.startswith(".")}
    assert seen == {"box", "dev", "proc", "run", "runsc", "tmp"}
    looked = 0
    for pid in processes(machine):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended since
            for fd in os.listdir(f"/proc/{pid}/fd"):
                with contextlib.suppress(FileNotFoundError):  # closed since
                    assert not os.readlink(f"/proc/{pid}/fd/{fd}").endswith(("trivisor.db", "alive", "line.sock"))
                    looked += 1
    assert looked


def test_links_in_its_layer_stay_within_it(wall_vmm: VMM) -> None:
    """The files that say which machine it is are laid over its root from outside, where its own links must not lead."""
    machine = wall_vmm.run("debian", wall="gvisor")
    links = {"hostname": "/runsc", "hosts": "/box/bundle/config.json", "machine-id": "../../../../proc/1/comm", "resolv.conf": "/nowhere"}
    machine.stop()
    upper = machine._context.folder(machine._context.row(machine.id)).root / "layers/root/upper"
    (upper / "etc").mkdir(exist_ok=True)
    os.chown(upper / "etc", upper.stat().st_uid, upper.stat().st_gid)
    for name, target in links.items():
        (upper / "etc" / name).unlink(missing_ok=True)
        (upper / "etc" / name).symlink_to(target)
    machine.start()
    assert machine.files.read_text("/etc/hostname") == f"{machine.name}\n" == machine.exec(["hostname"]).text
    assert machine.files.read_text("/etc/hosts").startswith("127.0.0.1\tlocalhost\n")
    assert len(machine.files.read_text("/etc/machine-id")) == 33
    assert not machine.files.exists("/runsc")


def test_hooks_run_before_anything_else_and_have_the_environment(wall_vmm: VMM) -> None:
    machine = wall_vmm.run("debian", wall="gvisor", env={"WHO": "a b"})
    hooks = "/etc/trivisor/after-clone.d"
    machine.files.mkdir(hooks, parents=True)
    machine.files.write(f"{hooks}/10-say", '#!/bin/sh\necho "$WHO $(cat /etc/hostname)" >/root/said\n')
    machine.files.chmod(f"{hooks}/10-say", 0o755)
    machine.stop()
    machine.start()
    assert machine.files.read_text("/root/said") == f"a b {machine.name}\n"
    assert machine.exec(["printenv", "WHO"]).text == "a b\n"


def test_another_user_of_the_machine_cannot_take_the_line(machine: Machine) -> None:
    code = "import socket; socket.socket(socket.AF_UNIX).connect('/.trivisor/door/line')"
    done = machine.exec(["python3", "-c", code], user="nobody")
    assert "PermissionError" in done.stderr.decode()


# -- the line -----------------------------------------------------------------------------------------


def test_the_line_comes_back(machine: Machine) -> None:
    """What a checkpoint will do: the connection goes, the machine does not."""
    kept = machine.spawn(["sleep", "1000"], detach=True)
    cut(machine)
    deadline = time.monotonic() + BOUND
    while True:
        try:
            assert machine.exec(f"kill -0 {kept.pid} && echo alive").text == "alive\n"
            break
        except GuestGone:  # until the new line stands, or with the old one
            assert time.monotonic() < deadline
    assert machine.state is State.RUNNING


def cut(machine: Machine) -> None:
    """Shut the connection down that the keeper has to the guest."""
    keeper = int((machine._context.folder(machine._context.row(machine.id)).root / "keeper").read_text().split()[0])
    place = str(door.path(machine._context.folder(machine._context.row(machine.id))))
    libc = ctypes.CDLL(None, use_errno=True)
    pidfd = os.pidfd_open(keeper)
    try:
        for name in os.listdir(f"/proc/{keeper}/fd"):
            with contextlib.suppress(FileNotFoundError):  # one that is closed since is not the one
                if not os.readlink(f"/proc/{keeper}/fd/{name}").startswith("socket:"):
                    continue
            copy = libc.syscall(_PIDFD_GETFD, pidfd, int(name), 0)
            if copy < 0 and ctypes.get_errno() == errno.EBADF:
                continue
            if copy < 0:
                pytest.skip(f"needs pidfd_getfd: {os.strerror(ctypes.get_errno())}")
            with socket.socket(fileno=copy) as end:
                listens = end.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
                if not listens and str(end.getsockname()).endswith(Path(place).name):
                    end.shutdown(socket.SHUT_RDWR)
                    return
    finally:
        os.close(pidfd)
    raise AssertionError("the keeper has no such connection")


# -- less of a host -----------------------------------------------------------------------------------


def test_pause_without_a_freezer(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cgroup, "can_freeze", False)
    with machine.spawn(COUNT):
        while not machine.files.exists("/run/count"):
            pass
        machine.pause()
        engine = machine._context.engine("gvisor")
        box = machine._context.box(machine._context.row(machine.id))
        assert engine.paused(box)
        machine.resume()
        assert not engine.paused(box)
        assert machine.exec(["echo", "back"]).text == "back\n"


def test_runsc_that_cannot_be_asked(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose Sentry is gone is no traceback of a decoder."""
    monkeypatch.setattr(control, "inside", lambda *_: b"not JSON")
    box = machine._context.box(machine._context.row(machine.id))
    with pytest.raises(EngineError, match="cannot be read"):
        control.paused(box, [])


@pytest.mark.parametrize("binary", binaries())
def test_rootless(binary: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user without subordinate ids, control groups or a freezer: a whole life, paused by runsc itself."""
    monkeypatch.setenv("TRIVISOR_RUNSC", binary)

    def live(machine: Machine) -> str:
        machine.exec("mkdir /made && touch /usr/made", check=True)
        assert machine.stats().private > 0
        machine.pause()
        assert machine.state is State.PAUSED
        machine.resume()
        machine.stop()
        machine.start()
        return machine.exec("id -u; test -e /usr/made && echo kept").text

    assert life_of_nobody("gvisor", live).split() == ["0", "kept"]


def test_a_machine_that_its_host_will_not_start_says_why(wall_vmm: VMM, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = wall_vmm.create("debian", wall="gvisor")
    monkeypatch.setattr("trivisor.vmm.engines.gvisor.jailed._CAPS", ("chown",))
    with pytest.raises(EngineError) as caught:
        machine.start()
    assert caught.value.machine
    assert "runsc" in str(caught.value) or "sandbox" in str(caught.value) or "container" in str(caught.value)
    with contextlib.suppress(EngineError):
        assert machine.state is not State.RUNNING
