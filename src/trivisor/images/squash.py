"""From a tree to a squashfs: a clean tar stream into sqfstar(1), which needs no root.

The stream is tarwrite's, so the same tree gives the same bytes.

sqfstar 4.5 gives the root folder its own user and the present time whatever it is told (4.6 does better),
so the root's inode is set right in the finished file; see `_patch_root`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import struct
import subprocess
from collections.abc import Iterator, Sequence
from fcntl import F_SETPIPE_SZ, fcntl
from pathlib import Path

from trivisor.core.errors import EngineError, ImageError
from trivisor.core.process import TAIL, find
from trivisor.images.source import Source
from trivisor.images.tarwrite import emit
from trivisor.images.tree import Node, Tree
from trivisor.store.faults import from_os

# A guest under TCG unpacks some twenty times slower than the host. Measured there on a Debian root (195 MB tar), cold:
#              size    python3 imports json, subprocess    read of the libraries
#   zstd       61 MB   0.63-0.87 s                         0.90-1.13 s
#   lz4        94 MB   0.53 s                              0.50 s
#   lz4, 32K   98 MB   0.62 s                              0.75 s
#   none      184 MB   0.52 s                              0.43 s
# lz4 is nearly as quick as none at half the size. Inodes and folders stay unpacked: small, and read all the time.
COMPRESSION = ("-comp", "lz4", "-noI")
# sqfstar's search for duplicates compares each file with all of its size: 200000 small ones took 5 minutes, and without
# it 2 seconds. On a Debian root it saves 2 %.
NO_SEARCH = "-no-duplicates"
STALL = 300.0
"""Seconds for which sqfstar may take no input (a slow disk), and to finish."""


def make(tree: Tree, sources: Sequence[Source], target: Path) -> None:
    """Write `tree` to the new file `target`. Raises ImageError, EngineError, StorageError, HostLacks."""
    argv = [find("sqfstar", "squashfs-tools"), *COMPRESSION, NO_SEARCH, "-exit-on-error", "-quiet", "-no-progress"]
    argv += ["-mkfs-time", "0", "-root-mode", f"{tree.root.mode:o}", str(target)]
    with _Sqfstar(argv, target.parent) as sqfstar:
        fed = False
        with contextlib.suppress(BrokenPipeError):  # its status and last words tell more than the pipe
            emit(tree, sources, sqfstar.write)
            fed = True
        status = sqfstar.finish()
    if status or not fed:
        output = sqfstar.said.decode(errors="replace")
        if os.strerror(errno.ENOSPC) in output:
            raise from_os(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), target.parent)
        raise EngineError(f"sqfstar failed ({status})", command=argv, status=status, output=output)
    _patch_root(target, tree.root)


class _Sqfstar:
    """The running program: fed through a pipe, its words kept (in memory: the disk may be full), no wait without a bound."""

    def __init__(self, argv: list[str], cwd: Path) -> None:
        # Its environment is empty but for the path: SOURCE_DATE_EPOCH and others would change what it writes.
        env = {"PATH": os.environ.get("PATH", ""), "LC_ALL": "C"}
        pipe, output = subprocess.PIPE, subprocess.STDOUT
        self._process = subprocess.Popen(argv, stdin=pipe, stdout=pipe, stderr=output, env=env, cwd=cwd)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._in, self._out = self._process.stdin, self._process.stdout
        os.set_blocking(self._in.fileno(), False)
        with contextlib.suppress(PermissionError):  # over this user's share of pipe memory: smaller steps do as well
            fcntl(self._in.fileno(), F_SETPIPE_SZ, 1 << 20)
        self._poll = select.poll()
        self._poll.register(self._out, select.POLLIN)
        self._poll.register(self._in, select.POLLOUT)
        self.said = b""

    def __enter__(self) -> _Sqfstar:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._in.close()
        self._out.close()

    def write(self, data: bytes) -> None:
        """Feed `data`. Raises BrokenPipeError when it has ended, or takes nothing for too long."""
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(self._in.fileno(), view) :]
            except BlockingIOError:
                self._listen()

    def finish(self) -> int:
        """End its input, wait until it has ended and return its status; killed when it takes too long."""
        self._poll.unregister(self._in)
        self._in.close()
        try:
            while self._listen():
                pass
            return self._process.wait(STALL)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self._process.kill()
            return self._process.wait()

    def _listen(self) -> bool:
        """Wait until it takes more or says something; tell whether its output is still open."""
        ready = dict(self._poll.poll(STALL * 1000))
        if not ready:
            raise BrokenPipeError(errno.ETIMEDOUT, "sqfstar does nothing")
        if self._out.fileno() not in ready:
            return True
        words = os.read(self._out.fileno(), 65536)
        self.said = (self.said + words)[-TAIL:]
        return bool(words)


# The root's inode (squashfs, Documentation/filesystems/squashfs.rst): -noI leaves inodes and ids unpacked.

_SUPER = struct.Struct("<4sIIIIHHHHHHQQQQQ")


def _patch_root(path: Path, root: Node) -> None:
    with path.open("r+b", buffering=0) as file:
        fields = _SUPER.unpack(file.read(_SUPER.size))
        magic, count, inode, id_table, inode_table = fields[0], fields[8], fields[11], fields[13], fields[15]
        if magic != b"hsqs":
            raise ImageError(f"{path}: sqfstar wrote something else than squashfs")
        fd = file.fileno()
        (ids,) = struct.unpack("<Q", os.pread(fd, 8, id_table))
        known = struct.unpack(f"<{count}I", bytes(os.pread(fd, 1, place)[0] for place in _places(fd, ids, 0, 4 * count)))
        # The mount points or what lies in them are always root's, so 0 is known; an owner of "/" alone is not kept.
        owners = [known.index(owner if owner in known else 0) for owner in (root.uid, root.gid)]
        # struct squashfs_base_inode: type, mode, uid index, gid index (16 bits each), mtime, number (32 bits each)
        value = struct.pack("<HHI", *owners, root.mtime)
        for place, byte in zip(_places(fd, inode_table + (inode >> 16), (inode & 0xFFFF) + 4, len(value)), value, strict=True):
            os.pwrite(fd, bytes([byte]), place)


def _places(fd: int, block: int, offset: int, size: int) -> Iterator[int]:
    """Yield where in the file the `size` bytes of metadata from `offset` on are, across blocks."""
    while size:
        (header,) = struct.unpack("<H", os.pread(fd, 2, block))
        length = header & 0x7FFF
        if not header & 0x8000:
            raise ImageError("sqfstar packed the inodes although it was told not to")
        for place in range(block + 2 + offset, block + 2 + min(length, offset + size)):
            yield place
            size -= 1
        block, offset = block + 2 + length, max(0, offset - length)
