"""Freezing a container: its files. What runs in it is the host's kernel's, and cannot be taken along.

    layer/    what its programs changed of the image's root, with the ids that they see: whiteouts, owners, attributes and all

A frozen layer is never written again, so that machines made from it need no copy: it lies between the image and their own layer, which
is empty. `layers/below` in a machine's folder is a link to it, in the very folder that is exchanged as a whole for another, so that a layer
and what it lies over are never of two minds. A machine that lies over a frozen layer is frozen into one that holds that too, by hard links.

The machine stands still while its layer is copied (guest/src/copy.c), by a process that is root of the machine's ids alone and sees nothing
but the two folders, the new one by an idmapped mount where machines have ids of their own. If we die meanwhile, a shell that waits for that
lets the machine go on.
"""

from __future__ import annotations

import os
import shutil
import stat
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from trivisor.core import process
from trivisor.core.errors import EngineError, HostLacks, StorageError, UnsupportedByWall
from trivisor.core.undo import Undo
from trivisor.launch import ids, keeper, once, tvinit
from trivisor.launch.cgroups import Cgroup
from trivisor.launch.ids import Shape
from trivisor.launch.plan import Op
from trivisor.vmm import frozen_layers, layers, removal
from trivisor.vmm.engine import Box
from trivisor.vmm.freezer import Frozen

LAYER = "layer"
_TOP = "top"
_TIMEOUT = 1800.0
_OPAQUE = ("user.overlay.opaque", "trusted.overlay.opaque")


def freeze(box: Box, into: Path, *, memory: bool, lasting: bool) -> Frozen:
    """Freeze the machine's layer into the folder `into`, as Freezer.freeze says."""
    if memory:
        raise UnsupportedByWall("freeze a machine's memory", "container", ("vm", "gvisor"), machine=box.spec.name)
    frozen_layers.possible(box)
    shape = layers.shape(box)
    if layers.sized(box.spec) or box.host_root:
        with _still(box) as stood:
            frozen_layers.keep(box, shape, into, lasting=lasting)
        return Frozen({"layer": _form(box)}, stood[0])
    with _still(box) as stood:
        below, place = _take(box, shape, into)
    if below is not None:
        merge(below, place, into / LAYER, shape)
    if lasting:
        _settle(into)
    return Frozen({"layer": "files", "ids": "inside" if shape.ids(0).mapped or os.geteuid() == 0 else shape.kind}, stood[0])


def whole(box: Box, shape: Shape, into: Path) -> None:
    """Make `layer` in the folder `into` of a machine that stands still."""
    below, place = _take(box, shape, into)
    if below is not None:
        merge(below, place, into / LAYER, shape)


def _take(box: Box, shape: Shape, into: Path) -> tuple[Path | None, Path]:
    """Copy the machine's own layer into the folder `into`; return what it lies over, and the copy."""
    below = layers.below(box)
    place = into / (LAYER if below is None else _TOP)
    try:
        place.mkdir(mode=0o755)
    except OSError as error:
        raise StorageError(f"{place} cannot be made: {error.strerror}", machine=box.spec.name, hint="free space under the home") from error
    _copy(box, shape, box.dir.root / "layers" / "root" / "upper", place)
    return below, place


def fits(box: Box, needs: Mapping[str, str]) -> None:
    """Raise what Freezer.fits raises."""
    shape = layers.shape(box)
    here = {"layer": _form(box), "ids": "inside" if shape.ids(0).mapped or os.geteuid() == 0 else shape.kind}
    for word, wanted in needs.items():
        if here.get(word) != wanted:
            hint = (
                "restore it as the user, and on a host, that gives machines the same ids" if word == "ids" else "make it of the same disk"
            )
            raise HostLacks(f"it was frozen with {word} {wanted}, and here is {here.get(word, 'none')}", machine=box.spec.name, hint=hint)


def refill(box: Box, frozen: Path, undo: Undo) -> None:
    """Have the machine lie over what was frozen, with nothing of its own: all of it or what was there."""
    shape = layers.shape(box)
    if layers.sized(box.spec) or box.host_root:
        frozen_layers.give(box, shape, frozen, undo)
        return
    if not (frozen / LAYER).is_dir():
        raise StorageError(f"the frozen layer {frozen / LAYER} is gone", machine=box.spec.name, hint="freeze the machine anew")
    place = box.dir.root / "layers"
    aside = place.with_name("layers.new")
    undo.add("layer", lambda: removal.remove_tree(aside))
    removal.remove_tree(aside)
    layers.make_over(box, aside, frozen / LAYER, shape.ids(box.slot).owner)
    frozen_layers.exchange(aside, place)
    removal.remove_tree(aside)


def merge(below: Path, top: Path, into: Path, shape: Shape) -> None:
    """Make `into` of the layer `below` and what lies over it in `top`, which it uses up, as overlayfs would show both.

    The two, `into` among them, lie in one file system, and what is not written again is one file in both. Raises StorageError, EngineError.
    """
    try:
        if os.geteuid() == 0 or shape.kind == "single":
            _merge(below, top, into)
        else:
            ids.run_as_root([sys.executable, "-m", __name__, str(below), str(top), str(into)], _TIMEOUT)
    except (OSError, shutil.Error) as error:
        raise StorageError(f"{into} cannot be made: {error}", hint="free space under the home") from error


def _merge(below: Path, top: Path, into: Path) -> None:
    _link(below, into)
    _lay(top, into)
    removal.remove_tree(top)


def _link(source: Path, target: Path) -> None:
    """Make `target` a tree of folders like those of `source`, of the same files."""
    process.run([process.find("cp", "coreutils"), "-al", "--no-target-directory", source, target], timeout=_TIMEOUT)


def _lay(top: Path, into: Path) -> None:
    """Lay the files of `top` over those of `into`."""
    _like(top, into)
    for entry in os.scandir(top):
        target = into / entry.name
        there = os.path.lexists(target)
        if entry.is_dir(follow_symlinks=False):
            if there and not stat.S_ISDIR(target.lstat().st_mode):
                target.unlink()
                there = False
            if there and any(_attribute(entry.path, name) == b"y" for name in _OPAQUE):
                removal.remove_tree(target)
                there = False
            if not there:
                _link(Path(entry.path), target)
                continue
            _lay(Path(entry.path), target)
            continue
        if there:
            removal.remove_tree(target) if stat.S_ISDIR(target.lstat().st_mode) else target.unlink()
        os.link(entry.path, target, follow_symlinks=False)
    _times(top, into)


def _like(source: Path, target: Path) -> None:
    """Give a folder owner, rights and attributes of another."""
    facts = source.lstat()
    os.chown(target, facts.st_uid, facts.st_gid)
    target.chmod(stat.S_IMODE(facts.st_mode))
    names = os.listxattr(source)
    for name in os.listxattr(target):
        # What was opaque below stays so: it hides what is below that.
        if name not in names and name not in _OPAQUE:
            os.removexattr(target, name)
    for name in names:
        os.setxattr(target, name, os.getxattr(source, name))


def _times(source: Path, target: Path) -> None:
    facts = source.lstat()
    os.utime(target, ns=(facts.st_atime_ns, facts.st_mtime_ns))


def _attribute(path: str, name: str) -> bytes:
    try:
        return os.getxattr(path, name, follow_symlinks=False)
    except OSError:
        return b""


def _copy(box: Box, shape: Shape, source: Path, target: Path) -> None:
    """Copy what the machine wrote, as it sees it, to the empty folder `target`. Raises EngineError."""
    own, program = shape.ids(box.slot), str(tvinit.path())
    plan: list[Op] = [("namespaces", "user", "mount"), *own.plan(), ("root", "/"), ("bind", program, program, "ro,exec")]
    plan += [("bind", str(source), "/from", "ro,alone"), ("bind", str(target), "/to", "rw,alone,idmap" if own.mapped else "rw,alone")]
    plan += [("pivot",), ("exec", program, "copy", "/from", "/to")]
    done = once.run(tuple(plan), _TIMEOUT)
    if done.status:
        said = done.said.strip()
        if "No space left" in said:
            raise StorageError(f"{target} cannot be written: {said}", machine=box.spec.name, hint="free space under the home")
        raise EngineError("its files cannot be copied", command=["tvinit", "copy"], status=done.status, output=said, machine=box.spec.name)


@contextmanager
def _still(box: Box) -> Iterator[list[float]]:
    """Have the machine stand still, if it runs; the seconds for which it did are in the list afterwards."""
    stood = [0.0]
    group = Cgroup.find(box.home, box.id) if keeper.alive(box.dir) else None
    if group is None or group.frozen:
        yield stood
        return
    with group.thawed_without_us():
        began = time.monotonic()
        group.freeze()
        try:
            yield stood
        finally:
            group.thaw()
            stood[0] = time.monotonic() - began


def _settle(folder: Path) -> None:
    """Have the disk hold it all."""
    process.run([process.find("sync", "coreutils"), "--file-system", folder], timeout=_TIMEOUT)


def _form(box: Box) -> str:
    return "disk" if layers.sized(box.spec) else "host" if box.host_root else "files"


if __name__ == "__main__":
    os.environ.setdefault("PATH", "/usr/bin:/bin")  # it is started without any environment
    _merge(*map(Path, sys.argv[1:4]))
