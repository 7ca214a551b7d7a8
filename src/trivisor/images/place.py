"""From a layer's tar to a folder on the disk: first its files, by number; then each to where the Delta says.

`stage` reads a layer once, forward, and writes each file's bytes to a file that has a number for its name, so that no name of an
archive meets the host before all of the layer was judged (delta.py). `write` makes the folders and puts the files there, each by its
last name within an open folder that it made itself: no path is looked up, and no link can be in its way.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event

from trivisor.images.delta import HIDDEN, Delta, Laid, laid
from trivisor.images.layer import kept
from trivisor.images.limits import Limits
from trivisor.images.stream import PIECE, Hashed, truncated
from trivisor.images.tarread import Entry, Meter, TarReader
from trivisor.images.tree import Node

_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_SETID = stat.S_ISUID | stat.S_ISGID
OPAQUE = "user.overlay.opaque"


@dataclass
class Owners:
    """To whom files are given: to those whom the image says, if it is root who unpacks, of the host or of a user namespace.

    `lost` is set where one was not to be had: an id that the namespace does not have.
    """

    kept: bool
    lost: bool = False

    def give(self, fd: int, uid: int, gid: int) -> None:
        """Give an open file or folder to its owner."""
        self._tried(lambda: os.fchown(fd, uid, gid))

    def give_at(self, name: str, folder: int, uid: int, gid: int) -> None:
        """The same, by its name in an open folder; a link is not followed."""
        self._tried(lambda: os.chown(name, uid, gid, dir_fd=folder, follow_symlinks=False))

    def _tried(self, change: Callable[[], None]) -> None:
        if not self.kept:
            self.lost = True
            return
        try:
            change()
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self.lost = True


@dataclass
class Staged:
    """A layer that was read: its entries in order, those of files with their number as position, and what the whole tar's digest is."""

    folder: Path
    entries: list[Entry] = field(default_factory=list)
    digest: str = ""


def stage(stream: Hashed, folder: Path, limits: Limits, meter: Meter, stop: Event, owners: Owners) -> Staged:
    """Write the files of a layer to the new `folder`.

    It ends soon after `stop` is set, with half of them. Raises ImageError, OSError.
    """
    folder.mkdir(mode=0o700)
    staged = Staged(folder)
    place = os.open(folder, _FOLDER)
    try:
        for entry in TarReader(stream, limits, meter):
            if stop.is_set():
                return staged
            if entry.kind == "f":
                number = len(staged.entries)
                _store(stream, entry, str(number), place, owners)
                entry.position = number
            staged.entries.append(entry)
        staged.digest = stream.digest()
    finally:
        os.close(place)
        stream.close()
    return staged


def _store(stream: Hashed, entry: Entry, name: str, place: int, owners: Owners) -> None:
    file = os.open(name, _NEW, 0o600, dir_fd=place)
    try:
        if entry.sparse is None:
            _copy(stream, file, entry.stored)
        else:
            os.truncate(file, entry.size)
            for offset, length in entry.sparse:
                os.lseek(file, offset, os.SEEK_SET)
                _copy(stream, file, length)
        _dress(file, entry.mode, entry.uid, entry.gid, entry.mtime, kept(entry.xattrs), owners)
    finally:
        os.close(file)


def _copy(stream: Hashed, file: int, size: int) -> None:
    while size:
        data = stream.read(min(size, PIECE))
        if not data:
            raise truncated(stream.name, "the data of a file")
        size -= len(data)
        view = memoryview(data)
        while view:
            view = view[os.write(file, view) :]


def _dress(fd: int, mode: int, uid: int, gid: int, mtime: int, xattrs: dict[str, bytes], owners: Owners) -> None:
    """Give an open file or folder what the layer says of it. Owners first: a change of them takes setuid bits and capabilities away."""
    owners.give(fd, uid, gid)
    os.fchmod(fd, mode if owners.kept else mode & ~_SETID)
    for name, value in xattrs.items():
        if owners.kept or name.startswith("user."):
            os.setxattr(fd, name, value)
    os.utime(fd, (mtime, mtime))


def write(delta: Delta, staged: Staged, target: Path, owners: Owners) -> None:
    """Make the folder `target` of what the layer changes; the staged files are moved into it. Raises ImageError, OSError."""
    target.mkdir(mode=0o700)
    source = os.open(staged.folder, _FOLDER)
    try:
        _Writer(delta, source, owners).write(os.open(target, _FOLDER))
    finally:
        os.close(source)


class _Writer:
    def __init__(self, delta: Delta, source: int, owners: Owners) -> None:
        self._delta = delta
        self._source = source
        self._owners = owners

    def write(self, top: int) -> None:
        """Fill the open folder `top` and close it. One folder is open at a time, however deep they are."""
        wanted = _wanted(self._delta.root)
        path: list[tuple[Laid, list[tuple[str, Laid]]]] = [(laid(self._delta.root), self._files(top, self._delta.root, wanted))]
        here = top
        try:
            while path:
                node, folders = path[-1]
                if folders:
                    name, child = folders.pop()
                    os.mkdir(name, 0o700, dir_fd=here)
                    below = os.open(name, _FOLDER, dir_fd=here)
                    os.close(here)
                    here = below
                    path.append((child, self._files(here, child, wanted)))
                    continue
                if node.opaque and len(path) > 1:
                    os.setxattr(here, OPAQUE, b"y")
                _dress(here, node.mode, node.uid, node.gid, node.mtime, node.xattrs, self._owners)
                path.pop()
                if path:
                    above = os.open("..", _FOLDER, dir_fd=here)
                    os.close(here)
                    here = above
        finally:
            os.close(here)

    def _files(self, here: int, folder: Node, wanted: set[int]) -> list[tuple[str, Laid]]:
        """Make what is in the open folder but for folders, which are returned."""
        folders = []
        for name, child in laid(folder).children.items():
            node = laid(child)
            if node.kind == "d":
                if id(node) in wanted:
                    folders.append((name, node))
            elif not node.borrowed:
                self._make(here, name, node)
        return folders

    def _make(self, here: int, name: str, node: Laid) -> None:
        if node.kind == HIDDEN:
            try:
                os.mknod(name, stat.S_IFCHR, 0, dir_fd=here)
            except PermissionError as error:  # by a file system that is an overlay itself
                raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP)) from error
            return
        if node.place is not None:  # a file of an unpacked layer gets another name
            os.link(node.place, name, dst_dir_fd=here, follow_symlinks=False)
            return
        if node.kind == "f":
            if node.content is None:
                raise self._delta.bad(name, "has no content")
            number = str(node.content.position)
            if id(node) in self._delta.shared:
                os.link(number, name, src_dir_fd=self._source, dst_dir_fd=here, follow_symlinks=False)
            else:
                os.rename(number, name, src_dir_fd=self._source, dst_dir_fd=here)
            return
        if node.kind == "l":
            os.symlink(node.target, name, dir_fd=here)
        else:
            os.mkfifo(name, 0o600, dir_fd=here)
        self._owners.give_at(name, here, node.uid, node.gid)
        if node.kind == "p":
            os.chmod(name, node.mode if self._owners.kept else node.mode & ~_SETID, dir_fd=here)
        os.utime(name, (node.mtime, node.mtime), dir_fd=here, follow_symlinks=False)


def _wanted(root: Node) -> set[int]:
    """Return the ids of the folders that this layer says something about, or about what is in them."""
    order = [laid(root)]
    for node in order:
        order += [laid(child) for child in node.children.values() if child.kind == "d"]
    wanted: set[int] = set()
    for node in reversed(order):
        below = any(id(child) in wanted if child.kind == "d" else not laid(child).borrowed for child in node.children.values())
        if below or not node.borrowed:
            wanted.add(id(node))
    return wanted
