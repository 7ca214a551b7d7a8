"""The life of real machines: frozen and moving, stopped and started, and every way in which a guest ends itself."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from wall_fixtures import Make

from trivisor import VMM, EngineError, InvalidSpec, InvalidState, Machine, State, TrivisorError, WaitTimeout
from trivisor.launch import keeper

BOUND = 60.0
COUNT = "i=0; while :; do i=$((i + 1)); echo $i; done"


def test_paused_is_frozen_and_resumed_goes_on(make: Make) -> None:
    """A counter in the guest stands still and then goes on with the next number, and the clock did not jump for it."""
    machine = make()
    with machine.spawn(COUNT) as counter:
        for number in range(1, 1000):
            assert int(counter.stdout.readline(timeout=BOUND)) == number
        machine.pause()
        number = 1000
        with pytest.raises(WaitTimeout):
            while True:  # what was on its way when it froze
                assert int(counter.stdout.readline(timeout=0.5)) == number
                number += 1
        with pytest.raises(InvalidState):
            machine.exec(["true"])
        machine.resume()
        for more in range(number, number + 1000):
            assert int(counter.stdout.readline(timeout=BOUND)) == more


def test_pause_and_resume_many_times(make: Make) -> None:
    machine = make()
    with machine.spawn(COUNT) as counter:
        last = 0
        for _ in range(25):
            machine.pause()
            assert machine.state is State.PAUSED
            machine.resume()
            assert (last := last + 1) == int(counter.stdout.readline(timeout=BOUND))


def test_stopped_while_paused(make: Make) -> None:
    """It powers off in order, for which it must run a moment."""
    machine = make()
    machine.exec("echo kept >/root/file", check=True)
    machine.pause()
    machine.stop(timeout=BOUND)
    assert (machine.state, machine.info()["status"]) == (State.STOPPED, 0)
    machine.start()
    assert machine.files.read_text("/root/file") == "kept\n"


def test_stop_gives_programs_time(make: Make) -> None:
    """SIGTERM reaches them and what they write then is on the disk; one that ignores it is killed."""
    machine = make()
    machine.spawn("trap 'echo bye >/root/said; exit' TERM; echo ready >/dev/shm/a; while :; do sleep 0.05; done", detach=True)
    machine.spawn("trap '' TERM; echo ready >/dev/shm/b; while :; do sleep 0.05; done", detach=True)
    deadline = time.monotonic() + BOUND
    while not (machine.files.exists("/dev/shm/a") and machine.files.exists("/dev/shm/b")):
        assert time.monotonic() < deadline
    machine.stop(timeout=BOUND)
    assert (machine.state, machine.info()["status"]) == (State.STOPPED, 0)
    machine.start()
    assert machine.files.read_text("/root/said") == "bye\n"


def test_switched_off_at_once(make: Make) -> None:
    """The disk is as after a power cut: what was synced is there, and its journal is replayed."""
    machine = make()
    machine.exec("echo kept >/root/file; sync; echo perhaps >/root/other", check=True)
    machine.stop(timeout=0)
    assert machine.state is State.STOPPED
    machine.start()
    assert machine.files.read_text("/root/file") == "kept\n"


@pytest.mark.walls("vm")
def test_a_guest_that_cannot_stop_is_switched_off(make: Make) -> None:
    machine = make()
    # The kernel stops where it is, with its interrupts off: nobody answers any more.
    machine.exec("echo 1 >/proc/sys/kernel/sysrq", check=True)
    machine.spawn("exec 3>/dev/ttyS0; echo b >/dev/null; for i in $(seq 500); do (while :; do :; done) & done", detach=True)
    machine.stop(timeout=15)
    assert machine.state is State.STOPPED


def test_the_guest_powers_itself_off(make: Make) -> None:
    machine = make()
    ends_itself(machine, "kill -TERM 1")
    assert (machine.state, machine.info()["status"], machine.info()["reason"]) == (State.STOPPED, 0, "the guest powered off")
    used_again(machine)


@pytest.mark.walls("vm")
@pytest.mark.parametrize(
    ("command", "state", "status", "reason"),
    [
        ("echo o >/proc/sysrq-trigger", State.STOPPED, None, "the guest powered off at once"),
        ("echo b >/proc/sysrq-trigger", State.STOPPED, None, "the guest powered off at once"),
        ("echo c >/proc/sysrq-trigger", State.FAILED, None, "Kernel panic - not syncing: sysrq triggered crash"),
    ],
    ids=["power off", "reset", "panic"],
)
def test_the_guests_kernel_ends_it(make: Make, command: str, state: State, status: int | None, reason: str) -> None:
    machine = make()
    ends_itself(machine, command)
    info = machine.info()
    assert (info["state"], info["status"], info["reason"]) == (state, status, reason)
    used_again(machine)


def ends_itself(machine: Machine, command: str) -> None:
    machine.exec("echo kept >/root/file; sync; sync", check=True)
    machine.spawn(f"sleep 0.1; {command}", detach=True)
    assert machine.wait(BOUND) == machine.info()["status"]


def used_again(machine: Machine) -> None:
    """What may be done with a machine that ended, and what not."""
    info = machine.info()
    assert info["ended"] >= info["started"]
    for call in (lambda: machine.exec(["true"]), machine.pause, machine.stop, lambda: machine.files.list("/")):
        with pytest.raises(InvalidState):
            call()
    machine.start()
    assert machine.files.read_text("/root/file") == "kept\n"
    assert machine.info()["reason"] == ""


@pytest.mark.walls("vm", "container")
@pytest.mark.parametrize("programs", [1, 3])
def test_memory_runs_out_in_the_guest(make: Make, programs: int) -> None:
    """The kernel kills programs and not the machine, and soon: PID 1 lives."""
    machine = make(memory="256M")
    hogs = [machine.spawn(["python3", "-c", "a = []\nwhile True: a.append(b'x' * (1 << 20))"]) for _ in range(programs)]
    results = [hog.wait(BOUND) for hog in hogs]
    assert all(results), results
    assert machine.exec(["echo", "alive"], timeout=BOUND).text == "alive\n"


@pytest.mark.walls("vm")
def test_the_disk_is_as_large_as_asked_for(make: Make) -> None:
    """And full is ENOSPC in the guest, which lives on."""
    machine = make(disk="64M")
    result = machine.exec("head -c 200M /dev/urandom >/root/big", timeout=BOUND)
    assert result.exit_code != 0
    assert "No space left" in result.error_text
    machine.exec("rm /root/big; echo fits >/root/small; sync", check=True)
    machine.stop()
    machine.start()
    assert machine.files.read_text("/root/small") == "fits\n"
    assert Path(machine.info()["folder"], "disk.qcow2").stat().st_blocks * 512 < 80 << 20
    with pytest.raises(OSError, match="No space") as caught:
        machine.files.write("/root/big", bytes(100 << 20))
    assert caught.value.errno == errno.ENOSPC


def in_time(scene: Callable[[float], None], *times: float) -> None:
    """Play a scene that has so many seconds; where a busy host needed them for its beginning, one that has more."""
    for seconds in times[:-1]:
        with suppress(TrivisorError):
            scene(seconds)
            return
    scene(times[-1])


def test_ttl(make: Make) -> None:
    def scene(ttl: float) -> None:
        machine = make(ttl=ttl)
        assert machine.wait(BOUND) == 0
        assert (machine.state, machine.info()["reason"]) == (State.STOPPED, "ttl")
        machine.start()
        machine.exec(["true"], check=True)

    in_time(scene, 1.5, 6, 20)


@pytest.mark.walls("container")  # the keeper's own clock
def test_ttl_of_a_paused_machine(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A frozen guest cannot power itself off: it is switched off when its grace is over, not before its time and not never."""
    monkeypatch.setitem(keeper.spawn.__kwdefaults__, "grace", 1.5)

    def scene(ttl: float) -> None:
        machine = make(ttl=ttl)
        machine.pause()
        machine.wait(BOUND)
        assert (machine.state, machine.info()["reason"]) == (State.STOPPED, "ttl")

    in_time(scene, 1, 6, 20)


def test_idle(make: Make) -> None:
    def scene(idle: float) -> None:
        machine = make(idle=idle)
        for _ in range(int(4 * idle)):  # traffic puts it off
            assert machine.exec("sleep 0.5; echo on", check=True).text == "on\n"
        assert machine.wait(BOUND) == 0
        assert (machine.state, machine.info()["reason"]) == (State.STOPPED, "idle")

    in_time(scene, 1.5, 6)


def test_the_wait_has_a_bound(running: Machine) -> None:
    with pytest.raises(WaitTimeout):
        running.wait(0.1)


def test_two_lives_at_once_do_not_meet(make: Make) -> None:
    """Eight machines through a life each from eight threads."""
    faults: list[BaseException] = []

    def life(number: int) -> None:
        try:
            machine = make(name=f"many-{number}")
            machine.exec(f"echo {number} >/root/me", check=True)
            machine.stop()
            machine.start()
            assert machine.files.read_text("/root/me") == f"{number}\n"
            assert machine.exec(["uname", "-n"]).text == f"many-{number}\n"
            machine.delete(force=True)
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=life, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert faults == []


@pytest.mark.parametrize(
    "wish",
    [
        {"memory": 0},
        {"memory": -1},
        {"memory": "lots"},
        {"memory": "10M"},
        {"memory": 1 << 60},
        {"memory": "1000T"},
        {"cpus": 0},
        {"cpus": -1},
        {"cpus": 1000},
        {"cpus": "two"},
        {"disk": 0},
        {"disk": "much"},
        {"disk": "1M"},
        {"disk": "100T"},
        {"kernel": "nano"},
        {"kernel": "/no/such/kernel"},
        {"kernel": "/etc/passwd"},
        {"kernel": "/"},
        {"kernel": "/dev/zero"},
        {"name": "Not A Name"},
        {"name": "-x"},
        {"name": ""},
        {"name": "x" * 64},
        {"name": "../x"},
        {"network": "no such network"},
        {"ports": {0: 1}},
        {"env": {"A=B": ""}},
        {"ttl": 0},
        {"colour": "red"},
        {"wall": "glass"},
    ],
    ids=str,
)
def test_what_no_machine_can_be(wall_vmm: VMM, wish: dict[str, object]) -> None:
    before = {path.name for path in (wall_vmm.home / "machines").iterdir()}
    with pytest.raises(InvalidSpec) as caught:
        wall_vmm.create("debian", **{"wall": "vm", **wish})  # type: ignore[arg-type]
    assert str(caught.value)
    assert {path.name for path in (wall_vmm.home / "machines").iterdir()} == before


def test_a_kernel_that_only_looks_like_one(wall_vmm: VMM, tmp_path: Path) -> None:
    """Its header is right and the rest is not: refused at the start, in words; the machine stays as it was."""
    broken = tmp_path / "vmlinuz"
    head = bytearray(0x10000)
    head[0x1F1] = 4
    head[0x1FE:0x200] = b"\x55\xaa"
    head[0x202:0x206] = b"HdrS"
    broken.write_bytes(head)
    elf = tmp_path / "vmlinux"
    elf.write_bytes(b"\x7fELF" + bytes(5000))
    for path in (broken, elf):
        machine = wall_vmm.create("debian", wall="vm", kernel=str(path))
        with pytest.raises((InvalidSpec, EngineError)) as caught:
            machine.start()
        assert path.name in str(caught.value)
        assert machine.state is State.CREATED
        machine.delete()
