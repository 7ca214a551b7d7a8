"""The root of a virtual machine that is not kept, out of that of the layers below: one file that holds several squashfs, one after
another, each of which overlayfs lays over those before it. The bytes of such a root depend on which roots there were.

Beside a root lies what is in it, without the bytes of files: that is all it takes to tell what further layers change. Those become one
more squashfs, in which what they removed is a whiteout, behind a copy of the file. A file of several squashfs is read like one of one:
each says how long it is.
"""

from __future__ import annotations

import errno
import os
import struct
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from trivisor.core.errors import ImageError
from trivisor.images.limits import Limits
from trivisor.images.tree import NEEDED, Node, Tree

INDEX = "index"
MOST = 8
"""Squashfs in one file: each is one more place where the guest looks for a name."""
_PAGE = 4096
_HEAD = struct.Struct("<4s36xQ")
_Entry = tuple[bytes, str, int, int, int, int, bytes, list[tuple[bytes, bytes]], int]
"""Path, kind, mode, uid, gid, mtime, target, attributes, and the number of the entry that is the same file, or -1."""


class Whole(Exception):
    """A further squashfs cannot say it, for example that a file of the layers below has another name."""


def pieces(root: Path) -> list[int]:
    """Return where in the file each squashfs but the first begins. Raises OSError, ImageError."""
    found: list[int] = []
    with root.open("rb") as file:
        end, at = os.fstat(file.fileno()).st_size, 0
        while len(found) <= MOST:
            magic, size = _HEAD.unpack(os.pread(file.fileno(), _HEAD.size, at).ljust(_HEAD.size, b"\0"))
            if magic != b"hsqs" or size < _HEAD.size or size > end - at:
                raise ImageError(f"{root}: there is no squashfs at {at}", hint="remove the file: it is made again")
            at += -(-size // _PAGE) * _PAGE
            if at >= end:
                return found
            found.append(at)
    raise ImageError(f"{root}: there are more than {MOST + 1} squashfs in it")


def join(below: Path, added: Path, target: Path) -> None:
    """Write both, one behind the other, to the new file `target`. Raises FileNotFoundError and other OSErrors."""
    with target.open("xb") as sink:
        for part in (below, added):
            with part.open("rb") as source:
                _copy(source.fileno(), sink.fileno())
            sink.truncate(-(-os.fstat(sink.fileno()).st_size // _PAGE) * _PAGE)
            sink.seek(0, os.SEEK_END)


def _copy(source: int, target: int) -> None:
    """Copy all of a file, with shared blocks where the file system can."""
    left = os.fstat(source).st_size
    while left > 0:
        try:
            done = os.copy_file_range(source, target, left)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            done = os.sendfile(target, source, None, left)
        if done == 0:
            raise OSError(errno.EIO, "the file became shorter while it was copied")
        left -= done


def index(tree: Tree) -> bytes:
    """Return what is in `tree`, for `Below`."""
    entries: list[_Entry] = []
    numbers: dict[int, int] = {}
    for path, node in [("", tree.root), *tree.walk()]:
        same = numbers.setdefault(id(node), len(entries))
        xattrs = [(_bytes(name), value) for name, value in node.xattrs.items()]
        facts = (node.kind, node.mode, node.uid, node.gid, node.mtime, _bytes(node.target), xattrs)
        entries.append((_bytes(path), *facts, same if same < len(entries) else -1))
    return msgspec.msgpack.encode(entries)


@dataclass
class Below:
    """What is in a root, as `index` said: a tree that further layers are applied to, and how it was."""

    tree: Tree
    limits: Limits
    nodes: dict[str, Node]
    names: dict[str, list[str]]

    def changed(self) -> Tree:
        """Return what is different in the tree now, as a tree: of kind "w" is what is gone. Raises Whole."""
        found = Tree(self.limits, self.tree.origin)
        found.root = replace(self.tree.root, children={}, links=None)
        copies: dict[str, Node] = {"": found.root}
        self._gone("", self.tree.root, found.root)
        same: set[str] = set()
        for path, node in self.tree.walk():
            known = node is self.nodes.get(path)
            if node.kind == "d":
                copies[path] = replace(node, children={}, links=None)
                self._gone(path, node, copies[path])
                if known and path not in NEEDED:  # which are said in any case: something must be root's, see below
                    same.add(path)
            elif not known:
                if node.kind == "f" and node.content is None:
                    raise Whole
                copies[path] = node
        # What is in a folder brings the folder with it: the deepest first.
        for path in reversed(copies):
            node = copies[path]
            if path and (node.children or path not in same):
                folder, _, name = path.rpartition("/")
                copies[folder].children[name] = node
        owners = {owner for _, node in found.walk() for owner in (node.uid, node.gid)}
        if not {0, found.root.uid, found.root.gid} <= owners:
            raise Whole  # squash.py can give the root folder only to whom something else belongs
        return found

    def _gone(self, path: str, node: Node, copy: Node) -> None:
        for name in self.names.get(path, ()):
            if name not in node.children:
                copy.children[name] = Node("w", 0o600)


def read(data: bytes, limits: Limits, origin: str) -> Below | None:
    """Return what `index` said, None if it says nothing sensible."""
    try:
        entries = msgspec.msgpack.decode(data, type=list[_Entry])
    except (msgspec.DecodeError, msgspec.ValidationError):
        return None
    tree = Tree(limits, origin)
    order: list[Node] = []
    nodes: dict[str, Node] = {}
    names: dict[str, list[str]] = {}
    for path_, kind, mode, uid, gid, mtime, target, xattrs, same in entries:
        path = _text(path_)
        folder, _, name = path.rpartition("/")
        attributes = {_text(key): value for key, value in xattrs}
        node = order[same] if same >= 0 else Node(kind, mode, uid, gid, mtime, attributes, _text(target))
        order.append(node)
        nodes[path] = node
        if kind == "d":
            names[path] = []
        if path:
            nodes[folder].children[name] = node
            names[folder].append(name)
        else:
            tree.root = node
    return Below(tree, limits, nodes, names) if "" in nodes else None


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")
