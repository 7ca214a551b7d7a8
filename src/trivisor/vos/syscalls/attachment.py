"""One listener and the handlers that answer it."""

from __future__ import annotations

import contextlib
import errno
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from trivisor.vos.syscalls.asked import PATHS, Handled
from trivisor.vos.syscalls.call import Call
from trivisor.vos.syscalls.listener import CONTINUE, Listener, Notification
from trivisor.vos.syscalls.table import names, signature


class Answering(Protocol):
    """A handler as a Policy keeps it (policy.Handler)."""

    @property
    def calls(self) -> tuple[str, ...]: ...
    @property
    def function(self) -> Callable[[Call], object]: ...
    @property
    def timeout(self) -> float: ...


@dataclass(frozen=True)
class Failure:
    """A call that was refused because its handler failed."""

    call: str
    pid: int
    handler: str
    error: BaseException


class Attachment:
    """One listener whose calls are answered here, until its last program has ended or it is closed."""

    def __init__(
        self,
        leave: Callable[[Attachment], None],
        listener: Listener,
        handled: Mapping[str, dict[int, Handled]],
        ruled: frozenset[int],
    ) -> None:
        self.listener = listener
        self.handled = handled
        """By architecture and number."""
        self.ruled = ruled
        self.ended = threading.Event()
        self.failures: deque[Failure] = deque(maxlen=100)
        self.failed = 0
        self.waiting: dict[int, Notification] = {}
        """Handed off to the rules; they may be handed back."""
        self.fds: tuple[int, ...] = ()
        self._leave = leave

    def close(self) -> None:
        """Leave it: what only a handler may answer fails from now on."""
        self._leave(self)

    def refuse(self, notification: Notification) -> None:
        """Have a call fail that nobody answers."""
        with contextlib.suppress(OSError):
            self.listener.answer(notification, 0, errno.EPERM, 0)


def handled_by(handlers: Iterable[Answering], architecture: str, refused: Mapping[int, int]) -> dict[int, Handled]:
    """Return what answers each call, by its number on `architecture`."""
    numbers = {name: number for number, name in names(architecture).items()}
    found: dict[int, Handled] = {}
    for handler in handlers:
        for name in handler.calls:
            number = numbers.get(name)
            if number is not None:
                proceeding = (0, refused[number], 0) if number in refused else (0, 0, CONTINUE)
                enforces = bool(getattr(handler, "enforces", False))
                known = signature(name)
                path = next((argument.index for argument in known.arguments if argument.kind in PATHS), None)
                found[number] = Handled(handler.function, known, handler.timeout, enforces, proceeding=proceeding, path=path)
    return found
