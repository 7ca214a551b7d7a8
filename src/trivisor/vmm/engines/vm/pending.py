"""Frozen machines whose files are still being written, by a thread of this process: a copy's QEMU can be started meanwhile.

A copy may use them when they are whole, and hears of it if they do not become so. Another process never meets one: nobody else knows of
it yet.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from trivisor.core.errors import TrivisorError
from trivisor.vmm.engines.vm import files

if TYPE_CHECKING:
    from trivisor.vmm.engines.vm.frozen import Facts

_known: dict[Path, Pending] = {}


class Pending:
    """What is being written into one folder, as `facts` will say there."""

    def __init__(self, folder: Path, facts: Facts, write: Callable[[Callable[[], None]], object], memory: int | None) -> None:
        """`write` writes it all, and calls what it is given when its RAM is in `memory`, for QEMUs that share that (ram.py)."""
        self.facts = facts
        self._memory = os.dup(memory) if memory is not None else None
        self._closing = threading.Lock()
        self._filled = threading.Event()
        self._folder = folder
        self._write = write
        self._failure: TrivisorError | None = None
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._run, name="freezing", daemon=False)

    def wait(self) -> None:
        """Return when it is written. Raises what went wrong."""
        self._thread.join()
        if self._failure is not None:
            raise self._failure

    def share(self) -> int | None:
        """Return a descriptor of the memory that the RAM is written to first, the caller's to close; None if there is none, or no more."""
        with self._closing:
            return os.dup(self._memory) if self._memory is not None else None

    def wait_memory(self) -> None:
        """Return when that has it. Raises what went wrong."""
        self._filled.wait()
        if self._failure is not None:
            raise self._failure

    @property
    def ours(self) -> bool:
        """Whether the thread is of this process, and not of one that this was forked from."""
        return self._pid == os.getpid()

    def start(self) -> None:
        for folder in [*_known]:
            if not folder.exists():
                _known.pop(folder, None)
        _known[self._folder] = self
        self._thread.start()

    def _run(self) -> None:
        try:
            self._write(self._filled.set)
        except OSError as error:
            self._failure = files.storage(error, "freezing the machine")
        except TrivisorError as error:
            self._failure = error
        else:
            _known.pop(self._folder, None)
        finally:
            self._filled.set()
            with self._closing:
                if self._memory is not None:
                    os.close(self._memory)
                self._memory = None


def find(folder: Path) -> Pending | None:
    """Return what is being written into a folder, or could not be."""
    found = _known.get(folder)
    return found if found is not None and found.ours else None
