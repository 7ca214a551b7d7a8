"""File systems looked at from outside: a folder of the host, and an image's layers as overlayfs would show them.

A path is the view's own: links lead only within it, as in a chroot, and none of a host's is followed on the way. Nothing is mounted, so
whoever may read the layers may look. What a machine would see (overlayfs, "Whiteouts and opaque directories") is found by name.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Protocol

from trivisor.core.errors import ImageError
from trivisor.images.layer import kept

MAX_LINKS = 40
_KINDS = {stat.S_IFREG: "f", stat.S_IFDIR: "d", stat.S_IFLNK: "l", stat.S_IFIFO: "p"}


@dataclass(frozen=True)
class Node:
    """One file of a view. `path` is without links, and begins with no slash; "" is the top."""

    path: str
    kind: str
    """f, d, l, p; devices and sockets are not seen."""
    mode: int
    uid: int
    gid: int
    mtime: int
    """In ns since the epoch."""
    size: int
    place: Path
    target: str = ""
    """Of a symbolic link."""
    identity: tuple[int, int] = (0, 0)
    """The same for hard links of one file (device, inode)."""
    xattrs: dict[str, bytes] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Its last component."""
        return self.path.rpartition("/")[2]

    def open(self) -> BinaryIO:
        """Open a regular file for reading. Raises ImageError."""
        try:
            return os.fdopen(os.open(self.place, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
        except OSError as error:
            raise ImageError(f"{self.place}: {error.strerror}", hint="its owner or root can read it") from error


class View(Protocol):
    """What files are looked up in."""

    def at(self, path: str) -> Node | None:
        """Return the node at a path without links, None if there is none."""
        ...

    def names(self, node: Node) -> list[str]:
        """Return the names in a folder, sorted."""
        ...


def resolve(view: View, path: str, *, last: bool = True) -> Node | None:
    """Return the node that `path` leads to, through links; a link at its end is followed if `last`.

    None if it is not there, or its links lead in a circle.
    """
    found, missing = walk(view, path, last=last)
    return None if missing else found


def walk(view: View, path: str, *, last: bool = True) -> tuple[Node | None, list[str]]:
    """Follow `path` as far as it is there: the last node found, and the components that are missing below it.

    None for the node where links lead in a circle, or something that is no folder stands in the way.
    """
    node = view.at("")
    left = [part for part in path.split("/") if part not in ("", ".")]
    links = 0
    while left and node is not None:
        part = left.pop(0)
        if part == "..":
            node = view.at(node.path.rpartition("/")[0])
            continue
        if node.kind != "d":
            return None, [part, *left]
        below = view.at(f"{node.path}/{part}".lstrip("/"))
        if below is None:
            return node, [part, *left]
        if below.kind != "l" or not (left or last):
            node = below
            continue
        links += 1
        if links > MAX_LINKS:
            return None, [part, *left]
        if below.target.startswith("/"):
            node = view.at("")
        left = [step for step in below.target.split("/") if step not in ("", ".")] + left
    return node, left


def everything(view: View, top: Node) -> Iterator[Node]:
    """Yield `top` and all that is below it, folders before what is in them, by name."""
    yield top
    if top.kind == "d":
        for name in view.names(top):
            below = view.at(f"{top.path}/{name}".lstrip("/"))
            if below is not None:
                yield from everything(view, below)


class FolderView:
    """A folder of the host, without what `ignored` says of its relative paths."""

    def __init__(self, root: Path, ignored: Callable[[str], bool] | None = None) -> None:
        self.root = root
        self._ignored = ignored or (lambda _: False)
        self.whole = ignored is None
        """Whether all of the folder is seen."""

    def at(self, path: str) -> Node | None:
        if path and self._ignored(path):
            # A folder that is left out is still there for what is taken back from it.
            found = _node(self.root / path, path)
            return found if found is not None and found.kind == "d" and self._kept_below(path) else None
        return _node(self.root / path, path)

    def names(self, node: Node) -> list[str]:
        return _names(node.place)

    def _kept_below(self, path: str) -> bool:
        for folder, folders, files in os.walk(self.root / path):
            relative = os.path.relpath(folder, self.root)
            if any(not self._ignored(f"{relative}/{name}") for name in (*folders, *files)):
                return True
        return False


class StackView:
    """Unpacked layers, the top one first, as overlayfs shows them."""

    def __init__(self, lowers: Sequence[Path]) -> None:
        self._folders: dict[str, tuple[Path, ...]] = {"": tuple(lowers)}

    def at(self, path: str) -> Node | None:
        if not path:
            return _node(self._folders[""][0], "")
        parent, _, name = path.rpartition("/")
        for folder in self._stack(parent):
            place = folder / name
            try:
                facts = place.lstat()
            except OSError:
                continue
            return None if _whiteout(facts) else _node(place, path)
        return None

    def names(self, node: Node) -> list[str]:
        found: dict[str, bool] = {}
        for folder in self._stack(node.path):
            with os.scandir(folder) as entries:
                for entry in entries:
                    found.setdefault(entry.name, not _whiteout(entry.stat(follow_symlinks=False)))
        return sorted(name for name, there in found.items() if there)

    def _stack(self, path: str) -> tuple[Path, ...]:
        """Return the folders that are merged at `path`, top first."""
        known = self._folders.get(path)
        if known is not None:
            return known
        parent, _, name = path.rpartition("/")
        found: list[Path] = []
        for folder in self._stack(parent):
            place = folder / name
            try:
                facts = place.lstat()
            except OSError:
                continue
            if not stat.S_ISDIR(facts.st_mode):
                break
            found.append(place)
            if _opaque(place):
                break
        self._folders[path] = tuple(found)
        return self._folders[path]


def _whiteout(facts: os.stat_result) -> bool:
    return stat.S_ISCHR(facts.st_mode) and facts.st_rdev == 0


def _opaque(folder: Path) -> bool:
    for name in ("trusted.overlay.opaque", "user.overlay.opaque"):
        try:
            if os.getxattr(folder, name, follow_symlinks=False) == b"y":
                return True
        except OSError:
            continue
    return False


def _names(folder: Path) -> list[str]:
    try:
        return sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise ImageError(f"{folder}: {error.strerror}", hint="its owner or root can read it") from error


def _node(place: Path, path: str) -> Node | None:
    try:
        facts = place.lstat()
        kind = _KINDS.get(stat.S_IFMT(facts.st_mode))
        if kind is None:
            return None
        names = os.listxattr(place, follow_symlinks=False)
        return Node(
            path=path,
            kind=kind,
            mode=stat.S_IMODE(facts.st_mode),
            uid=facts.st_uid,
            gid=facts.st_gid,
            mtime=facts.st_mtime_ns,
            size=facts.st_size if kind == "f" else 0,
            place=place,
            target=os.readlink(place) if kind == "l" else "",  # noqa: PTH115 - a Path would tidy it
            identity=(facts.st_dev, facts.st_ino),
            xattrs=kept({name: os.getxattr(place, name, follow_symlinks=False) for name in names if not name.startswith("user.overlay.")})
            if names
            else {},
        )
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        return None
    except OSError as error:
        raise ImageError(f"{place}: {error.strerror}") from error
