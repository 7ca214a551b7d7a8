"""The peers of bench/fork.py that begin from nothing, or copy files alone: `runsc do`, `docker run`, `docker create`, `docker commit`.

Each has rows of its own in the table, and is beside what of ours does the like. Plain QEMU is in peer.py, checkpoint and restore of
runsc in fork_gvisor.py. What is not installed, or does not run here, has no row: why is said.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from bench.common import Row, Series, row
from bench.peers import peers
from trivisor import VMM, HostLacks
from trivisor.vmm.engines.gvisor import runsc

RUN, CREATE, COPY, DO = "docker run", "docker create + start", "docker commit + create + start", "runsc do"
_IMAGE, _FROM = "debian", "trivisor-bench-copy"
_NONE = ["--pull=never", "--network=none"]
_LONGEST = 120.0


@dataclass
class Beginning:
    """What they took, in milliseconds; of those that do not run here there is nothing."""

    runsc: Series = field(default_factory=Series)
    run: Series = field(default_factory=Series)
    create: Series = field(default_factory=Series)
    copy: Series = field(default_factory=Series)

    def rows(self) -> list[Row]:
        """A row for each, /bin/true from nothing."""
        named = {DO: self.runsc, RUN: self.run, CREATE: self.create}
        return [row(f"peer: {name} /bin/true", series, "ms") for name, series in named.items() if series.values]

    def docker(self) -> dict[str, Series]:
        """Those of docker that run one command, by name."""
        return {name: series for name, series in {RUN: self.run, CREATE: self.create}.items() if series.values}


def beginning(vmm: VMM, image: str, files: int, rounds: int) -> Beginning:
    """Time them, turn by turn. A copy is of a container with so many files of its own."""
    platform = next(report for report in vmm.walls() if report.wall == "gvisor").details.get("platform") or "ptrace"
    tree = vmm.images.lowers(vmm.images.get(image).digest)[0]
    try:
        binary = runsc.locate()
    except HostLacks:
        binary = "runsc"
    found = Beginning()
    with peers(tree, binary, platform.split()[0]) as others:
        alone, docker = others["runsc"], others["docker"]
        for peer in (alone, docker):
            if peer.why:
                print(f"no {peer.name}: {peer.why}", file=sys.stderr, flush=True)
        for _ in range(rounds):
            alone.measure()
            docker.measure()
            if not docker.why:
                with found.create.timed():
                    made = _docker("create", *_NONE, _IMAGE, "/bin/true")
                    _docker("start", "--attach", made)
                _docker("rm", "--force", made)
                time.sleep(0.1)  # its daemon goes on after its end
        found.runsc, found.run = alone.series, docker.series
        if not docker.why:
            found.copy = _copies(files, rounds)
    return found


def _copies(files: int, rounds: int) -> Series:
    series = Series()
    with _container(
        f"mkdir /root/many && cd /root/many && for i in $(seq {files}); do echo $i > $i; done; echo there; sleep 100000"
    ) as parent:
        for _ in range(rounds):
            with series.timed():
                _docker("commit", "--pause", parent, _FROM)
                made = _docker("create", *_NONE, _FROM, "/bin/true")
                _docker("start", "--attach", made)
            _docker("rm", "--force", made)
            _docker("rmi", "--force", _FROM)
    return series


@contextmanager
def _container(command: str) -> Iterator[str]:
    made = _docker("run", "--detach", *_NONE, _IMAGE, "/bin/sh", "-c", command)
    try:
        end = time.monotonic() + _LONGEST
        while _docker("logs", made) != "there":
            if time.monotonic() > end:
                raise TimeoutError("docker's container makes no files")
            time.sleep(0.1)
        yield made
    finally:
        _docker("rm", "--force", made)


def _docker(*words: str) -> str:
    done = subprocess.run(["docker", *words], stdin=subprocess.DEVNULL, capture_output=True, timeout=_LONGEST, check=False)
    if done.returncode:
        raise RuntimeError(f"docker {words[0]} failed: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout.decode().strip()
