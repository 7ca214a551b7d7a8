"""Which platform of runsc works here? Each is tried, in the very jail that machines run in, with a program that says that it ran.

A host may have seccomp or ptrace but not as runsc needs them, and a /dev/kvm on which the Sentry hangs: nothing is
believed that was not seen. A trial takes some 200 ms; the verdict is kept per boot and runsc.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass

import msgspec

from trivisor.core.errors import HostLacks
from trivisor.core.paths import Home
from trivisor.core.process import boot_id
from trivisor.launch import tvinit
from trivisor.launch.ids import Shape
from trivisor.launch.jail import USAGE
from trivisor.launch.plan import encode
from trivisor.vmm import facts
from trivisor.vmm.engines.gvisor import bundle, jailed
from trivisor.vmm.engines.gvisor.jailed import Sandbox
from trivisor.vmm.engines.gvisor.runsc import Runsc

LIMIT = 10.0
KVM_LIMIT = 3.0
"""Seconds that a trial may take. On a /dev/kvm that does not work it takes for ever."""
_MEMORY = 256 << 20


@dataclass(frozen=True)
class Verdict:
    """The platform to use, and of the better ones why not."""

    platform: str
    why: str


class _Kept(msgspec.Struct, frozen=True):
    platform: str
    why: str


def verdict(runsc: Runsc, shape: Shape, home: Home) -> Verdict:
    """Return the best platform that works; asked of the host at most once a boot. Raises HostLacks if none does."""
    known = home.cache / f"gvisor-{boot_id()}-{runsc.identity}-{shape.kind}.json"
    kept = facts.known(known, _Kept)
    if kept is None:
        kept = _look(runsc, shape)
        for old in home.cache.glob(f"gvisor-*-{runsc.identity}-{shape.kind}.json"):
            old.unlink(missing_ok=True)
        facts.keep(known, kept)
    return Verdict(kept.platform, kept.why)


def _look(runsc: Runsc, shape: Shape) -> _Kept:
    faults: list[str] = []
    for platform in runsc.platforms:
        fault = trial(runsc, platform, shape)
        if not fault:
            return _Kept(platform, "; ".join(faults))
        faults.append(f"{platform}: {fault}")
    raise HostLacks(
        f"no platform of runsc {runsc.version} works here: {'; '.join(faults)}",
        hint="a container needs to allow ptrace, seccomp and user namespaces; a newer runsc has more platforms",
    )


def trial(runsc: Runsc, platform: str, shape: Shape) -> str:
    """Run tvinit in a sandbox on that platform. Returns "" if that works, else what failed."""
    if platform == "kvm" and not os.access(jailed.KVM, os.R_OK | os.W_OK):
        return "there is no /dev/kvm that may be used"
    config = bundle.config(hostname="trial", memory=_MEMORY, argv=[f"{bundle.INSIDE}/tvinit", "launch"])
    limit = KVM_LIMIT if platform == "kvm" else LIMIT
    with open(os.memfd_create("plan"), "r+b") as memory, open(os.memfd_create("log"), "r+b") as log:
        sandbox = Sandbox(runsc, platform, shape.ids(0), shape.namespaces, config, tvinit.path(), log.fileno(), _MEMORY)
        memory.write(encode(jailed.plan(sandbox)))
        memory.flush()
        memory.seek(0)
        try:
            done = subprocess.run(
                [tvinit.path(), "launch", str(memory.fileno())],
                pass_fds=[memory.fileno(), log.fileno()],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=limit,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return f"a trial took over {limit:g} s"
        if done.returncode == USAGE:
            return ""
        log.seek(0)
        said = (done.stderr + log.read()).decode(errors="replace").strip().splitlines()
    return said[-1][:300] if said else f"a trial exited with {done.returncode}"
