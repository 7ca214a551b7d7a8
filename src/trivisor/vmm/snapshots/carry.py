"""A snapshot as one file: written to be restored in another home, on another host; read as what a stranger may have written.

    magic, length of the head, head (JSON), list, pack

The pack is made for it, and holds nothing but this snapshot. The image is not in it: it has its own ways, and must be there. What the head
says is checked, and this host looked at, before anything is written; then digest by digest what follows. What a spec could open of this
host is left out: folders, host addresses, networks of the home.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import struct
import time
from pathlib import Path
from typing import BinaryIO

import msgspec

from trivisor.core import spec as specs
from trivisor.core.errors import AlreadyExists, HostLacks, InvalidSpec, NotFound, StorageError, TrivisorError
from trivisor.core.files import sha256
from trivisor.core.spec import HOST_IMAGE, Spec
from trivisor.core.state import State
from trivisor.core.undo import Undo
from trivisor.core.units import GIB
from trivisor.store.faults import translated
from trivisor.vmm.context import Context
from trivisor.vmm.records import Row
from trivisor.vmm.snapshots import keeping, model, packed, packing, thawing
from trivisor.vmm.snapshots.model import About, Kept, Kind
from trivisor.vmm.snapshots.packing import Manifest, Pack
from trivisor.vmm.snapshots.pieces import Reader

_MAGIC = b"TRVSNAP1"
_LENGTH = struct.Struct("<I")
_MAX_HEAD = 1 << 22
_FORMAT = 1
_ROOM = 20 * GIB
_KERNELS = ("micro", "full")


class Head(msgspec.Struct, frozen=True, kw_only=True):
    """What the file says of itself."""

    format: int
    ref: str
    created: float
    digest: str
    spec: Spec
    about: About
    root: str = ""
    """SHA-256 of the root's file, which the guest of a virtual machine with memory has mounted: layers may be squashed to other bytes."""
    list: tuple[str, int]
    """Digest and size."""
    pack: tuple[Pack, int] | None
    """And its size; None where there is no byte in any file."""


def write(context: Context, kept: Kept, target: Path) -> None:
    """Write a snapshot into the new file `target`; nothing is left there if that ends early. Raises AlreadyExists, StorageError."""
    packed.ready(context, kept)
    with packed.store(context).workspace() as work, translated(work.path):
        new, entries = packed.pack(context, kept, work, [])
        packs = [new] if new else []
        listed = packing.encode(Manifest(packing.FORMAT, packs, entries))
        (work.path / "list").write_bytes(listed)
        head = Head(
            format=_FORMAT,
            ref=kept.ref or "",
            created=kept.created,
            digest=kept.digest,
            spec=kept.spec,
            about=msgspec.structs.replace(kept.about, manifest=""),
            root=_root(context, kept.digest, kept.spec, kept.about),
            list=(_digest(work.path / "list"), len(listed)),
            pack=(packs[0], (work.path / "pack").stat().st_size) if packs else None,
        )
        _place(target, head, listed, work.path / "pack" if packs else None)


def _place(target: Path, head: Head, listed: bytes, pack: Path | None) -> None:
    aside = target.with_name(f".{target.name}.{os.getpid()}")
    said = msgspec.json.encode(head)
    try:
        with translated(target), aside.open("xb") as file:
            file.write(_MAGIC + _LENGTH.pack(len(said)) + said + listed)
            if pack is not None:
                with pack.open("rb") as source:
                    shutil.copyfileobj(source, file, 1 << 20)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(aside, target)
        except FileExistsError as error:
            raise AlreadyExists(f"{target} is there already", hint="give another file") from error
        except OSError as error:
            raise StorageError(f"{target} cannot be written: {error.strerror}") from error
    finally:
        aside.unlink(missing_ok=True)


def read(context: Context, source: Path, ref: str | None) -> Kept:
    """Take the snapshot in a file, under its name or `ref`. Raises what Snapshots.import_ raises."""
    with contextlib.ExitStack() as stack:
        with translated(source):
            file = stack.enter_context(source.open("rb"))
        head = _head(file, str(source))
        row = _suits(context, head, ref or head.ref)
        undo = stack.enter_context(Undo())
        about = msgspec.structs.replace(head.about, manifest="")
        kept = keeping.begin(context, row, Kind.SNAPSHOT, ref=ref or head.ref, about=about)
        undo.add("frozen", lambda: keeping.drop(context, kept.id))
        blobs = packed.store(context)
        work = stack.enter_context(blobs.workspace())
        listed = _take(file, head.list[1], str(source))
        with translated(work.path):
            (work.path / "list").write_bytes(listed)
        if _digest(work.path / "list") != head.list[0]:
            raise _bad(source)
        manifest = packing.checked(packing.decode(listed, str(source)))
        wanted = [head.pack[0]] if head.pack else []
        if manifest.packs != wanted or packed.held(manifest.entries) > _most(head.spec):
            raise _bad(source)
        if head.pack:
            blobs.add(_Part(file, head.pack[1]), work.owner, expected=head.pack[0].digest)
            with Reader(blobs.locate(head.pack[0].digest), head.pack[0].index) as reader:
                if len(reader) != head.pack[0].pieces:
                    raise _bad(source)
        if file.read(1):
            raise _bad(source)
        digest = packed.put(blobs, work, manifest, kept.id)
        kept = msgspec.structs.replace(kept, about=msgspec.structs.replace(about, manifest=digest, size=packed.held(manifest.entries)))
        # Made anew from what came, so that it is known to be whole.
        keeping.plain(context, kept.id).rmdir()
        packed.ready(context, kept)
        done = keeping.finish(context, kept, kept.about)
        undo.keep()
    return done


def _head(file: BinaryIO, origin: str) -> Head:
    start = file.read(len(_MAGIC) + _LENGTH.size)
    if len(start) < len(_MAGIC) + _LENGTH.size or not start.startswith(_MAGIC):
        raise StorageError(f"{origin} is no snapshot", hint="write one with `trivisor snapshots export`")
    (length,) = _LENGTH.unpack(start[len(_MAGIC) :])
    if length > _MAX_HEAD:
        raise _bad(Path(origin))
    try:
        head = msgspec.json.decode(_take(file, length, origin), type=Head)
    except msgspec.MsgspecError as error:
        raise _bad(Path(origin)) from error
    if head.format != _FORMAT:
        raise StorageError(f"{origin} was written by another version of trivisor", hint="use that version")
    return head


def _suits(context: Context, head: Head, ref: str) -> Row:
    """Return what its machine is taken to have been, if it could run here. Raises InvalidSpec, NotFound, HostLacks."""
    machine, _, name = ref.partition("@")
    model.check_name(name)
    model.check_words(head.about.note, head.about.tags)
    spec = _bounded(head.spec, machine)
    if not context.images.store.exists(head.digest):
        raise NotFound(f"its image {spec.image} ({head.digest[:19]}) is not here", hint=f"get it first: trivisor pull {spec.image}")
    row = Row(
        id=f"import-{os.urandom(4).hex()}", name=spec.name, slot=0, spec=spec, digest=head.digest, state=State.STOPPED, created=time.time()
    )
    engine = thawing.freezer(context, spec.wall, spec.name, "go on from a snapshot", memory=head.about.memory)
    context.engine(spec.wall).check(spec)
    engine.fits(context.box(row), head.about.needs)
    if head.root != _root(context, head.digest, spec, head.about):
        raise HostLacks(
            "the image's root, as it was made here, is not byte for byte what the guest has mounted",
            hint="use the same squashfs-tools on both hosts, or export a snapshot without memory",
        )
    return row


def _root(context: Context, digest: str, spec: Spec, about: About) -> str:
    return _digest(context.images.rootfs(digest)) if spec.wall == "vm" and about.memory else ""


def _bounded(spec: Spec, name: str) -> Spec:
    """Return a stranger's spec without what it could open of this host. Raises InvalidSpec."""
    if spec.image == HOST_IMAGE or spec.kernel not in _KERNELS:
        raise InvalidSpec("a snapshot on the root, or with a kernel, of the host it was made on cannot be brought elsewhere")
    network = spec.network if spec.network in ("none", "nat") else "nat" if spec.network != "host" else "none"
    return specs.checked(
        msgspec.structs.replace(
            spec, name=name, volumes={}, reach=(), cut=(), cpuset=None, io=None, lifetime="persistent", network=network, ports={}
        )
    )


def _most(spec: Spec) -> int:
    return _ROOM + 2 * spec.memory + (spec.disk if isinstance(spec.disk, int) else 0)


class _Part:
    """The next bytes of a file, as a stream of their own."""

    def __init__(self, file: BinaryIO, left: int) -> None:
        self._file = file
        self._left = left

    def read(self, size: int, /) -> bytes:
        data = self._file.read(max(0, min(size, self._left)))
        self._left -= len(data)
        return data


def _take(file: BinaryIO, size: int, origin: str) -> bytes:
    data = file.read(size) if 0 <= size <= packing.MAX_MANIFEST else b""
    if len(data) != size:
        raise _bad(Path(origin))
    return data


def _digest(path: Path) -> str:
    return f"sha256:{sha256(path)}"


def _bad(source: Path) -> TrivisorError:
    return StorageError(f"{source} is damaged, or no snapshot of ours", hint="write it again with `trivisor snapshots export`")
