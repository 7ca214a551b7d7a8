"""COPY and ADD: a layer made of files that are put over a base (Dockerfile reference, "COPY", "ADD").

The layer is a Tree, like any that is read from an archive. Folders of the base that lead to what is new are in it as they are in the base,
so that it changes nothing of them. Where the base has a link on the way, files go where it leads.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from trivisor.core.errors import ImageError
from trivisor.images import view as views
from trivisor.images.layer import add
from trivisor.images.limits import DEFAULT, Limits
from trivisor.images.source import FolderSource, LayerSource, Source
from trivisor.images.stream import CHUNK, Section, unpack
from trivisor.images.tarread import TarReader
from trivisor.images.tree import Content, Node, Tree
from trivisor.images.view import View
from trivisor.va.build.ignore import regex

_MAGIC = slice(257, 262)
"""Where a tar header says "ustar"."""


class CopyError(ValueError):
    """Files that cannot be put where they were asked for. `hint` is the next step."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


@dataclass(frozen=True)
class As:
    """What files become: None leaves what they are."""

    owner: tuple[int, int] | None = None
    mode: int | None = None


class Layer:
    """What is put over `base`. `sources` are where the files' bytes are read from when the layer is written."""

    def __init__(self, base: View, origin: str, stack: ExitStack, limits: Limits = DEFAULT) -> None:
        self.tree = Tree(limits, origin)
        self._base = base
        self._limits = limits
        self._files = FolderSource()
        self._stack = stack
        self._links: dict[tuple[int, int], str] = {}
        self._hash = hashlib.sha256()
        self.sources: list[Source] = [self._files]

    @property
    def content(self) -> str:
        """A digest of all that was put there, but for times: what tells whether a cached layer is the same."""
        return self._hash.hexdigest()

    def folder(self, path: str, owner: tuple[int, int] = (0, 0)) -> None:
        """Make the folder `path` and those above it; one that is there stays as it is. Raises CopyError."""
        place, there = self._place(path, 0)
        if there is None:
            self._put(place, Node("d", 0o755, *owner))
        elif there != "d":
            raise CopyError(f"{path} is there and is no folder")

    def is_folder(self, path: str) -> bool:
        """Tell whether there is a folder at `path`, in the base or the layer."""
        return self._place(path, 0)[1] == "d"

    def copy(self, view: View, top: views.Node, target: str, become: As, leave: Callable[[str], bool] = lambda _: False) -> None:
        """Put the file `top` of `view` at `target`; of a folder what is in it. `leave` says of paths below it what is left out.

        Raises CopyError, ImageError.
        """
        if top.kind == "d" and not self.is_folder(target):
            place, there = self._place(target, top.mtime)
            if there is not None:
                raise CopyError(f"{target} is there and is no folder")
            self._put(place, self._node(top, become))
        start = len(top.path)
        for found in views.everything(view, top):
            below = found.path[start:].strip("/")
            if (top.kind == "d" and not below) or (below and leave(below)):
                continue
            self._one(found, f"{target}/{below}" if below else target, become)

    def write(self, data: bytes, path: Path, target: str, become: As) -> None:
        """Put a file with `data` at `target`; `path` is where it may lie until the layer is written."""
        path.write_bytes(data)
        node = Node("f", become.mode if become.mode is not None else 0o644, *(become.owner or (0, 0)))
        node.content = self._file(path, len(data))
        self._put(self._place(target, 0)[0], node, hashlib.sha256(data).hexdigest())

    def extract(self, place: Path, target: str, become: As) -> bool:
        """Put what is in the tar `place`, plain or packed, into the folder `target`; tell whether it is one. Raises ImageError."""
        fd = os.open(place, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        self._stack.callback(os.close, fd)
        size = os.fstat(fd).st_size
        whole = Section(fd, 0, size, place.name)
        try:
            if unpack(whole.part(0, size, place.name), self._limits).read(512)[_MAGIC] != b"ustar":
                return False
        except ImageError:
            return False
        self.folder(target)
        for entry in TarReader(unpack(whole.part(0, size, place.name), self._limits), self._limits):
            if not entry.name.strip("./"):
                continue  # the archive's own top says nothing of the folder
            name = f"{target}/{entry.name}"
            folder = entry.kind == "d" and self.is_folder(name)
            entry.name = self._place(name, entry.mtime * 10**9, last=folder)[0]
            if entry.kind == "h":
                entry.target = self._place(f"{target}/{entry.target}", 0, last=False)[0]
            if become.owner is not None:
                entry.uid, entry.gid = become.owner
            add(self.tree, entry, len(self.sources))
        self._hash.update(repr((target, become, _digest(place))).encode())
        self.sources.append(LayerSource(whole, self._limits))
        return True

    def _one(self, found: views.Node, target: str, become: As) -> None:
        place, there = self._place(target, found.mtime, last=False)
        if found.kind == "d":
            if there == "d":
                return
            node = self._node(found, become)
            self._put(place, node)
            return
        if there == "d":
            raise CopyError(f"{target} is a folder there, and {found.path} is none")
        first = self._links.setdefault(found.identity, place)
        if first != place and (same := self.tree.find(first)) is not None and same.kind == "f":
            self.tree.link(place, first)
            self._hash.update(repr((place, "h", first)).encode())
            return
        node = self._node(found, become)
        if found.kind == "f":
            node.content = self._file(found.place, found.size)
        self._put(place, node, _digest(found.place) if found.kind == "f" else "")

    def _file(self, path: Path, size: int) -> Content:
        self._files.paths.append(path)
        return Content(0, len(self._files.paths) - 1, size, size)

    def _node(self, found: views.Node, become: As) -> Node:
        uid, gid = become.owner if become.owner is not None else (found.uid, found.gid)
        mode = become.mode if become.mode is not None and found.kind in "fd" else found.mode
        seconds = max(0, min(found.mtime // 10**9, 0xFFFFFFFF))
        return Node(found.kind, mode, uid, gid, seconds, found.xattrs, found.target)

    def _put(self, place: str, node: Node, digest: str = "") -> None:
        self.tree.put(place, node)
        self._hash.update(
            repr((place, node.kind, node.mode, node.uid, node.gid, sorted(node.xattrs.items()), node.target, digest)).encode()
        )

    def _place(self, path: str, mtime: int, *, last: bool = True) -> tuple[str, str | None]:
        """Return where `path` leads to in base and layer, and the kind of what is there. The folders above are in the layer then."""
        node, missing = views.walk(self._base, path, last=last)
        if node is None:
            raise CopyError(f"{path} leads over something that is no folder")
        if missing and node.kind != "d":
            raise CopyError(f"{path}: {node.path} is no folder")
        parts = [*filter(None, node.path.split("/")), *missing]
        if ".." in parts:
            raise CopyError(f"{path} leads through a folder that is not there")
        self._above(node, missing, mtime)
        place = "/".join(parts)
        here = self.tree.find(place) if place else self.tree.root
        return place, here.kind if here is not None else None if missing else node.kind

    def _above(self, node: views.Node, missing: list[str], mtime: int) -> None:
        """Have the folders on the way in the layer: those of the base as they are there, new ones as old as what they are made for."""
        parts = node.path.split("/") if node.path else []
        for end in range(len(parts) + (1 if missing else 0)):
            above = "/".join(parts[:end])
            there = self.tree.find(above) if above else None
            if there is None and (found := self._base.at(above)) is not None:
                self.tree.put(above, self._node(found, As()))
        for end in range(1, len(missing)):
            above = "/".join([*parts, *missing[:end]])
            if self.tree.find(above) is None:
                self._put(above, Node("d", 0o755, 0, 0, max(0, mtime // 10**9)))


def matches(view: View, pattern: str) -> list[tuple[str, views.Node]]:
    """Return what of `view` a source of a COPY means, by name: one file or folder, or all that a pattern with * ? [ fits.

    Each with the name that it has there, which is not its own where a link leads to it. Raises CopyError if the path leads out of the view,
    or nothing is there.
    """
    depth = 0
    for part in pattern.split("/"):
        depth += {"..": -1, ".": 0, "": 0}.get(part, 1)
        if depth < 0:
            raise CopyError(f"{pattern} is outside of the context", "copy what you need into the context, or build with a folder above it")
    path = os.path.normpath("/" + pattern).strip("/")
    if not re.search(r"[*?\[\\]", path):
        found = views.resolve(view, path)
        if found is None:
            raise CopyError(
                f"{pattern} is not there", "see .dockerignore: it may be left out" if isinstance(view, views.FolderView) else ""
            )
        return [(path.rpartition("/")[2], found)]
    nodes = [("", view.at(""))]
    for part in path.split("/"):
        fits = re.compile(regex(part), re.DOTALL)
        below = []
        for _, node in nodes:
            folder = views.resolve(view, node.path) if node is not None else None
            if folder is not None and folder.kind == "d":
                names = [name for name in view.names(folder) if fits.fullmatch(name)]
                below += [(name, views.resolve(view, f"{folder.path}/{name}")) for name in names]
        nodes = below
    result = [(name, node) for name, node in nodes if node is not None]
    if not result:
        raise CopyError(f"nothing fits {pattern}", "it may be left out by .dockerignore")
    return result


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while data := file.read(CHUNK):
            digest.update(data)
        return digest.hexdigest()
