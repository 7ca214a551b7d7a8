"""The root file system as it will be: a tree of nodes in memory that entries are applied to.

Nothing of an archive touches the host's file system: names lead only through this tree. A name's parent
is looked up through the tree's own symbolic links, as in a chroot (containerd does the same: layers put
/lib/x where /lib is a link to usr/lib); `..` in an entry's name or in a hard link's target is refused.

Layers are applied in order. Each node knows its layer, since a whiteout hides only what came from the
layers below (OCI image-spec, layer.md).
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from dataclasses import dataclass, field

from trivisor.core.errors import ImageError
from trivisor.images.limits import MAX_NAME, Limits

MAX_LINKS = 40
WHITEOUT = ".wh."
OPAQUE = ".wh..wh..opq"
NEEDED = {"proc": 0o755, "sys": 0o755, "dev": 0o755, "run": 0o755, "tmp": 0o1777}
"""Mount points that the guest needs, with their modes."""


@dataclass(slots=True, frozen=True)
class Content:
    """Where a file's bytes are: `size` of them, of which `stored` are in source number `source` from `position`."""

    source: int
    position: int
    size: int
    stored: int
    sparse: tuple[tuple[int, int], ...] | None = None


@dataclass(slots=True, eq=False)
class Node:
    """A file (f), folder (d), symbolic link (l) or FIFO (p). Hard links share one node."""

    kind: str
    mode: int = 0o755
    uid: int = 0
    gid: int = 0
    mtime: int = 0
    xattrs: dict[str, bytes] = field(default_factory=dict)
    target: str = ""
    content: Content | None = None
    children: dict[str, Node] = field(default_factory=dict)
    layer: int = 0
    links: dict[str, int] | None = None
    """Of a folder: the names in it that are hard links, with their layers; the node has the layer of the file."""

    def own(self, name: str, child: Node, layer: int) -> bool:
        """Tell whether the name in this folder is of that layer."""
        return child.layer == layer or (self.links is not None and self.links.get(name) == layer)


class Tree:
    """A root with the operations that entries need. `origin` begins every message."""

    def __init__(self, limits: Limits, origin: str) -> None:
        self.root = Node("d")
        self.layer = 0
        self.origin = origin
        self._limits = limits
        self._made = 0
        self._budget = 32 * limits.entries  # steps through names: links to links to links are work without entries

    def put(self, name: str, node: Node) -> None:
        """Put `node` at `name`; the last one put there wins. A folder put over a folder keeps what is in it."""
        node.layer = self.layer
        parts = self._split(name, name)
        if not parts:
            if node.kind != "d":
                raise self.bad(name, "the root must be a folder")
            node.children, node.links, self.root = self.root.children, self.root.links, node
            return
        parent = self._folder(parts[:-1], name)
        old = parent.children.get(parts[-1])
        if old is not None and old.kind == node.kind == "d":
            node.children, node.links = old.children, old.links
        self._count(name)
        parent.children[parts[-1]] = node

    def link(self, name: str, target: str) -> None:
        """Make `name` another name of the file `target`, which must be there."""
        parts = self._split(target, name)
        node = self._linked(self._folder(parts[:-1], name), parts[-1]) if parts else self.root
        if node is None:
            raise self.bad(name, f"is a hard link to {target[:200]!r}, which the image does not have")
        if node.kind == "d":
            raise self.bad(name, f"is a hard link to the folder {target[:200]!r}")
        parts = self._split(name, name)
        if not parts:
            raise self.bad(name, "the root must be a folder")
        self._count(name)
        folder = self._folder(parts[:-1], name)
        folder.children[parts[-1]] = node
        folder.links = {} if folder.links is None else folder.links
        folder.links[parts[-1]] = self.layer

    def whiteout(self, name: str) -> None:
        """Hide what the layers below have at `name`."""
        parts = self._split(name, name)
        parent = self._existing(parts[:-1], name)
        if parts and parent is not None and (node := parent.children.get(parts[-1])) is not None:
            self._prune(node)
            if not parent.own(parts[-1], node, self.layer) and not node.children:
                del parent.children[parts[-1]]

    def remove(self, name: str) -> None:
        """Drop what is at `name`, whichever layer it came from."""
        parts = self._split(name, name)
        if parts and (parent := self._existing(parts[:-1], name)) is not None:
            parent.children.pop(parts[-1], None)

    def opaque(self, name: str) -> None:
        """Hide what the layers below have in the folder `name`."""
        folder = self._existing(self._split(name, name), name)
        if folder is not None:
            self._prune(folder)

    def find(self, name: str) -> Node | None:
        """Return the node at `name`, through symbolic links, or None."""
        for _ in range(MAX_LINKS):
            parts = self._split(posixpath.normpath("/" + name), name)
            folder: Node | None = self.root
            for part in parts[:-1]:
                folder = folder.children.get(part) if folder else None
            node = folder.children.get(parts[-1]) if folder and parts else folder
            if node is None or node.kind != "l":
                return node
            name = posixpath.join(posixpath.dirname(name), node.target)
        return None

    def need(self) -> None:
        """Add the mount points that the guest needs and the image lacks."""
        for name, mode in NEEDED.items():
            node = self.root.children.setdefault(name, Node("d", mode))
            if node.kind not in "dl":
                raise self.bad(name, "must be a folder: the machine mounts there")

    def walk(self) -> Iterator[tuple[str, Node]]:
        """Yield (path, node) of everything but the root, sorted, folders before what is in them."""
        stack = [("", self.root)]
        while stack:
            path, node = stack.pop()
            if path:
                yield path, node
            stack += [(f"{path}/{name}" if path else name, node.children[name]) for name in sorted(node.children, reverse=True)]

    def bad(self, name: str, why: str) -> ImageError:
        """Return the error for the entry `name`."""
        return ImageError(f"{self.origin}: {name[:200]!r}: {why}")

    def _split(self, path: str, name: str) -> list[str]:
        parts = [part for part in path.split("/") if part not in ("", ".")]
        if ".." in parts:
            raise self.bad(name, "leads out of the image by '..'")
        for part in parts:
            if len(part.encode("utf-8", "surrogateescape")) > MAX_NAME:
                raise self.bad(name, f"a name is longer than {MAX_NAME} bytes")
        return parts

    def _folder(self, parts: list[str], name: str) -> Node:
        """Return the folder that `parts` lead to, through links inside the tree; missing folders are made."""
        folder = self._existing(parts, name, make=True)
        assert folder is not None
        return folder

    def _existing(self, parts: list[str], name: str, *, make: bool = False) -> Node | None:
        stack = [self.root]
        todo = parts[::-1]
        links = 0
        while todo:
            self._budget -= 1
            if self._budget < 0:
                raise self.bad(name, "the names lead through too many folders and links")
            part = todo.pop()
            if part in ("", "."):
                continue
            if part == "..":  # of a link's target; the root's parent is the root
                del stack[max(1, len(stack) - 1) :]
                continue
            node = self._child(stack[-1], part)
            if node is None and not make:
                return None
            if node is None:
                node = self._new_folder(stack[-1], part)
                self._count(name)
            if node.kind == "l":
                links += 1
                if links > MAX_LINKS:
                    raise self.bad(name, "its parent is a loop of symbolic links")
                if node.target.startswith("/"):
                    del stack[1:]
                todo += node.target.split("/")[::-1]
            elif node.kind == "d":
                stack.append(node)
                if len(stack) > self._limits.depth:
                    raise self.bad(name, f"is in over {self._limits.depth} folders")
            else:
                raise self.bad(name, f"its parent {part!r} is not a folder")
        return stack[-1]

    def _child(self, folder: Node, part: str) -> Node | None:
        """Return what is called `part` in `folder`."""
        return folder.children.get(part)

    def _linked(self, folder: Node, part: str) -> Node | None:
        """Return what a hard link is to be another name of."""
        return self._child(folder, part)

    def _new_folder(self, folder: Node, part: str) -> Node:
        """Make the folder `part` in `folder`: no entry says more about it."""
        made = folder.children[part] = Node("d", layer=self.layer)
        return made

    def _count(self, name: str) -> None:
        self._made += 1
        if self._made > self._limits.entries:
            raise self.bad(name, f"the image has over {self._limits.entries} entries")

    def _prune(self, folder: Node) -> None:
        # Children before their folder, without recursion: depth is bounded by the limits alone.
        order = [folder]
        for node in order:
            order += [child for child in node.children.values() if child.kind == "d"]
            self._budget -= len(node.children)
        if self._budget < 0:
            raise self.bad("", "the whiteouts hide the same folders over and over")
        for node in reversed(order):
            node.children = {
                name: child
                for name, child in node.children.items()
                if node.own(name, child, self.layer) or (child.kind == "d" and child.children)
            }
