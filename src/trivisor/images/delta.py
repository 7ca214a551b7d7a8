"""One layer alone: what it changes of the layers below it, as overlayfs would have it.

A Tree whose names lead, where the layer itself says nothing, through what lies below: the unpacked layers, looked at by name
(view.py). A folder that is only passed through is borrowed: it is written, with the owner and mode it has below, when something
of this layer lies in it. What a whiteout hides is a node of kind "w"; a folder put over something hidden is opaque.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from trivisor.images.limits import Limits
from trivisor.images.tree import NEEDED, Node, Tree
from trivisor.images.view import Node as Seen
from trivisor.images.view import StackView

HIDDEN = "w"


@dataclass(slots=True, eq=False)
class Laid(Node):
    """A node with what it means for the layers below."""

    below: str | None = None
    """A folder's path in the layers below, whose entries show through; None: nothing does."""
    opaque: bool = False
    """A folder hides what the layers below have at its place."""
    borrowed: bool = False
    """It is of the layers below, and this one has not changed it."""
    place: Path | None = None
    """Where an unpacked layer has the file."""
    lent: set[str] = field(default_factory=set)
    """Of a folder: names of the layers below that are this one's only because another name in it is the same file."""


class Delta(Tree):
    """The changes that one layer makes. `lowers` are the unpacked layers below it, the uppermost first."""

    def __init__(self, limits: Limits, origin: str, lowers: Sequence[Path]) -> None:
        super().__init__(limits, origin)
        self._view = StackView(lowers) if lowers else None
        seen = self._view.at("") if self._view else None
        self.root = _borrow(seen) if seen else Laid("d")
        self.shared: set[int] = set()
        """The ids (id()) of nodes that have several names."""

    def put(self, name: str, node: Node) -> None:
        """As Tree's; a folder put over one below is merged with it."""
        made = _as_laid(node)
        made.layer = self.layer
        parts = self._split(name, name)
        if not parts:
            if made.kind != "d":
                raise self.bad(name, "the root must be a folder")
            made.children, made.below, made.lent = self.root.children, laid(self.root).below, laid(self.root).lent
            self.root = made
            return
        parent, last = self._folder(parts[:-1], name), parts[-1]
        if made.kind == "d":
            self._take_over(made, parent, last)
        self._count(name)
        parent.children[last] = made
        laid(parent).lent.discard(last)

    def link(self, name: str, target: str) -> None:
        super().link(name, target)
        parts = self._split(name, name)
        laid(self._folder(parts[:-1], name)).lent.discard(parts[-1])

    def whiteout(self, name: str) -> None:
        parts = self._split(name, name)
        parent = self._existing(parts[:-1], name)
        if not parts or parent is None:
            return
        node = self._child(parent, parts[-1])
        if node is None or not (node.kind == "d" or laid(node).borrowed or parts[-1] in laid(parent).lent):
            return  # nothing is there, or a file of this layer, which hides what is below
        if node.kind != "d" or (not self._shut(node) and laid(node).borrowed):
            parent.children[parts[-1]] = Laid(HIDDEN, layer=self.layer)

    def remove(self, name: str) -> None:
        parts = self._split(name, name)
        parent = self._existing(parts[:-1], name) if parts else None
        if parent is None:
            return
        if self._lower(parent, parts[-1]) is not None:
            parent.children[parts[-1]] = Laid(HIDDEN, layer=self.layer)
        else:
            parent.children.pop(parts[-1], None)

    def opaque(self, name: str) -> None:
        folder = self._existing(self._split(name, name), name)
        if folder is None:
            return
        if folder is self.root:
            self._hide_all(folder)
        else:
            self._shut(folder)
            laid(folder).borrowed = False

    def need(self) -> None:
        """Add the mount points that neither this layer nor one below has."""
        for name, mode in NEEDED.items():
            found = self._child(self.root, name)
            if found is None or found.kind == HIDDEN:
                made = Laid("d", mode)
                self._take_over(made, self.root, name)
                self.root.children[name] = made

    # What lies below

    def _lower(self, folder: Node, part: str) -> Seen | None:
        below = laid(folder).below
        if below is None or self._view is None:
            return None
        return self._view.at(f"{below}/{part}".lstrip("/"))

    def _child(self, folder: Node, part: str) -> Node | None:
        node = folder.children.get(part)
        if node is not None:
            return None if node.kind == HIDDEN else node
        seen = self._lower(folder, part)
        if seen is not None:
            node = folder.children[part] = _borrow(seen)
        return node

    def _linked(self, folder: Node, part: str) -> Node | None:
        node = self._child(folder, part)
        if node is not None and node.kind != "d":
            if laid(node).borrowed:
                laid(folder).lent.add(part)
            laid(node).borrowed = False  # both names are this layer's from now on, and stay names of one file
            self.shared.add(id(node))
        return node

    def _new_folder(self, folder: Node, part: str) -> Node:
        made = Laid("d", layer=self.layer)
        self._take_over(made, folder, part)
        folder.children[part] = made
        return made

    def _take_over(self, made: Laid, parent: Node, part: str) -> None:
        """Let the folder `made` be merged with what is at its place, or hide it."""
        old = parent.children.get(part)
        if old is None:
            seen = self._lower(parent, part)
            made.below = seen.path if seen is not None and seen.kind == "d" else None
        elif old.kind == "d":
            made.children, made.below, made.opaque, made.lent = old.children, laid(old).below, laid(old).opaque, laid(old).lent
        else:
            # Where a file is below, overlayfs looks no further.
            made.opaque = not laid(old).borrowed and laid(parent).below is not None

    def _shut(self, folder: Node) -> bool:
        """Hide what the layers below have in `folder`; tell whether this one has something in it."""
        order = [laid(folder)]
        for node in order:
            order += [laid(child) for child in node.children.values() if child.kind == "d"]
            self._budget -= 1 + len(node.children)
        if self._budget < 0:
            raise self.bad("", "the whiteouts hide the same folders over and over")
        for node in reversed(order):
            node.below = None
            node.children = {
                name: child
                for name, child in node.children.items()
                if child.kind != HIDDEN and name not in node.lent and (not laid(child).borrowed or (child.kind == "d" and child.children))
            }
            if node.children:
                node.borrowed = False
        order[0].opaque = True
        return bool(order[0].children)

    def _hide_all(self, root: Node) -> None:
        """overlayfs takes no mark on the root of a layer: each name is hidden by itself."""
        seen = self._view.at("") if self._view else None
        names = self._view.names(seen) if self._view and seen else []
        for name in names:
            self.whiteout(name)


def laid(node: Node) -> Laid:
    """Return the node as what it is in a Delta."""
    assert isinstance(node, Laid)
    return node


def _as_laid(node: Node) -> Laid:
    return Laid(node.kind, node.mode, node.uid, node.gid, node.mtime, node.xattrs, node.target, node.content, node.children, node.layer)


def _borrow(seen: Seen) -> Laid:
    below = seen.path if seen.kind == "d" else None
    mtime = max(0, seen.mtime // 10**9)
    node = Laid(seen.kind, seen.mode, seen.uid, seen.gid, mtime, dict(seen.xattrs), seen.target, layer=-1)
    node.below, node.borrowed, node.place = below, True, seen.place
    return node
