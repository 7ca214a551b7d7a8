"""What can be done on a program's behalf, as the answerer is asked for it (guest/PROTOCOL.md, "Answers": P, M, N)."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from trivisor.vos.syscalls.listener import ID, PID, Notification


@dataclass(frozen=True, slots=True)
class Wish:
    """One thing to be done for the program that waits in `notification`; `body` follows the request's number on the wire."""

    what: str
    """P open, M mount, N mknod."""
    notification: Notification
    body: bytes
    cloexec: bool = False


def opening(notification: Notification, dirfd: int, path: bytes, flags: int, mode: int, resolve: int, cloexec: bool) -> Wish:
    """Open as openat2(2) does; the program's descriptor is close-on-exec if it asked for that."""
    body = _who(notification) + struct.pack("<iQQQ", dirfd, flags, mode, resolve) + _string(path)
    return Wish("P", notification, body, cloexec)


def mounting(notification: Notification, source: bytes, target: bytes, kind: bytes, flags: int, data: bytes) -> Wish:
    """Mount as mount(2) does."""
    return Wish("M", notification, _who(notification) + struct.pack("<Q", flags) + b"".join(map(_string, (source, target, kind, data))))


def making(notification: Notification, dirfd: int, path: bytes, mode: int, device: int) -> Wish:
    """Make a node as mknodat(2) does."""
    return Wish("N", notification, _who(notification) + struct.pack("<iIQ", dirfd, mode, device) + _string(path))


def _who(notification: Notification) -> bytes:
    return struct.pack("<QI", notification[ID], notification[PID])


def _string(text: bytes) -> bytes:
    return struct.pack("<I", len(text)) + text
