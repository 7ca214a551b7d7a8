"""Steps that can be taken back: each registers its undo; a failure runs them in reverse.

    with Undo() as undo:
        make_folder()
        undo.add("folder", remove_folder)
        ...
        undo.keep()          # the work is whole: nothing is taken back

An undo that itself fails does not stop the others; the failures are noted on the first error, or the
first of them is raised when there was none.
KeyboardInterrupt and SystemExit roll back like any other failure. What a kill -9 leaves is the
sweep's work (vmm/sweep.py), so every step must be one that the sweep can find.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Self

observer: Callable[[str], None] | None = None
"""Called with each step's name as it is registered. Tests kill the process here."""


class Undo:
    """A stack of undo steps, used as a context manager."""

    def __init__(self) -> None:
        self._steps: list[tuple[str, Callable[[], object]]] = []

    def add(self, name: str, step: Callable[[], object]) -> None:
        """Register `step`, which takes back what was just done; `name` is for messages and tests."""
        self._steps.append((name, step))
        if observer is not None:
            observer(name)

    def keep(self) -> None:
        """Forget every step: the work is whole."""
        self._steps.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        first = error
        while self._steps:
            name, step = self._steps.pop()
            try:
                step()
            except Exception as failure:
                if first is None:
                    first = failure
                else:
                    first.add_note(f"and undoing {name!r} failed: {failure}")
        if error is None and first is not None:
            raise first
