"""Making ice: run a machine that is nobody's until it is where a clone should begin, and freeze it.

blank   the kernel has booted, drivers are bound to dummy disks whose buffers have been flushed; nothing is mounted. It
        serves any image: a clone's real disks lie where the dummies were.
image   a clone of the blank one that has mounted an image's root over a pristine writable layer and run a command. It is
        made at an image's second start in a shape: an image that runs only once costs no more than itself.

The machine runs in a folder of its own under home.tmp, jailed like any other, tied to this process.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from trivisor.core.errors import EngineError, GuestError
from trivisor.core.paths import Home, MachineDir
from trivisor.images import stacked
from trivisor.launch import keeper, tvinit
from trivisor.vmm.engine import Progress
from trivisor.vmm.engines.vm import argv, disks, files, ice, runner
from trivisor.vmm.engines.vm.ice import Ice
from trivisor.vmm.engines.vm.qmp import Qmp
from trivisor.vmm.engines.vm.runner import Ram, Setup, Work
from trivisor.vos import guest
from trivisor.vos.line import Line

ROOT_DISK, UPPER_DISK = "/dev/vda", "/dev/vdb"
_SLOT = 99_000_000
"""Above every machine's slot; each maker adds its pid, so that two of them do not share an id either."""
_WARM = (("/bin/true",), ("/bin/sh", "-c", ":"), ("python3", "-c", "pass"), ("/bin/ls", "/etc/trivisor/after-clone.d"))
"""What is likely to be run first, and the look-up that each clone begins with."""
_STEPS = 60.0


@dataclass(frozen=True)
class Image:
    """What an image ice is of: the squashfs, and the size of the writable layer (None: in RAM)."""

    rootfs: Path
    digest: str
    disk: int | None


def blank_key(setup: Setup) -> str:
    return ice.key("blank", setup.qemu.identity, setup.kit.digest, tvinit.digest(), _argv(setup))


def image_key(setup: Setup, image: Image) -> str:
    return ice.key("image", blank_key(setup), image.digest, image.disk)


def mount_steps(rootfs: Path, upper: bool) -> list[Sequence[str]]:
    """Return the steps that make the disks, of which the first is `rootfs`, the guest's root. Raises StorageError, ImageError."""
    try:
        offsets = stacked.pieces(rootfs)
    except OSError as error:
        raise files.storage(error, "reading the image's root") from error
    return [("root", ROOT_DISK, UPPER_DISK if upper else "ram", *map(str, offsets))]


def ensure_blank(home: Home, setup: Setup, progress: Progress) -> None:
    """Make the blank ice of this shape if it is not there. Raises EngineError, GuestError, StorageError."""
    name = blank_key(setup)
    if ice.find(home, name) is not None:
        return
    with ice.making(home, name, progress) as ours:
        if ours:
            progress("booting the machine that others are cloned from")
            _make_blank(home, setup, name)


def ensure_image(home: Home, setup: Setup, image: Image, progress: Progress) -> None:
    """Make the ice of this image and shape if it is not there; the blank one must be."""
    name = image_key(setup, image)
    if ice.find(home, name) is not None:
        return
    with ice.making(home, name, progress) as ours, ice.using(home, blank_key(setup), progress) as blank:
        if ours and blank is not None:
            progress("preparing the image for quick starts")
            _make_image(home, setup, image, name, blank)


def _make_blank(home: Home, setup: Setup, name: str) -> None:
    with files.workspace(home, "ice") as folder:
        place, ram = _place(folder)
        with ram.open("wb") as stream:
            stream.truncate(setup.shape.memory)
        steps: list[Sequence[str]] = [("wait", ROOT_DISK), ("flush", ROOT_DISK)]
        if setup.shape.upper:
            steps += [("wait", UPPER_DISK), ("flush", UPPER_DISK)]
        with _running(setup, Work(place, _slot(), "blank ice", Ram("file", ram), owner=os.getpid()), steps) as qmp:
            ice.freeze(home, name, qmp, folder / "ice", ram, None, argv=_argv(setup), needs=_needs(setup))


def _make_image(home: Home, setup: Setup, image: Image, name: str, blank: Ice) -> None:
    with files.workspace(home, "ice") as folder:
        place, ram = _place(folder)
        files.copy_file(blank.ram, ram)
        disk = None
        if image.disk is not None:
            disk = place.disk
            disks.create(home, image.disk, disk)
        steps = [("seed", os.urandom(32).hex()), ("clock", str(time.time_ns())), *mount_steps(image.rootfs, disk is not None)]
        # Files that each clone writes over: making them is dearer, and would be done in every clone. The shortest name: to make a
        # file longer is cheap, to cut it is not.
        steps += [("hostname", "t"), ("machine-id", "0" * 32)]
        steps += [("warm", *words) for words in _WARM]
        steps.append(("sync",))
        work = Work(place, _slot(), "image ice", Ram("file", ram), state=blank.state, root=image.rootfs, disk=disk, owner=os.getpid())
        needs = {**_needs(setup), str(image.rootfs): ice.identity(image.rootfs)}
        with _running(setup, work, steps) as qmp:
            ice.freeze(home, name, qmp, folder / "ice", ram, disk, argv=_argv(setup), needs=needs)


def _place(folder: Path) -> tuple[MachineDir, Path]:
    place = MachineDir(folder / "machine")
    place.logs.mkdir(parents=True, mode=0o700)
    (folder / "ice").mkdir(mode=0o700)
    return place, folder / "ram"


@contextmanager
def _running(setup: Setup, work: Work, steps: Sequence[Sequence[str]]) -> Iterator[Qmp]:
    """Run a machine, have it carry out `steps`, and hand over its QMP with no client on its line."""
    try:
        try:
            runner.run(setup, work)
        except EngineError as error:
            if not setup.kit.modules:
                error.hint = f"{setup.kit.origin} has no modules here: it must have virtio, squashfs, overlayfs and ext4 built in"
            raise
        line = Line.connect(work.place.line, work.name)
        try:
            guest.configure(line, steps, timeout=_STEPS)
        except GuestError as error:
            error.add_note(work.place.log("serial").read_text(errors="replace")[-2000:])
            raise
        finally:
            line.close()
        with Qmp.connect(work.place.qmp, work.name) as qmp:
            yield qmp
    except (EngineError, GuestError) as error:
        # Its RAM is a file: QEMU is killed (SIGBUS) where that cannot grow, and says nothing.
        files.check_room(work.place.root, "making ice", error)
        raise
    finally:
        keeper.kill(work.place)


def _argv(setup: Setup) -> list[str]:
    """The command line that a shape's ice depends on, whatever is mounted and wherever it runs."""
    return argv.command(setup.qemu.path, setup.shape, "file", boot=True, blank=True)


def _needs(setup: Setup) -> dict[str, str]:
    kernel = setup.kit.kernel
    return {str(path): ice.identity(path) for path in (Path(setup.qemu.path), kernel, tvinit.path())}


def _slot() -> int:
    return _SLOT + os.getpid() % 1_000_000
