"""What answers system calls through a kernel's listener, wherever that kernel is.

A Listener is one filter's seccomp user notification: direct.py holds the descriptor itself (container wall), remote.py
talks to the guest, which holds it (vm wall). Supervisor and Call know only this. A notification stays the plain tuple that
the struct unpacks to: on the way of each call nothing is built that its handler does not ask for.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from trivisor.vos.syscalls.behalf import Wish

Notification = tuple[int, ...]
"""struct seccomp_notif: id, pid (a thread's), flags, call number, AUDIT_ARCH, instruction pointer, six arguments."""
ID, PID, FLAGS, NR, ARCH, IP, ARGS = range(7)
NOTIFICATION = struct.Struct("<QIIiIQ6Q")
CONTINUE = 1
"""SECCOMP_USER_NOTIF_FLAG_CONTINUE: the kernel carries the call out."""
ARCHS = {0xC000003E: "x86_64", 0xC00000B7: "aarch64"}
"""AUDIT_ARCH to the name of a machine (os.uname().machine)."""
MAX_COPY = 16 << 20
"""Bytes that one pointer argument may make us copy."""


@dataclass(frozen=True, slots=True)
class Returned:
    """A call that was handed off to be given back: it is, or a rule answers it."""

    id: int
    answered: bool


class Listener(Protocol):
    """One filter's held calls. `receive` is called by one thread at a time, the rest by any.

    What names a call (`notification`) raises CallGone once nobody waits for it any more.
    """

    held: set[int]
    """Ids that were received earlier and are still unanswered: whoever goes on to the next call keeps them here."""

    def fileno(self) -> int:
        """Return a descriptor that is readable when there may be something to receive."""
        ...

    @property
    def connection(self) -> int | None:
        """Descriptor that is readable when `returned` may have something; None: never."""
        ...

    def receive(self) -> Notification | None:
        """Return the next held call, None if there is none after all. Raises GuestGone when none will come any more."""
        ...

    def returned(self) -> Sequence[Returned]:
        """Finish what was done on behalf, and return what became of calls handed off with `back`.

        Called by the serving thread when `connection` is readable. Raises GuestGone once nobody is there to hand off to.
        """
        ...

    def valid(self, notification: Notification) -> bool:
        """Whether the call is still held."""
        ...

    def read(self, notification: Notification, address: int, size: int) -> bytes:
        """Copy up to `size` bytes of the program's memory: fewer where what follows is not mapped. Raises BadArgument if nothing is."""
        ...

    def string(self, notification: Notification, address: int, most: int) -> bytes | None:
        """Copy the string at `address` without its NUL; None if it has none within `most` bytes. Raises BadArgument."""
        ...

    def write(self, notification: Notification, address: int, data: bytes) -> None:
        """Copy `data` into the program's memory. Raises BadArgument."""
        ...

    def link(self, notification: Notification, name: str) -> str:
        """Return where /proc/PID/`name` (cwd, fd/3) leads, as the program sees it. Raises FileNotFoundError."""
        ...

    def answer(self, notification: Notification, value: int, error: int, flags: int) -> bool:
        """Answer the call: `value` if `error` is 0, or CONTINUE in `flags`. False if nobody waits for it any more."""
        ...

    def give(self, notification: Notification, source: bytes | int, number: int | None, cloexec: bool, send: bool) -> int:
        """Give the program a descriptor and return its number: of a file that holds these bytes, or a duplicate of one of ours.

        With `number` it takes the place of that one. `send` answers the call with the number, in one step.
        """
        ...

    def hand_off(self, notification: Notification, back: bool) -> None:
        """Have the rules answer the call; with `back`, it comes again by `returned` if none matches. Raises OSError if nobody takes it."""
        ...

    def behalf(self, wish: Wish) -> None:
        """Have something done for the program, and its call answered when that is done: with its result, or its errno.

        Raises OSError if nobody will.
        """
        ...

    def close(self) -> None:
        """Leave it: calls that only a handler may answer fail from now on."""
        ...
