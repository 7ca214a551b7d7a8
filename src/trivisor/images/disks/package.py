"""Packages: an envelope (ovf.py), the files that it names and a manifest of their digests, in a tar (OVA) or side by side (OVF).

Nothing of a tar is unpacked by its names: its members are found first, checked against the envelope, and disks are copied out one by
one into a workspace, their digest counted on the way (DMTF DSP0243, "OVF package").
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import stat
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from trivisor.core.errors import ImageError, InvalidSpec, NotFound, StorageError
from trivisor.core.units import TIB
from trivisor.images.disks import ovf, xmltree
from trivisor.images.disks.ovf import System
from trivisor.images.limits import DEFAULT
from trivisor.images.stream import Section
from trivisor.images.tarread import TarReader
from trivisor.store.faults import translated

SUFFIXES = (".ova", ".ovf")
_CHUNK = 1 << 20
_LIMITS = dataclasses.replace(DEFAULT, total=64 * TIB, entries=1000)
_MANIFEST = 1 << 20
_LINE = re.compile(r"(SHA1|SHA256|SHA512)\s*\((.{1,255})\)\s*=\s*([0-9A-Fa-f]{40,128})")
_DIGESTS: dict[str, Callable[[], hashlib._Hash]] = {"SHA1": hashlib.sha1, "SHA256": hashlib.sha256, "SHA512": hashlib.sha512}


def is_package(path: Path) -> bool:
    """Tell whether a file is a package by its name."""
    return path.suffix.lower() in SUFFIXES


@dataclass(frozen=True)
class _Member:
    size: int
    open: Callable[[], Section]


class Package:
    """An opened package: what it says of its machine, and its disks."""

    def __init__(self, name: str, envelope: str, members: dict[str, _Member]) -> None:
        self._name = name
        self._members = members
        data = self._whole(envelope, xmltree.MAX)
        self.system: System = ovf.read(data, f"{name}: {envelope}")
        self._digests = self._manifest(envelope.rpartition(".")[0] + ".mf")
        self._check(envelope, data)

    def disk(self, name: str, target: Path, most: int) -> None:
        """Copy a file of the package to the new file `target`, unpacked if it is packed, then of `most` bytes.

        Raises ImageError if it is not what the manifest says, StorageError.
        """
        kind, wanted = self._digests.get(name, ("SHA256", ""))
        count = _DIGESTS[kind]()
        stream = self._members[name].open()
        packed = any(file.gzip for file in self.system.files if file.name == name)
        with translated(target), target.open("xb") as file:
            unpacked = _Gunzip(file, most, self._bad) if packed else None
            while data := stream.read(_CHUNK):
                count.update(data)
                if unpacked is None:
                    file.write(data)
                else:
                    unpacked.write(data)
            if unpacked is not None:
                unpacked.close()
        if wanted and count.hexdigest() != wanted:
            raise self._damaged(name)

    def verify(self, names: set[str]) -> None:
        """Read the other files than `names`, and raise ImageError for one that is not what the manifest says."""
        for name, (kind, wanted) in self._digests.items():
            if name not in names:
                count, stream = _DIGESTS[kind](), self._members[name].open()
                while data := stream.read(_CHUNK):
                    count.update(data)
                if count.hexdigest() != wanted:
                    raise self._damaged(name)

    def _check(self, envelope: str, data: bytes) -> None:
        """Hold envelope, manifest and what is there against each other."""
        files = {file.name: file.size for file in self.system.files}
        for name, size in files.items():
            if name not in self._members:
                raise self._bad(f"its file {name} is not there", "copy the package again, with all of its files")
            if size not in (-1, self._members[name].size):
                raise self._bad(f"its file {name} has {self._members[name].size} bytes, not {size}", "copy it again")
        if self._digests:
            for name in (envelope, *files):
                if name not in self._digests:
                    raise self._bad(f"its manifest says nothing of {name}")
            for name in self._digests:
                if name != envelope and name not in files:
                    raise self._bad(f"its manifest names {name}, which it does not have")
            kind, wanted = self._digests.pop(envelope)
            if hashlib.new(kind, data).hexdigest() != wanted:
                raise self._damaged(envelope)

    def _manifest(self, name: str) -> dict[str, tuple[str, str]]:
        """Return what the manifest says: of each file the kind of digest and the digest."""
        found: dict[str, tuple[str, str]] = {}
        if name not in self._members:
            return found
        for number, line in enumerate(self._whole(name, _MANIFEST).decode("utf-8", "replace").splitlines(), 1):
            if not line.strip():
                continue
            match = _LINE.fullmatch(line.strip())
            if match is None or len(match[3]) != 2 * _DIGESTS[match[1]]().digest_size:
                raise self._bad(f"line {number} of its manifest makes no sense: {line[:100]!r}")
            if match[2] in found:
                raise self._bad(f"its manifest names {match[2]} twice")
            found[match[2]] = match[1], match[3].lower()
        if not found:
            raise self._bad("its manifest is empty")
        return found

    def _whole(self, name: str, most: int) -> bytes:
        member = self._members.get(name)
        if member is None:
            raise self._bad(f"{name} is not there")
        if member.size > most:
            raise self._bad(f"{name} is over {most} bytes")
        stream, data = member.open(), b""
        while part := stream.read(_CHUNK):
            data += part
        if len(data) != member.size:
            raise self._bad(f"it ends within {name}", "copy it again")
        return data

    def _damaged(self, name: str) -> ImageError:
        return self._bad(f"{name} is not what the manifest says: it was damaged, or changed", "copy the package again")

    def _bad(self, why: str, hint: str = "") -> ImageError:
        return ImageError(f"{self._name}: {why}", hint=hint)


class _Gunzip:
    """Writes what a gzip member of at most `most` bytes holds to `file`."""

    def __init__(self, file: IO[bytes], most: int, bad: Callable[[str], ImageError]) -> None:
        self._file, self._left, self._bad = file, most, bad
        self._inflate = zlib.decompressobj(31)

    def write(self, data: bytes) -> None:
        try:
            while data and not self._inflate.eof:
                out = self._inflate.decompress(data, _CHUNK)
                data = self._inflate.unconsumed_tail
                self._left -= len(out)
                if self._left < 0:
                    raise self._bad("a file that it has packed is larger than a disk may be")
                self._file.write(out)
        except zlib.error as error:
            raise self._bad(f"a file cannot be unpacked: {error}") from error

    def close(self) -> None:
        if not self._inflate.eof:
            raise self._bad("a file that it has packed was cut")


@contextmanager
def opened(path: Path) -> Iterator[Package]:
    """Open the package at `path`: an .ova, or an .ovf with its files beside it. Raises NotFound, InvalidSpec, ImageError."""
    if not is_package(path):
        raise InvalidSpec(f"{path.name} is no package", hint="a package is an .ova, or an .ovf with its files beside it")
    if not path.is_file():
        raise NotFound(f"there is no package {path}")
    try:
        if path.suffix.lower() == ".ova":
            with path.open("rb") as file:
                envelope, members = _members(file.fileno(), path.name)
                found = Package(path.name, envelope, members)
                _ordered(found.system, envelope, list(members), path.name)
                yield found
            return
        fds: dict[str, int] = {}
        try:
            yield Package(path.name, path.name, _beside(path, fds))
        finally:
            for fd in fds.values():
                os.close(fd)
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror or error}") from error


def _members(fd: int, name: str) -> tuple[str, dict[str, _Member]]:
    """Return the envelope's name and all members of a tar. Raises ImageError."""
    whole = Section(fd, 0, os.fstat(fd).st_size, name)
    members: dict[str, _Member] = {}
    for entry in TarReader(whole, _LIMITS):
        if entry.kind != "f" or entry.sparse is not None:
            raise ImageError(f"{name}: {entry.name[:200]!r} is not a plain file", hint="a package holds files alone")
        if not ovf.NAME.fullmatch(entry.name):
            raise ImageError(f"{name}: {entry.name[:200]!r} is no name of a file in a package", hint="a package has no folders")
        if entry.name in members:
            raise ImageError(f"{name}: there are two files {entry.name}")
        members[entry.name] = _Member(entry.stored, _opener(whole, entry.position, entry.stored, entry.name))
    first = next(iter(members), "")
    if not first.lower().endswith(".ovf"):
        raise ImageError(f"{name}: it does not begin with an envelope (.ovf)", hint="the envelope is the first member of an OVA")
    return first, members


def _opener(whole: Section, position: int, size: int, name: str) -> Callable[[], Section]:
    return lambda: whole.part(position, size, name)


def _ordered(system: System, envelope: str, names: list[str], what: str) -> None:
    """Check that members lie as they must: envelope, files as the envelope lists them; manifest and certificate before those or after."""
    stem = envelope.rpartition(".")[0]
    signed = [name for name in names if name in (f"{stem}.mf", f"{stem}.cert")]
    files = [file.name for file in system.files]
    orders = ([envelope, *signed, *files], [envelope, *files, *signed])
    if extra := [name for name in names if name not in (envelope, *signed, *files)]:
        raise ImageError(f"{what}: it holds {extra[0]}, which its envelope does not name")
    if names not in orders or signed != sorted(signed, reverse=True):
        raise ImageError(f"{what}: its files are not in the order of its envelope", hint="have it packed again: tar in that order")


def _beside(path: Path, fds: dict[str, int]) -> dict[str, _Member]:
    """Return the envelope and what it could name: plain files of its folder, opened without following links."""
    members: dict[str, _Member] = {}
    with path.open("rb") as file:
        data = file.read(xmltree.MAX + 1)
    wanted = [path.name, path.stem + ".mf", *(entry.name for entry in ovf.read(data, path.name).files)]
    for name in wanted:
        try:
            fd = os.open(path.parent / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
        except FileNotFoundError:
            continue  # what must be there is asked for later
        except OSError as error:
            raise ImageError(
                f"{path.name}: {name} cannot be read: {error.strerror}", hint="a package holds plain files, no links"
            ) from error
        fds[name] = fd
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ImageError(f"{path.name}: {name} is not a plain file", hint="a package holds files alone")
        size = os.fstat(fd).st_size
        members[name] = _Member(size, _opener(Section(fd, 0, size, name), 0, size, name))
    return members
