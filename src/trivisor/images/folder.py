"""A folder of the host as an image's root. Symbolic links are never followed; sockets are left out."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from trivisor.core.errors import ImageError
from trivisor.images.layer import add
from trivisor.images.limits import Limits
from trivisor.images.source import FolderSource
from trivisor.images.tarread import Entry
from trivisor.images.tree import Tree

_KINDS = {
    stat.S_IFREG: "f",
    stat.S_IFDIR: "d",
    stat.S_IFLNK: "l",
    stat.S_IFIFO: "p",
    stat.S_IFCHR: "c",
    stat.S_IFBLK: "b",
}


def read_folder(tree: Tree, folder: Path, limits: Limits) -> FolderSource:
    """Put what is in `folder` into `tree`. Raises ImageError, naming the file, for what cannot be read."""
    source = FolderSource()
    seen: dict[tuple[int, int], str] = {}
    total = 0
    todo = [""]
    while todo:
        name = todo.pop()
        path = folder / name
        try:
            facts = path.lstat() if name else path.stat()
            entry = _entry(path, name, facts)
            if entry is None:
                continue
            if entry.kind == "d":
                todo += [f"{name}/{base}" if name else base for base in sorted((child.name for child in path.iterdir()), reverse=True)]
        except OSError as error:
            raise ImageError(f"{path}: {error.strerror}", hint="import as a user who may read all of the folder") from error
        first = seen.setdefault((facts.st_dev, facts.st_ino), name) if facts.st_nlink > 1 and entry.kind != "d" else name
        if first != name:
            entry = Entry(name, "h", target=first)
        elif entry.kind == "f":
            entry.position = len(source.paths)
            source.paths.append(path)
            total += entry.size
        if total > limits.total:
            raise ImageError(f"{path}: the image is larger than the limit of {limits.total} bytes")
        add(tree, entry, 0)
    return source


def _entry(path: Path, name: str, facts: os.stat_result) -> Entry | None:
    kind = _KINDS.get(stat.S_IFMT(facts.st_mode))
    if kind is None:
        return None  # a socket: it means nothing without the process that bound it
    follow = not name
    return Entry(
        name,
        kind,
        mode=stat.S_IMODE(facts.st_mode),
        uid=facts.st_uid,
        gid=facts.st_gid,
        mtime=max(0, min(int(facts.st_mtime), 0xFFFFFFFF)),
        size=facts.st_size if kind == "f" else 0,
        stored=facts.st_size if kind == "f" else 0,
        target=os.readlink(path) if kind == "l" else "",  # noqa: PTH115  a Path would tidy the target
        device=(os.major(facts.st_rdev), os.minor(facts.st_rdev)),
        xattrs={key: os.getxattr(path, key, follow_symlinks=follow) for key in _attributes(path, follow)},
    )


def _attributes(path: Path, follow: bool) -> list[str]:
    try:
        return [key for key in os.listxattr(path, follow_symlinks=follow) if key.startswith("user.") or key == "security.capability"]
    except OSError:
        return []  # a file system without attributes
