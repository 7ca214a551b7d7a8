"""The RAM of a clone, for each kind of QEMU.

A QEMU with rom= maps the ice's file, which it can only read, privately: nothing to do. An older one opens its RAM file
for writing whatever it is told, and a file that a machine could write to must not be the ice. It gets a memfd instead that
is sealed against writing, which opens for writing and refuses to be written: filled from the ice once, and found again in
the descriptors of any machine that has it, so machines of one ice share it as they would share the file. It is filled while
QEMU comes up, which does not look at its RAM before it is given a state, and sealed before that. Where the jail has no /proc
to open a descriptor by, the machine gets a file of its own.

A machine with ram="shared", or in huge pages that are set aside (huge.py), has a memfd of its own that is written through, filled from
the ice in the same way and sealed against another size only.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from trivisor.core.errors import HostLacks, TrivisorError
from trivisor.core.paths import Home, MachineDir
from trivisor.core.spec import Spec
from trivisor.launch import jail
from trivisor.launch.jail import JailReport
from trivisor.vmm.engines.vm import files, huge, runner
from trivisor.vmm.engines.vm.ice import Ice
from trivisor.vmm.engines.vm.pending import Pending
from trivisor.vmm.engines.vm.qemu import Qemu
from trivisor.vmm.engines.vm.runner import Ram, Setup

_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL

_SIZED = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
"""Who maps a file that becomes shorter dies of it, and that must not be in a QEMU's hands."""
_OWN = "trivisor-ram"


def provide(
    stack: ExitStack,
    home: Home,
    setup: Setup,
    place: MachineDir,
    frozen: Ice,
    *,
    apart: bool = False,
    in_huge_pages: bool = False,
    writing: Pending | None = None,
) -> Ram:
    """Return RAM for one clone of `frozen`; what it takes is given back when `stack` ends, after the clone has it.

    Its file is there, and as large as it will be; what it is to have in it may still be on its way (`writing`).
    """
    ready = writing.wait if writing is not None else None
    if apart:
        filling = _Filling(_OWN, frozen, seals=_SIZED, in_huge_pages=in_huge_pages, ready=ready)
        stack.callback(filling.close)
        return Ram("shared", fd=filling.fd, finish=filling.finish)
    if setup.qemu.rom_option:
        return Ram("ice", file=frozen.ram, finish=ready)
    if sealed(setup.qemu, setup.jail):
        name = _name(frozen.facts.key)
        if writing is not None and (fd := writing.share()) is not None:
            stack.callback(os.close, fd)
            return Ram("sealed", fd=fd, finish=writing.wait_memory)
        fd = _shared(home, name, frozen)
        if fd is not None:
            stack.callback(os.close, fd)
            return Ram("sealed", fd=fd)
        filling = _Filling(name, frozen, ready=ready)
        stack.callback(filling.close)
        return Ram("sealed", fd=filling.fd, finish=filling.finish)
    own = place.root / "ram"
    own.unlink(missing_ok=True)
    if ready is not None:
        ready()
    files.copy_file(frozen.ram, own)
    # Once QEMU has mapped it, nobody needs its name.
    stack.callback(own.unlink, missing_ok=True)
    return Ram("copy", file=own)


def sealed(found: Qemu, report: JailReport) -> bool:
    """Whether copies have their RAM out of a sealed memfd."""
    return not found.rom_option and "pid" in report.namespaces


def sealable(stack: ExitStack, key: str) -> int:
    """Return an empty memfd for the RAM of what is frozen under `key`, by which its copies find it once it is sealed; `stack` closes it."""
    fd = os.memfd_create(_name(key), _flags(False))
    stack.callback(os.close, fd)
    return fd


def seal(fd: int) -> None:
    """Let nobody write to RAM that several machines are to have. Raises OSError."""
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)


def _name(key: str) -> str:
    return f"trivisor-ice-{key}"


def check(spec: Spec) -> None:
    """Raise HostLacks if RAM in a descriptor was asked for and the jail cannot be given a /proc of its own to open it by, or for a want of
    huge pages; InvalidSpec for memory that is no number of these."""
    huge.check(spec)
    if (spec.ram == "shared" or spec.hugepages == "reserved") and "pid" not in jail.probe().namespaces:
        raise HostLacks("this host lets no machine share its RAM: there are no pid namespaces", hint="see `trivisor doctor`")


def empty(stack: ExitStack, size: int, *, in_huge_pages: bool = False) -> Ram:
    """Return empty RAM of `size` bytes that others can map, for a machine that is booted."""
    fd = os.memfd_create(_OWN, _flags(in_huge_pages))
    stack.callback(os.close, fd)
    if in_huge_pages:
        huge.reserve(fd, size)
    else:
        os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SIZED)
    return Ram("shared", fd=fd)


def _flags(in_huge_pages: bool) -> int:
    return os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | (os.MFD_HUGETLB | os.MFD_HUGE_2MB if in_huge_pages else 0)


class _Filling:
    """A memfd that a thread fills from the ice; `finish` waits for that and seals it."""

    def __init__(
        self, name: str, frozen: Ice, seals: int = _SEALS, *, in_huge_pages: bool = False, ready: Callable[[], None] | None = None
    ) -> None:
        self._seals = seals
        self._huge = in_huge_pages
        self.fd = os.memfd_create(name, _flags(in_huge_pages))
        self._ready = ready
        self._failure: OSError | TrivisorError | None = None
        # QEMU compares the size when it opens it, which may be before the thread has run.
        try:
            if in_huge_pages:
                huge.reserve(self.fd, frozen.facts.memory)
            else:
                os.ftruncate(self.fd, frozen.facts.memory)
        except BaseException:
            os.close(self.fd)
            raise
        self._thread = threading.Thread(target=self._fill, args=(frozen.ram,), name="filling RAM", daemon=True)
        self._thread.start()

    def _fill(self, ram: Path) -> None:
        try:
            if self._ready is not None:
                self._ready()
            with ram.open("rb") as source:
                (huge.fill if self._huge else files.copy_sparse)(source.fileno(), self.fd)
        except (OSError, TrivisorError) as error:
            self._failure = error

    def finish(self) -> None:
        """Raises StorageError if it could not be filled."""
        self._thread.join()
        try:
            if self._failure is not None:
                raise self._failure
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, self._seals)
        except OSError as error:
            raise files.storage(error, "loading the ice") from error

    def close(self) -> None:
        self._thread.join()
        os.close(self.fd)


def _shared(home: Home, name: str, frozen: Ice) -> int | None:
    """Open the sealed RAM of this ice that another machine of this home has, if one has."""
    for folder in home.machines.iterdir():
        pid = runner.engine(MachineDir(folder))
        if pid is None:
            continue
        with contextlib.suppress(OSError):
            for path in Path(f"/proc/{pid}/fd").iterdir():
                if str(path.readlink()) == f"/memfd:{name} (deleted)":
                    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
                    if _whole(fd, frozen):
                        return fd
                    os.close(fd)
    return None


def _whole(fd: int, frozen: Ice) -> bool:
    """Whether it is what `_sealed` makes: the name alone proves nothing, the seals and their being ours do."""
    stat = os.fstat(fd)
    seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    return stat.st_uid == os.geteuid() and stat.st_size == frozen.facts.memory and seals & _SEALS == _SEALS
