"""What wall="auto" takes: vm with KVM, else gvisor, else vm with TCG; never container, which shares the host's kernel and is
asked for by name. So a machine is never weaker than what was asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trivisor.core.spec import Wall
from trivisor.vmm.engine import WallReport


@dataclass(frozen=True)
class Choice:
    """`wall` is None where none can be used. `why` is for people."""

    wall: Wall | None
    why: str
    remedy: str = ""


def choose(reports: Sequence[WallReport]) -> Choice:
    """Decide by what the walls say of this host."""
    found = {report.wall: report for report in reports if report.wall != "container"}
    vm, gvisor = found.get("vm"), found.get("gvisor")
    if vm and vm.available and vm.features.get("kvm"):
        return Choice("vm", "KVM works, and no wall is stronger than a virtual machine on it")
    if gvisor and gvisor.available:
        without = "without KVM" if vm and vm.available else "no virtual machine can be run here"
        return Choice("gvisor", f"{without}; gVisor's own kernel is a boundary, which QEMU's translator (TCG) is not meant to be")
    if vm and vm.available:
        return Choice("vm", "by TCG: there is neither KVM nor gVisor here; the container wall is weaker and is taken by name only")
    why = "; ".join(f"{wall}: {report.why}" for wall, report in found.items())
    return Choice(None, why, "; ".join(filter(None, (report.remedy for report in found.values()))))
