"""Applying entries to a tree: which are kept, which dropped, which refused; whiteouts of layers."""

from __future__ import annotations

from collections.abc import Iterable

from trivisor.images.limits import Limits
from trivisor.images.stream import Stream
from trivisor.images.tarread import Entry, TarReader
from trivisor.images.tree import OPAQUE, WHITEOUT, Content, Node, Tree


def apply(tree: Tree, stream: Stream, source: int, limits: Limits, *, layered: bool) -> None:
    """Put every entry of the tar `stream` into `tree`. `source` is the stream's number in Content.

    `layered` says that the archive is a layer: whiteouts mean something. Raises ImageError.
    """
    lay(tree, TarReader(stream, limits), source, layered=layered)


def lay(tree: Tree, entries: Iterable[Entry], source: int, *, layered: bool) -> None:
    """Put entries into `tree`, as `apply` does. Raises ImageError."""
    for entry in entries:
        if not (layered and _whiteout(tree, entry)):
            add(tree, entry, source)


def add(tree: Tree, entry: Entry, source: int) -> None:
    """Put one entry into `tree`; its data, if any, is at entry.position of `source`."""
    if entry.kind == "h":
        tree.link(entry.name, entry.target)
    elif entry.kind in "cb":
        _device(tree, entry)
    else:
        node = Node(entry.kind, entry.mode, entry.uid, entry.gid, entry.mtime, kept(entry.xattrs), entry.target)
        if entry.kind == "f":
            node.content = Content(source, entry.position, entry.size, entry.stored, entry.sparse)
        elif entry.kind == "l":
            node.mode = 0o777
            if not entry.target:
                raise tree.bad(entry.name, "is a symbolic link to nothing")
        tree.put(entry.name, node)


def kept(xattrs: dict[str, bytes]) -> dict[str, bytes]:
    """Return the attributes that belong to an image: the user's, and file capabilities.

    Labels of a security module belong to the host they were made on, ACLs have no place in squashfs, and
    trusted.overlay.* and user.overlay.* would steer the machine's overlayfs.
    """
    return {key: xattrs[key] for key in sorted(xattrs) if _belongs(key)}


def _belongs(key: str) -> bool:
    return key == "security.capability" or (key.startswith("user.") and not key.startswith("user.overlay."))


def _whiteout(tree: Tree, entry: Entry) -> bool:
    folder, _, base = entry.name.rstrip("/").rpartition("/")
    if not base.startswith(WHITEOUT):
        return False
    if base == OPAQUE:
        tree.opaque(folder)
    elif not base.startswith(WHITEOUT + WHITEOUT):  # .wh..wh.*: aufs's own records
        hidden = base.removeprefix(WHITEOUT)
        if hidden in ("", ".", ".."):
            raise tree.bad(entry.name, "is a whiteout of nothing")
        tree.whiteout(f"{folder}/{hidden}")
    return True


def _device(tree: Tree, entry: Entry) -> None:
    """The machine has its own /dev, so what is there may go; overlayfs marks deleted files with 0:0."""
    if entry.kind == "c" and entry.device == (0, 0):
        tree.remove(entry.name)
    elif next((part for part in entry.name.split("/") if part not in ("", ".")), "") != "dev":
        major, minor = entry.device
        raise tree.bad(entry.name, f"is a device node ({entry.kind} {major}:{minor}); images have none outside /dev")
