"""From a tree to a tar: nothing but what the tree holds, in an order that depends on the tree alone.

Folders, links and FIFOs come by name; files in the order in which their bytes lie in their source, which is therefore read once,
forward; hard links last. So the same input gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from trivisor.images.source import Source, read
from trivisor.images.tree import Node, Tree

_TYPES = {"f": b"0", "h": b"1", "l": b"2", "d": b"5", "p": b"6", "w": b"3"}
"""Of kind "w" is the device node 0:0, overlayfs's whiteout: in roots alone, in no layer."""


def emit(tree: Tree, sources: Sequence[Source], write: Callable[[bytes], object], *, root: bool = False) -> None:
    """Give the tar to `write`, in pieces; with `root` the root folder's own entry too. Raises ImageError."""
    if root:
        write(_header("./", "d", tree.root))
    files: list[tuple[int, int, str, Node]] = []
    links: list[tuple[str, str, Node]] = []
    first: dict[int, str] = {}
    for path, node in tree.walk():
        if node.kind != "f":
            write(_header(path, node.kind, node, target=node.target))
        elif (primary := first.setdefault(id(node), path)) != path:
            links.append((path, primary, node))
        elif node.content is None:
            raise tree.bad(path, "has no content")
        else:
            files.append((node.content.source, node.content.position, path, node))
    files.sort(key=lambda file: file[:3])
    for number, _, path, node in files:
        content = node.content
        assert content is not None
        write(_header(path, "f", node, size=content.size))
        for data in read(sources[number], content):
            write(data)
        write(bytes(-content.size % 512))
    for path, primary, node in links:
        write(_header(path, "h", node, target=primary))
    write(bytes(1024))


def _header(path: str, kind: str, node: Node, *, target: str = "", size: int = 0) -> bytes:
    name, link = path.encode("utf-8", "surrogateescape"), target.encode("utf-8", "surrogateescape")
    records = []
    if len(name) > 100:
        records.append((b"path", name))
    if len(link) > 100:
        records.append((b"linkpath", link))
    if kind != "h":
        records += [(b"SCHILY.xattr." + key.encode("utf-8", "surrogateescape"), value) for key, value in node.xattrs.items()]
    extension = b"".join(_record(key, value) for key, value in records)
    header = _block(name, _TYPES[kind], node, link, size)
    if not extension:
        return header
    return _block(b"pax", b"x", Node("f"), b"", len(extension)) + extension + bytes(-len(extension) % 512) + header


def _record(key: bytes, value: bytes) -> bytes:
    rest = len(key) + len(value) + 3
    length = rest + len(str(rest))
    length = rest + len(str(length))  # its own digits may add one
    return b"%d %s=%s\n" % (length, key, value)


def _block(name: bytes, kind: bytes, node: Node, link: bytes, size: int) -> bytes:
    fields = (
        name[:100].ljust(100, b"\0"),
        _number(node.mode, 8),
        _number(node.uid, 8),
        _number(node.gid, 8),
        _number(size, 12),
        _number(node.mtime, 12),
        b" " * 8,
        kind,
        link[:100].ljust(100, b"\0"),
        b"ustar\x0000",
        bytes(247),
    )
    block = b"".join(fields)
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def _number(value: int, width: int) -> bytes:
    if value < 8 ** (width - 1):
        return b"%0*o\0" % (width - 1, value)
    return b"\x80" + value.to_bytes(width - 1, "big")
