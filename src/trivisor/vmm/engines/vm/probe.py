"""Is KVM to be believed? /dev/kvm may exist and still not run a guest: nested or paravirtual hosts fail on an MSR or crawl.

So the same QEMU runs guest/src/probe.S, a flat firmware that goes to protected mode, turns on paging, computes for a while,
and leaves through isa-debug-exit with a status that no failure gives. On working KVM that is some 50 ms. The verdict is
kept per boot and QEMU.
"""

from __future__ import annotations

import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import msgspec

from trivisor.core.paths import Home
from trivisor.core.process import boot_id
from trivisor.launch import tvinit
from trivisor.vmm import facts
from trivisor.vmm.engines.vm.argv import Accel
from trivisor.vmm.engines.vm.qemu import Qemu

LIMIT = 1.5
"""Seconds that the probe may take, QEMU's own start included."""
PASSED = 33
_KVM = "/dev/kvm"


@dataclass(frozen=True)
class Verdict:
    """Which accelerator to use, and what was seen."""

    accel: Accel
    why: str


class _Kept(msgspec.Struct, frozen=True):
    accel: Accel
    why: str


def verdict(qemu: Qemu, home: Home) -> Verdict:
    """Return the accelerator that works here with this QEMU; asked of the host at most once a boot."""
    if why := unusable():
        return Verdict("tcg", why)
    known = home.cache / f"kvm-{boot_id()}-{qemu.identity}.json"
    kept = facts.known(known, _Kept)
    if kept is None:
        why = trial(qemu.path, "kvm", firmware())
        kept = _Kept("tcg", f"KVM is not used: {why}") if why else _Kept("kvm", "KVM ran the probe")
        _forget(home, qemu)
        facts.keep(known, kept)
    return Verdict(kept.accel, kept.why)


def unusable() -> str:
    """Say why /dev/kvm cannot even be opened; empty if it can."""
    try:
        os.close(os.open(_KVM, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        return "KVM is not used: the host has no /dev/kvm"
    except OSError as error:
        return f"KVM is not used: /dev/kvm: {error.strerror} (is your user in group kvm?)"
    return ""


def firmware() -> Path:
    """Return the compiled probe, which lies beside tvinit."""
    return tvinit.path().parent / "probe.bin"


def trial(qemu: str, accel: Accel, image: Path, limit: float = LIMIT) -> str:
    """Run the probe under `accel` and return what went wrong; empty if it came to its end in time."""
    cpu = "host" if accel == "kvm" else "max"
    argv = [qemu, "-machine", "q35", "-accel", accel, "-cpu", cpu, "-m", "32M", "-nodefaults", "-no-user-config", "-display", "none"]
    argv += ["-no-reboot", "-bios", str(image), "-device", "isa-debug-exit,iobase=0xf4,iosize=4"]
    begun = time.monotonic()
    try:
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return f"a guest that needs some 50 ms had not finished after {limit:g} s"
    except OSError as error:
        return f"QEMU cannot be run: {error.strerror}"
    if done.returncode == PASSED:
        return ""
    said = done.stderr.decode(errors="replace").strip().splitlines()
    last = said[-1][:300] if said else "it said nothing; most likely the guest crashed"
    return f"QEMU left with {done.returncode} after {(time.monotonic() - begun) * 1000:.0f} ms: {last}"


def _forget(home: Home, qemu: Qemu) -> None:
    """Drop verdicts of this QEMU from earlier boots."""
    for old in home.cache.glob(f"kvm-*-{qemu.identity}.json"):
        old.unlink(missing_ok=True)
