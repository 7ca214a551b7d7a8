"""What a machine wrote, as a layer: the upper folder of an overlayfs, read without mounting it (overlayfs, "Whiteouts and opaque
directories"; OCI image-spec, layer.md).

What was removed becomes a whiteout, a folder put over a removed one an opaque folder, a folder that was renamed all that it holds now.
Owners are those that the machine saw. Sockets and device nodes are left out, and attributes that do not belong to an image. The same
files give the same bytes, whichever way they were listed (written.py).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from trivisor.core.errors import ImageError
from trivisor.images import view as views
from trivisor.images import written
from trivisor.images.layer import kept
from trivisor.images.limits import DEFAULT, MAX_NAME, MAX_PATH, Limits
from trivisor.images.pack import LayerWriter, PackedLayer
from trivisor.images.source import FolderSource
from trivisor.images.tarwrite import emit
from trivisor.images.tree import OPAQUE, WHITEOUT, Content, Node, Tree
from trivisor.images.written import File, Folder, Listing, Stretch

Range = tuple[int, int, int]
"""First id inside, first id outside, count (user_namespaces(7))."""
_EMPTY = Content(-1, 0, 0, 0, ())
"""Of a whiteout: it comes before all other files, and is never read."""


def inside(ranges: Sequence[Range]) -> Callable[[int], int]:
    """Return what turns an id of the host into the machine's; one that it does not have is nobody's (65534)."""

    def turn(number: int) -> int:
        return next((first + number - out for first, out, count in ranges if out <= number < out + count), 65534)

    return turn


def pack(
    upper: Path | Listing,
    lowers: Sequence[Path] | Callable[[], Sequence[Path]],
    target: Path,
    *,
    users: Sequence[Range] = ((0, 0, 1 << 32),),
    groups: Sequence[Range] = ((0, 0, 1 << 32),),
    without: Iterable[str] = (),
    latest: int | None = None,
    limits: Limits = DEFAULT,
) -> PackedLayer:
    """Write the layer to the new file `target`. `lowers` are what lies below, the uppermost first, or what gives them if they are needed;
    `users` and `groups` the machine's ids; `without` paths that are left out; no file is newer than `latest` (seconds since the epoch) if
    that is given.

    Raises ImageError, StorageError.
    """
    listing = Folder(upper) if isinstance(upper, Path) else upper
    reader = _Reader(listing, lowers, frozenset(path.strip("/") for path in without), limits)
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


class _Files:
    """Where the bytes of files come from; Content.position is the number of the place."""

    def __init__(self, origin: str) -> None:
        self._origin = origin
        self._folder = FolderSource()
        self._places: list[Path | Stretch] = []

    def content(self, place: Path | Stretch, size: int) -> Content:
        """Return what names `size` bytes that lie in `place`."""
        self._places.append(place)
        self._folder.paths.append(place if isinstance(place, Path) else Path())
        if isinstance(place, Path):
            return Content(0, len(self._places) - 1, size, size)
        return Content(0, len(self._places) - 1, size, place.length, place.sparse)

    def stored(self, content: Content) -> Iterator[bytes]:
        place = self._places[content.position]
        return self._folder.stored(content) if isinstance(place, Path) else written.stored(place, self._origin)


class _Reader:
    users: Callable[[int], int]
    groups: Callable[[int], int]
    latest: int | None

    def __init__(
        self, upper: Listing, lowers: Sequence[Path] | Callable[[], Sequence[Path]], without: frozenset[str], limits: Limits
    ) -> None:
        self.tree = Tree(limits, upper.origin)
        self.files = _Files(upper.origin)
        self._upper = upper
        self._lowers = lowers
        self._stack: views.StackView | None = None
        self._without = without
        self._links: dict[tuple[int, int], str] = {}
        self._left = limits.total

    @property
    def _below(self) -> views.StackView | None:
        """What lies below, looked for when first needed: that may have to be unpacked."""
        if self._stack is None and self._lowers:
            self._stack = views.StackView(self._lowers() if callable(self._lowers) else self._lowers)
        return self._stack

    def read(self) -> None:
        """Put all that there is into the tree."""
        # Of each folder: whether nothing below shows through, and where overlayfs looks for what it is merged with.
        todo = [("", False, "")]
        while todo:
            folder, hidden, origin = todo.pop()
            hidden, origin = self._folder(folder, self._upper.at(folder), hidden, origin)
            for name in self._upper.names(folder):
                below = f"{folder}/{name}".lstrip("/")
                if below in self._without:
                    continue
                file = self._upper.at(below)
                if file.kind == "d":
                    todo.append((below, hidden, f"{origin}/{name}"))
                else:
                    self._file(below, file, hidden=hidden)

    def _folder(self, path: str, file: File, hidden: bool, origin: str) -> tuple[bool, str]:
        """Put the folder itself into the tree; return whether nothing below shows through in it, and its own origin."""
        node = self._node(file)
        redirect = self._redirect(path, file)
        if not redirect and file.marks.get("opaque") != b"y":
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
            self._put(f"{path}/{OPAQUE}", self._mark(file))
        return True, origin

    def _redirect(self, path: str, file: File) -> str:
        """Return what the folder was called below, as overlayfs notes it; "" if it was not moved."""
        mark = file.marks.get("redirect", b"")
        if b"\0" in mark or len(mark) > MAX_PATH or any(len(part) > MAX_NAME or part == b".." for part in mark.split(b"/")):
            raise ImageError(f"{self._upper.origin}: {path}: the mark of where it was is not overlayfs's")
        return mark.decode("utf-8", "surrogateescape")

    def _there(self, path: str) -> bool:
        return self._below is not None and self._below.at(path) is not None

    def _moved(self, path: str, origin: str) -> None:
        """A folder of the layers below lies here now: its files are this layer's from now on."""
        top = views.resolve(self._below, origin, last=False) if self._below is not None else None
        if top is None or self._below is None:
            raise ImageError(f"{self._upper.origin}: {path}: the folder that it was, {origin}, is not there")
        for found in views.everything(self._below, top):
            name = f"{path}/{found.path[len(top.path) :].strip('/')}".rstrip("/")
            time = self._time(found.mtime // 10**9)
            node = Node(found.kind, found.mode, found.uid, found.gid, time, dict(found.xattrs), found.target)
            self._put(name, node, found.place, found.size, found.identity)

    def _file(self, path: str, file: File, *, hidden: bool) -> None:
        if file.kind == "w" or (file.kind == "f" and file.size == 0 and "whiteout" in file.marks):
            if hidden:
                self.tree.remove(path)  # of a folder that was moved here
            else:
                folder, _, name = path.rpartition("/")
                self._put(f"{folder}/{WHITEOUT}{name}".lstrip("/"), self._mark(file))
            return
        if "metacopy" in file.marks:
            raise ImageError(f"{self._upper.origin}: {path}: its data lies elsewhere", hint="mount overlayfs with metacopy=off")
        if file.kind:
            self._put(path, self._node(file), file.data, file.size, file.identity)

    def _put(
        self, path: str, node: Node, data: Path | Stretch | None = None, size: int = 0, identity: tuple[int, int] | None = None
    ) -> None:
        first = self._links.setdefault(identity, path) if identity and node.kind == "f" else path
        if first != path and self.tree.find(first) is not None:
            self.tree.link(path, first)
            return
        if node.kind == "f" and data is not None:
            self._left -= size
            if self._left < 0:
                raise ImageError(f"{self._upper.origin}: it holds more than an image may", hint="remove what need not be in the image")
            node.content = self.files.content(data, size)
        self.tree.put(path, node)

    def _node(self, file: File) -> Node:
        mode = 0o777 if file.kind == "l" else file.mode
        return Node(file.kind, mode, self.users(file.uid), self.groups(file.gid), self._time(file.mtime), kept(file.xattrs), file.target)

    def _mark(self, file: File) -> Node:
        node = Node("f", 0o600, mtime=self._time(file.mtime))
        node.content = _EMPTY
        return node

    def _time(self, seconds: int) -> int:
        seconds = max(0, min(seconds, 0xFFFFFFFF))
        return seconds if self.latest is None else min(seconds, self.latest)


if __name__ == "__main__":
    main(sys.argv[1:])
