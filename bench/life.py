"""How long does each step of a machine's life take, and what does it cost in memory?

Everything is measured in one run on one machine of 256 MB and one vCPU, beside plain QEMU that boots the same kernel file and
initramfs. Times are of the Python calls, as a user sees them.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from bench import peer
from bench.common import Row, Series, main, row
from trivisor import VMM, Machine
from trivisor.core.paths import Home
from trivisor.core.units import MIB
from trivisor.launch import tvinit
from trivisor.vmm.engines.vm import kit, qemu
from trivisor.vmm.engines.vm.engine import VmEngine

IMAGE = "debian"
MEMORY = "256M"
TRUE = ["/bin/true"]
NOTES = """
The peer is QEMU with default options, -m 256, the same kernel file and initramfs, until its first answer and one command in the
initramfs; ours has mounted the image's root and run the image's own /bin/true. A first command pays for the translation of its
code (TCG); a second one does not. Blank ice serves an image's first machine, and any
whose disk has been used.
Private memory is anonymous memory of QEMU and keeper after the first command.
"""


def _nothing(_: str) -> None:
    pass


def _is(vm: Machine, way: str) -> None:
    """Make sure that it was started the way that is being measured."""
    said = vm.info()["facts"]["start"]
    assert said.startswith(way), f"started {said}, not {way}"


def _peer(home: Home, rounds: int) -> Series:
    found, kernel = qemu.locate(), kit.get(home, "micro", _nothing)
    initramfs = kernel.initramfs(tvinit.path(), tvinit.digest())
    series = Series()
    for _ in range(rounds):
        with series.timed(), peer.plain_qemu(found, kernel.original, initramfs) as (_process, line):
            peer.first_command(line)
    return series


def _starts(vmm: VMM, way: str, rounds: int) -> Series:
    """Time create, start and the first command, with a machine of its own each round."""
    series = Series()
    for _ in range(rounds):
        with series.timed():
            vm = vmm.create(IMAGE, memory=MEMORY)
            vm.start()
            vm.exec(TRUE, check=True)
        _is(vm, way)
        vm.delete(force=True)
    return series


def _verbs(vm: Machine, rounds: int) -> dict[str, Series]:
    """Time what a running machine does."""
    found = {verb: Series() for verb in ("exec", "pause", "resume")}
    for _ in range(rounds * 4):
        with found["exec"].timed():
            vm.exec(TRUE, check=True)
        with found["pause"].timed():
            vm.pause()
        with found["resume"].timed():
            vm.resume()
    return found


def _transfers(vm: Machine, rounds: int) -> dict[str, Series]:
    """Time 100 MB in and out, in seconds."""
    found = {"upload": Series(), "download": Series()}
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "source"), Path(folder, "target")
        with source.open("wb") as stream:
            for _ in range(100):
                stream.write(os.urandom(1_000_000))
        for _ in range(rounds):
            with found["upload"].timed(1.0):
                vm.files.upload(source, "/root/data")
            with found["download"].timed(1.0):
                vm.files.download("/root/data", target)
            assert target.stat().st_size == 100_000_000
            target.unlink()
    return found


def _memory(vmm: VMM, rounds: int) -> tuple[Series, Series]:
    """Return MB of the host that an idle machine has for itself, and MB of tvinit in the guest."""
    private, init = Series(), Series()
    for _ in range(rounds):
        with vmm.run(IMAGE, memory=MEMORY) as vm:
            _is(vm, "from the image's ice")
            vm.exec(TRUE, check=True)
            private.values.append(vm.stats().private / MIB)
            status = vm.files.read_text("/proc/1/status")
            resident = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
            init.values.append(int(resident.split()[1]) / 1024)
    return private, init


def rows(quick: bool) -> list[Row]:
    """Run one life after another, and the peer."""
    rounds = 2 if quick else 5
    vmm = VMM()
    home = Home(vmm.home)
    booting = VMM(vmm.home, engines=[VmEngine(home, ice="off")])
    blankly = VMM(vmm.home, engines=[VmEngine(home, ice="blank")])
    for _ in range(2):  # the first makes kit and blank ice, the second the image's own
        with vmm.run(IMAGE, memory=MEMORY) as vm:
            vm.exec(TRUE)
    plain = _peer(home, rounds)
    cold = _starts(booting, "booted", rounds)
    blank = _starts(blankly, "from blank ice", rounds)
    own = _starts(vmm, "from the image's ice", rounds)
    private, init = _memory(vmm, rounds)
    with vmm.run(IMAGE, memory=MEMORY) as vm:
        vm.exec(TRUE)
        verbs = _verbs(vm, rounds)
        moved = _transfers(vm, min(rounds, 3))
    name = peer.NAME
    return [
        row("cold boot to first exec", cold, "ms", peer=name, against=plain, share=1.0),
        row("create + start from blank ice to first exec (a new image)", blank, "ms", peer=name, against=plain, share=1 / 5),
        row("create + start from the image's ice to first exec", own, "ms", peer=name, against=plain, share=1 / 10),
        row("exec of /bin/true", verbs["exec"], "ms", bound=15),
        row("pause", verbs["pause"], "ms", bound=5),
        row("resume", verbs["resume"], "ms", bound=5),
        row("upload of 100 MB", moved["upload"], "s", bound=3),
        row("download of 100 MB", moved["download"], "s", bound=3),
        row("private memory of an idle machine", private, "MB", bound=65),
        row("tvinit in the guest, resident", init, "MB", bound=2),
    ]


if __name__ == "__main__":
    main(rows, NOTES)
