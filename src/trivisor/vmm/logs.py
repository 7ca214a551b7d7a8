"""Reading a machine's logs, which the keeper writes, caps and rotates (NAME.log becomes NAME.log.1).

What is in them comes from the guest and is handed on as it is.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from typing import BinaryIO

from trivisor.core.errors import InvalidSpec
from trivisor.core.paths import MachineDir

SOURCES = ("serial", "init", "engine", "answer", "program")
_CHUNK = 64 << 10
_POLL = 0.1


def read(folder: MachineDir, source: str, follow: Callable[[], bool] | None) -> Iterator[bytes]:
    """Return an iterator over the chunks of a log, the rotated part first; of "all", with a title where the source changes.

    With `follow` it goes on while that returns True. Raises InvalidSpec at once for an unknown source.
    """
    if source not in (*SOURCES, "all"):
        raise InvalidSpec(f"there is no log {source!r}", hint=f"it is one of {', '.join(SOURCES)}, all")
    tails = [_Tail(folder, name) for name in (SOURCES if source == "all" else (source,))]
    return _chunks(tails, follow)


def _chunks(tails: list[_Tail], follow: Callable[[], bool] | None) -> Iterator[bytes]:
    last = tails[0] if len(tails) == 1 else None
    try:
        while True:
            # Asked before reading, so that what was written until the end is read after it.
            more = follow is not None and follow()
            for tail in tails:
                for chunk in tail.read():
                    if last is not tail:
                        yield f"==> {tail.name} <==\n".encode()
                        last = tail
                    yield chunk
            if not more:
                return
            # The standard library has no inotify; a log that is read by a person may lag this much.
            time.sleep(_POLL)
    finally:
        for tail in tails:
            tail.close()


class _Tail:
    """Where one reader is in one log."""

    def __init__(self, folder: MachineDir, name: str) -> None:
        self.name = name
        self._path = folder.log(name)
        self._old = self._path.with_name(self._path.name + ".1")
        self._file: BinaryIO | None = None
        self._begun = False

    def read(self) -> Iterator[bytes]:
        if not self._begun:
            self._begun = True
            self._file = _open(self._old)
            yield from self._rest()
        while True:
            yield from self._rest()
            if not self._moved_on():
                return

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _rest(self) -> Iterator[bytes]:
        while self._file is not None and (chunk := self._file.read(_CHUNK)):
            yield chunk

    def _moved_on(self) -> bool:
        """Go on to the file that has the log's name now; False if that is the one being read."""
        fresh = _open(self._path)
        if fresh is None:
            return False
        if self._file is not None and os.path.sameopenfile(self._file.fileno(), fresh.fileno()):
            fresh.close()
            return False
        if self._file is not None:
            self._file.close()
        self._file = fresh
        return True


def _open(path: os.PathLike[str]) -> BinaryIO | None:
    try:
        return open(path, "rb")
    except FileNotFoundError:
        return None
