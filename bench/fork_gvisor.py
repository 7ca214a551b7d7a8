"""What do a snapshot of a gVisor machine and the way back cost, beside runsc's own checkpoint and restore?"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from bench.common import Row, Series, main, row
from trivisor import VMM, Machine
from trivisor.core.paths import Home
from trivisor.vmm.engines.gvisor import freeze, runsc
from trivisor.vmm.engines.gvisor.runsc import Runsc

IMAGE, MEMORY = "debian", "256M"
TRUE = ["/bin/true"]
BUSY = """\
import os, time
one = os.urandom(1 << 20)
held = [one[number:] + one[:number] for number in range(100)]
print("there", flush=True)
time.sleep(100000)
"""
_NAME = "trivisor-bench"
_LONGEST = 120.0
NOTES = """
The machine runs Python with 100 MB of random bytes, and may use all processors, as the peer does. The peer is the same runsc on the
same platform, not jailed and without a writable
layer, that runs the same program on the same root: `runsc checkpoint` (the machine ends, as with suspend) or with --leave-running (it goes
on, as with snapshot; with a runsc of 2022 checkpoint and restore; what it wrote is neither packed
nor brought to the disk, as ours is), `runsc restore` and an exec of /bin/true. Turn by turn.
"""


class Plain:
    """The program under runsc alone."""

    def __init__(self, folder: Path, root: Path, found: Runsc, platform: str) -> None:
        self.goes_on = freeze.goes_on(found)
        self._folder = folder
        self._command = [found.path, f"--root={folder}/state", f"--platform={platform}", "--network=none", "--ignore-cgroups"]
        process = {"args": ["python3", "-c", BUSY], "env": ["PATH=/usr/bin:/bin"], "cwd": "/", "user": {"uid": 0, "gid": 0}}
        config = {"ociVersion": "1.0.2", "process": process, "root": {"path": str(root), "readonly": True}, "hostname": "bench"}
        (folder / "config.json").write_text(json.dumps(config))
        self._images = 0

    def start(self) -> None:
        with (self._folder / "said").open("wb") as said:
            self._run("run", "--detach", "--bundle", str(self._folder), _NAME, output=said)
        while b"there" not in (self._folder / "said").read_bytes():
            time.sleep(0.01)

    def checkpoint(self, *words: str) -> None:
        self._images += 1
        self._run("checkpoint", *words, "--image-path", str(self._image), _NAME)

    def leave_running(self) -> None:
        """Its --leave-running, where that does so. That of 2022 restores it, and waits for its end."""
        if self.goes_on:
            self.checkpoint("--leave-running")
            return
        self.checkpoint()
        self.forget()
        self.restore(first=False)

    def forget(self) -> None:
        subprocess.run([*self._command, "delete", "--force", _NAME], check=False, capture_output=True, timeout=_LONGEST)

    def restore(self, *, first: bool = True) -> None:
        self._run("restore", "--detach", "--bundle", str(self._folder), "--image-path", str(self._image), _NAME)
        if first:
            self._run("exec", _NAME, *TRUE)

    @property
    def _image(self) -> Path:
        return self._folder / f"image{self._images}"

    def _run(self, *words: str, output: BinaryIO | int = subprocess.DEVNULL) -> None:
        done = subprocess.run(
            [*self._command, *words], stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, timeout=_LONGEST, check=False
        )
        if done.returncode:
            raise RuntimeError(f"runsc {words[0]} failed ({done.returncode})")


@contextmanager
def _plain(root: Path, found: Runsc, platform: str) -> Iterator[Plain]:
    with tempfile.TemporaryDirectory() as name:
        one = Plain(Path(name), root, found, platform)
        try:
            one.start()
            yield one
        finally:
            one.forget()


def _busy(vmm: VMM) -> Machine:
    vm = vmm.run(IMAGE, wall="gvisor", memory=MEMORY, cpus=os.cpu_count())
    program = vm.spawn(["python3", "-c", BUSY], detach=True)
    assert program.stdout.readline() == b"there\n"
    return vm


def _rounds(vmm: VMM, vm: Machine, peer: Plain, rounds: int) -> dict[str, Series]:
    names = ("suspend", "resume", "checkpoint", "restore", "snapshot", "leave", "created", "paused")
    found = {name: Series() for name in names}
    for number in range(rounds):
        with found["suspend"].timed():
            vm.suspend()
        with found["checkpoint"].timed():
            peer.checkpoint()
        peer.forget()
        with found["resume"].timed():
            vm.resume()
            vm.exec(TRUE, check=True)
        with found["restore"].timed():
            peer.restore()
        with found["snapshot"].timed():
            kept = vm.snapshot(f"bench{number}", memory=True)
        found["paused"].values.append(kept.paused * 1000)
        with found["leave"].timed():
            peer.leave_running()
        with found["created"].timed():
            other = vmm.create(snapshot=kept.ref)
            other.start()
            other.exec(TRUE, check=True)
        other.delete(force=True)
        vmm.snapshots.remove(kept.ref)
    return found


def measure(vmm: VMM, rounds: int) -> list[Row]:
    """Measure both, turn by turn."""
    report = next(report for report in vmm.walls() if report.wall == "gvisor")
    if not report.available:
        print(f"no gVisor: {report.why}", file=sys.stderr, flush=True)
        return []
    with vmm.run(IMAGE, wall="gvisor"):
        pass  # unpacks the image's root
    tree = vmm.images.lowers(vmm.images.get(IMAGE).digest)[0]
    binary = runsc.inspect(runsc.locate(), Home(vmm.home))
    with _busy(vmm) as vm, _plain(tree, binary, report.details["platform"].split()[0]) as peer:
        found = _rounds(vmm, vm, peer, rounds)
    checkpoint, restore, leave = "runsc checkpoint", "runsc restore + exec", "runsc checkpoint --leave-running"
    return [
        row("gVisor: suspend", found["suspend"], "ms", peer=checkpoint, against=found["checkpoint"], share=1.2),
        row("gVisor: resume to first exec", found["resume"], "ms", peer=restore, against=found["restore"], share=1.2),
        row("gVisor: snapshot, it goes on", found["snapshot"], "ms", peer=leave, against=found["leave"], share=1.2),
        row("gVisor: it stands still for", found["paused"], "ms", peer=leave, against=found["leave"]),
        row("gVisor: create from a snapshot to first exec", found["created"], "ms", peer=restore, against=found["restore"], share=1.2),
    ]


def rows(quick: bool) -> list[Row]:
    """Measure on the home of the benches."""
    with VMM() as vmm:
        return measure(vmm, 3 if quick else 10)


if __name__ == "__main__":
    main(rows, NOTES)
