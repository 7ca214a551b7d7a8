"""Lines made of Python in a container: any program opens them by name, and loses them when their owner goes."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time

import pytest
from machine_home import VmHome

from trivisor import Machine
from trivisor.core.errors import AlreadyExists, GuestGone, InvalidState, UnsupportedByWall
from trivisor.vos.devices import BlockDevice, CharDevice, Keyboard

pytestmark = [pytest.mark.slow, pytest.mark.walls("container")]
EVERY = bytes(range(256))


class Upper(CharDevice):
    """Answers in capitals."""

    def receive(self, data: bytes) -> bytes:
        return data.upper()


class Kept(CharDevice):
    """Keeps what comes; raises if it comes to "boom"."""

    def __init__(self) -> None:
        super().__init__()
        self.got = b""
        self.news = threading.Event()

    def receive(self, data: bytes) -> None:
        self.got += data
        self.news.set()
        if b"boom" in data:
            raise ValueError("boom")

    def wait(self, size: int) -> bytes:
        deadline = time.monotonic() + 60
        while len(self.got) < size and self.news.wait(max(0, deadline - time.monotonic())):
            self.news.clear()
        return self.got


def test_any_program_opens_it(running: Machine) -> None:
    """One that ran before it came, one that starts later, and one that is no root."""
    before = running.spawn("read go; exec 3<>/dev/mydevice; echo early >&3; head -n 1 <&3")
    attached = running.devices.attach(Upper(), "mydevice")
    assert (attached.kind, attached.plugged) == ("char", True)
    assert running.devices.node("mydevice") == "/dev/mydevice"
    before.stdin.write(b"go\n")
    assert before.stdout.read() == b"EARLY\n"
    script = "exec 3<>/dev/mydevice; echo later >&3; head -n 1 <&3"
    assert running.exec(script, timeout=20).text == "LATER\n"
    assert running.exec(script, user="nobody", timeout=20).text == "LATER\n"
    running.devices.detach("mydevice")
    assert not running.files.exists("/dev/mydevice")
    assert running.devices.list() == []


def test_bytes_are_as_they_are(running: Machine) -> None:
    device = Kept()
    running.devices.attach(device, "bytes")
    code = "import os,sys; fd = os.open('/dev/bytes', os.O_RDWR); d = bytes(range(256)) * 400\nwhile d: d = d[os.write(fd, d):]\n"
    reader = running.spawn(["python3", "-c", code + "g = b''\nwhile len(g) < 102400: g += os.read(fd, 65536)\nos.write(1, g)"])
    assert device.wait(102400) == EVERY * 400
    device.send(EVERY * 400)
    assert reader.stdout.read() == EVERY * 400
    running.devices.detach("bytes")
    with pytest.raises(GuestGone):
        device.send(b"late")


def test_programs_are_hung_up(running: Machine) -> None:
    """By a detach, by a function that raises, and by whoever removes the name in the machine."""
    script = "exec 3<>/dev/line; echo open; cat <&3; echo ended; echo more >&3 2>/dev/null || echo refused"
    for way in ("detach", "raises", "removed"):
        device = Kept()
        running.devices.attach(device, "line")
        program = running.spawn(script)
        assert program.stdout.readline() == b"open\n"
        if way == "raises":
            running.exec("echo boom >/dev/line", timeout=20)
        elif way == "removed":
            running.exec("rm /dev/line", timeout=20)
        else:
            running.devices.detach("line")
        assert program.stdout.read(timeout=20) == b"ended\nrefused\n", way
        if way != "detach":
            running.devices.detach("line")
        assert not running.files.exists("/dev/line")


def test_what_is_refused(running: Machine) -> None:
    with pytest.raises(AlreadyExists, match="/dev/null"):
        running.devices.attach(Upper(), "null")
    for device in (Keyboard(), BlockDevice(512)):
        with pytest.raises(UnsupportedByWall):
            running.devices.attach(device)
    running.devices.attach(Upper(), "once")
    with pytest.raises(AlreadyExists):
        running.devices.attach(Upper(), "once")
    running.devices.detach("once")
    assert running.exec("echo fine >/dev/null", check=True)


def test_a_device_whose_owner_is_killed_is_gone(running: Machine, wall_home: VmHome) -> None:
    code = (
        "import sys\nfrom trivisor import VMM\nfrom trivisor.vos.devices import CharDevice\n"
        f"VMM({str(wall_home.root)!r}).get({running.id!r}).devices.attach(CharDevice(), 'theirs')\n"
        "print('attached', flush=True)\nsys.stdin.read()\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"attached\n"
        program = running.spawn("exec 3<>/dev/theirs; echo open; cat <&3; echo ended")
        assert program.stdout.readline() == b"open\n"
        assert running.devices.list()[0].owner == owner.pid
        owner.send_signal(signal.SIGKILL)
    assert program.stdout.read(timeout=20) == b"ended\n"
    running.exec("n=0; while [ -L /dev/theirs ] && [ $n -lt 600 ]; do sleep 0.1; n=$((n + 1)); done; [ ! -L /dev/theirs ]", check=True)
    assert running.devices.list() == []
    running.devices.detach("theirs")


def test_again_and_again(running: Machine) -> None:
    device = Upper()
    for _ in range(20):
        running.devices.attach(device, "again")
        running.devices.detach("again")
    running.exec("n=0; while ls /dev/pts | grep -q '[0-9]' && [ $n -lt 600 ]; do sleep 0.1; n=$((n + 1)); done; [ $n -lt 600 ]", check=True)


def test_a_machine_that_does_not_run(stopped: Machine) -> None:
    with pytest.raises(InvalidState):
        stopped.devices.attach(Upper())


@pytest.mark.walls("gvisor")
def test_no_line_behind_gvisor(running: Machine) -> None:
    with pytest.raises(UnsupportedByWall) as caught:
        running.devices.attach(Upper())
    assert "container" in caught.value.walls
