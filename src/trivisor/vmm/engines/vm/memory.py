"""Where a virtual machine's memory is: in QEMU's own, at places that it says itself (HMP gpa2hva), and how its processor maps it.

QMP takes one client at a time, so while one holds the machine still nobody else can ask whether it runs, or let it run on.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trivisor.core.errors import EngineError, GuestGone, NotFound
from trivisor.core.paths import Home
from trivisor.core.units import GIB
from trivisor.vmm import facts
from trivisor.vmm.engine import Box
from trivisor.vmm.engines.vm import argv, growth, kit, runner
from trivisor.vmm.engines.vm.qmp import Qmp
from trivisor.vos.memory import btf, kallsyms, kernel
from trivisor.vos.memory.kernel import Kernel
from trivisor.vos.ports import MEMORY_FEATURES, MemoryPort, Ram, Still

_BELOW_HOLE = 0xB000_0000
_LOW = 2 * GIB
"""q35 maps all memory from 0 on if it is less than the former, else this much, and the rest from 4 GiB on."""
_LA57 = 1 << 12


def port(home: Home, box: Box) -> MemoryPort:
    """Return what the vm wall does for the memory of one machine."""
    return MemoryPort("vm", frozenset(MEMORY_FEATURES), lambda still: hold(box, still), lambda: known(home, box.spec.kernel))


@contextmanager
def hold(box: Box, still: bool) -> Iterator[Still]:
    """Say where a running machine's memory is; with `still` it does not run meanwhile. Raises EngineError, GuestGone."""
    with Qmp.connect(box.dir.qmp, box.spec.name) as qmp:
        stopped = still and qmp.ask("query-status")["running"]
        if stopped:
            qmp.ask("stop")
        try:
            yield _found(box, qmp)
        finally:
            if stopped:
                qmp.ask("cont")


def known(home: Home, name: str) -> Kernel:
    """Return what the kernel of this name says of itself, read once and kept with its kit. Raises NotFound."""
    found = kit.have(home, name)
    if found is None:
        raise NotFound(f"the kernel {name} is not what it was when the machine was started", hint="stop and start the machine")
    kept = found.folder / f"symbols-{kernel.FORM}.json"
    whole = facts.known(kept, Kernel)
    if whole is None:
        try:
            whole = kernel.read(found.kernel.read_bytes())
        except (kallsyms.NoSymbols, btf.NoTypes) as error:
            raise NotFound(f"kernel {found.origin} cannot be understood: {error}", hint="use the kernel micro or full") from error
        facts.keep(kept, whole)
    return whole


def _found(box: Box, qmp: Qmp) -> Still:
    pid = runner.engine(box.dir)
    if pid is None:
        raise GuestGone("its QEMU has ended", machine=box.spec.name)
    has = growth.sizes(qmp)
    size = has.base
    low = size if size < _BELOW_HOLE else _LOW
    begin = where(box, qmp)
    ram = [Ram(0, low, begin)]
    if size > low:
        ram.append(Ram(4 * GIB, size - low, begin + low))
    if has.more is not None and has.more.size:
        # It may have holes where the guest gave memory back: nothing but zeros is there.
        address = where(box, qmp, has.more.physical)
        ram.append(Ram(has.more.physical, min(growth.reach(box), has.more.most), address, private=True))
    said = _monitor(qmp, "info registers")
    levels = 5 if _number(r"\bCR4=([0-9a-f]+)", said, box) & _LA57 else 4
    shared = Path(f"/proc/{pid}/fd/{argv.RAM_FD}") if box.spec.ram == "shared" else None
    return Still(pid, tuple(ram), _number(r"\bCR3=([0-9a-f]+)", said, box), levels, shared)


def where(box: Box, qmp: Qmp, physical: int = 0) -> int:
    """Return where in QEMU's memory a run of RAM begins: that which the machine was started with is one piece. Raises EngineError."""
    return _number(r" is (0x[0-9a-f]+)", _monitor(qmp, f"gpa2hva {physical:#x}"), box)


def _monitor(qmp: Qmp, line: str) -> str:
    return str(qmp.ask("human-monitor-command", {"command-line": line}))


def _number(pattern: str, said: str, box: Box) -> int:
    match = re.search(pattern, said)
    if not match:
        raise EngineError("QEMU does not say where the machine's memory is", output=said[:200], machine=box.spec.name)
    return int(match[1], 16)
