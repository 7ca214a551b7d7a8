"""A virtual machine's RAM offered to the host's kernel for merging with equal pages (vmm/dedupe.py), by QEMU, which advises the kernel.

All memory that QEMU has for the guest is meant, also what was added while it runs. It is a switch of QEMU's, not a part of the machine's
shape: ice is the same with and without.
"""

from __future__ import annotations

from trivisor.vmm.engine import Box
from trivisor.vmm.engines.vm.qmp import Qmp

_BACKEND = "child<memory-backend-"


def merge(box: Box, on: bool) -> None:
    """Offer it, or take the offer back. Raises EngineError, GuestGone."""
    with Qmp.connect(box.dir.qmp, box.spec.name) as qmp:
        for found in qmp.ask("qom-list", {"path": "/objects"}):
            if str(found["type"]).startswith(_BACKEND):
                qmp.ask("qom-set", {"path": f"/objects/{found['name']}", "property": "merge", "value": on})
