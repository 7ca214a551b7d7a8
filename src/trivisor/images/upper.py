"""What a machine wrote, as a layer: the upper folder of an overlayfs, read without mounting it (overlayfs, "Whiteouts and opaque
directories"; OCI image-spec, layer.md).

What was removed becomes a whiteout, a folder put over a removed one an opaque folder, a folder that was renamed all that it holds now.
Owners are those that the machine saw. Sockets and device nodes are left out, and attributes that do not belong to an image. The folder
must stand still: whoever could write to it could lead us elsewhere.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from trivisor.core.errors import ImageError
from trivisor.images import view as views
from trivisor.images.layer import kept
from trivisor.images.limits import DEFAULT, Limits
from trivisor.images.pack import LayerWriter, PackedLayer
from trivisor.images.source import FolderSource
from trivisor.images.tarwrite import emit
from trivisor.images.tree import OPAQUE, WHITEOUT, Content, Node, Tree

Range = tuple[int, int, int]
"""First id inside, first id outside, count (user_namespaces(7))."""
_EMPTY = Content(-1, 0, 0, 0, ())
"""Of a whiteout: it comes before all other files, and is never read."""
_KINDS = {stat.S_IFREG: "f", stat.S_IFDIR: "d", stat.S_IFLNK: "l", stat.S_IFIFO: "p"}
_PREFIXES = ("trusted.overlay.", "user.overlay.")


def inside(ranges: Sequence[Range]) -> Callable[[int], int]:
    """Return what turns an id of the host into the machine's; one that it does not have is nobody's (65534)."""

    def turn(number: int) -> int:
        return next((first + number - out for first, out, count in ranges if out <= number < out + count), 65534)

    return turn


def pack(
    upper: Path,
    lowers: Sequence[Path],
    target: Path,
    *,
    users: Sequence[Range] = ((0, 0, 1 << 32),),
    groups: Sequence[Range] = ((0, 0, 1 << 32),),
    without: Iterable[str] = (),
    latest: int | None = None,
    limits: Limits = DEFAULT,
) -> PackedLayer:
    """Write the layer to the new file `target`. `lowers` are what lies below, the uppermost first; `users` and `groups` the machine's ids;
    `without` paths that are left out; no file is newer than `latest` (seconds since the epoch) if that is given.

    Raises ImageError, StorageError.
    """
    reader = _Reader(upper, lowers, frozenset(path.strip("/") for path in without), limits)
    reader.users, reader.groups, reader.latest = inside(users), inside(groups), latest
    reader.read()
    with LayerWriter(target) as layer:
        emit(reader.tree, [reader.files], layer.write, root=bool(lowers))
        return layer.close()


def main(argv: Sequence[str]) -> None:
    """Pack as another process, which may be another user or see other mounts: `upper REQUEST`, both sides JSON in files."""
    request = Path(argv[0])
    asked = msgspec.json.decode(request.read_bytes(), type=Request)
    more: dict[str, Any] = {"users": asked.users, "groups": asked.groups} if asked.users is not None and asked.groups is not None else {}
    lowers = [Path(lower) for lower in asked.lowers]
    packed = pack(Path(asked.upper), lowers, Path(asked.target), without=asked.without, latest=asked.latest, **more)
    answer = [packed.diff_id, packed.digest, packed.size]
    request.with_suffix(".answer").write_bytes(msgspec.json.encode(answer))


class Request(msgspec.Struct):
    """What `pack` is asked for in another process."""

    upper: str
    lowers: list[str]
    target: str
    users: list[Range] | None
    groups: list[Range] | None
    without: list[str]
    latest: int | None


class _Reader:
    users: Callable[[int], int]
    groups: Callable[[int], int]
    latest: int | None

    def __init__(self, upper: Path, lowers: Sequence[Path], without: frozenset[str], limits: Limits) -> None:
        self.tree = Tree(limits, str(upper))
        self.files = FolderSource()
        self._upper = upper
        self._below = views.StackView(lowers) if lowers else None
        self._without = without
        self._links: dict[tuple[int, int], str] = {}
        self._left = limits.total

    def read(self) -> None:
        """Put all that there is into the tree."""
        # Of each folder: whether nothing below shows through, and where overlayfs looks for what it is merged with.
        todo = [("", False, "")]
        while todo:
            folder, hidden, origin = todo.pop()
            place = self._upper / folder
            hidden, origin = self._folder(folder, place, hidden, origin)
            for name in sorted(entry.name for entry in os.scandir(place)):
                below = f"{folder}/{name}".lstrip("/")
                if below in self._without:
                    continue
                facts = (place / name).lstat()
                if stat.S_ISDIR(facts.st_mode):
                    todo.append((below, hidden, f"{origin}/{name}"))
                else:
                    self._file(below, place / name, facts, hidden=hidden)

    def _folder(self, path: str, place: Path, hidden: bool, origin: str) -> tuple[bool, str]:
        """Put the folder itself into the tree; return whether nothing below shows through in it, and its own origin."""
        facts = place.lstat()
        marks = _marks(place)
        node = self._node("d", facts, place)
        redirect = marks.get("redirect", b"").decode("utf-8", "surrogateescape")
        if not redirect and marks.get("opaque") != b"y":
            self._put(path, node)
            return hidden, origin
        if hidden:
            self.tree.remove(path)  # what came with a folder that was moved here
        self._put(path, node)
        if redirect:
            # One name is one in the same folder, as that is called below.
            origin = redirect if redirect.startswith("/") else f"{origin.rpartition('/')[0]}/{redirect}"
            self._moved(path, origin)
            self._put(path, node)
        if path and not hidden and self._there(path):
            self._put(f"{path}/{OPAQUE}", self._mark(facts))
        return True, origin

    def _there(self, path: str) -> bool:
        return self._below is not None and self._below.at(path) is not None

    def _moved(self, path: str, origin: str) -> None:
        """A folder of the layers below lies here now: its files are this layer's from now on."""
        top = views.resolve(self._below, origin, last=False) if self._below is not None else None
        if top is None or self._below is None:
            raise ImageError(f"{self._upper}: {path}: the folder that it was, {origin}, is not there")
        for found in views.everything(self._below, top):
            name = f"{path}/{found.path[len(top.path) :].strip('/')}".rstrip("/")
            node = Node(found.kind, found.mode, found.uid, found.gid, self._time(found.mtime), dict(found.xattrs), found.target)
            self._put(name, node, found.place, found.size, found.identity)

    def _file(self, path: str, place: Path, facts: os.stat_result, *, hidden: bool) -> None:
        if (stat.S_ISCHR(facts.st_mode) and facts.st_rdev == 0) or "whiteout" in (_marks(place) if facts.st_size == 0 else {}):
            if hidden:
                self.tree.remove(path)  # of a folder that was moved here
            else:
                folder, _, name = path.rpartition("/")
                self._put(f"{folder}/{WHITEOUT}{name}".lstrip("/"), self._mark(facts))
            return
        kind = _KINDS.get(stat.S_IFMT(facts.st_mode))
        if kind is not None:
            identity = (facts.st_dev, facts.st_ino) if facts.st_nlink > 1 else None
            self._put(path, self._node(kind, facts, place), place, facts.st_size, identity)

    def _put(self, path: str, node: Node, place: Path | None = None, size: int = 0, identity: tuple[int, int] | None = None) -> None:
        first = self._links.setdefault(identity, path) if identity and node.kind == "f" else path
        if first != path and self.tree.find(first) is not None:
            self.tree.link(path, first)
            return
        if node.kind == "f" and place is not None:
            self._left -= size
            if self._left < 0:
                raise ImageError(f"{self._upper}: it holds more than an image may", hint="remove what need not be in the image")
            node.content = Content(0, len(self.files.paths), size, size)
            self.files.paths.append(place)
        self.tree.put(path, node)

    def _node(self, kind: str, facts: os.stat_result, place: Path) -> Node:
        target = os.readlink(place) if kind == "l" else ""  # noqa: PTH115 - a Path would tidy it
        owner = self.users(facts.st_uid), self.groups(facts.st_gid)
        return Node(kind, stat.S_IMODE(facts.st_mode), *owner, self._time(facts.st_mtime_ns), kept(_attributes(place)), target)

    def _mark(self, facts: os.stat_result) -> Node:
        node = Node("f", 0o600, mtime=self._time(facts.st_mtime_ns))
        node.content = _EMPTY
        return node

    def _time(self, nanoseconds: int) -> int:
        seconds = max(0, min(nanoseconds // 10**9, 0xFFFFFFFF))
        return seconds if self.latest is None else min(seconds, self.latest)


def _attributes(place: Path) -> dict[str, bytes]:
    try:
        names = os.listxattr(place, follow_symlinks=False)
        return {name: os.getxattr(place, name, follow_symlinks=False) for name in names if not name.startswith(_PREFIXES)}
    except OSError:
        return {}


def _marks(place: Path) -> dict[str, bytes]:
    """Return overlayfs's own attributes, without the prefix that says who may set them."""
    try:
        names = os.listxattr(place, follow_symlinks=False)
    except OSError:
        return {}
    found = {}
    for name in names:
        for prefix in _PREFIXES:
            if name.startswith(prefix):
                found[name.removeprefix(prefix)] = os.getxattr(place, name, follow_symlinks=False)
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
