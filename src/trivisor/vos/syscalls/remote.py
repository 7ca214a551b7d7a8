"""A listener in a machine with a kernel of its own, reached over the line: the vm wall.

The guest's builtin `answer TOKEN` holds the descriptor and carries notifications and what is asked of them (guest/PROTOCOL.md, "Answers").
A round trip is what costs here, so the guest is told what to read ahead: the strings, addresses and small structs that the
handled calls point to come with the notification, and answers wait for nothing. All that comes is hostile: a malformed message
ends the listener.

One thread takes what comes apart. It wakes the serving thread by two eventfds, one for calls and one for what was handed back, so
that Supervisor polls this listener as it polls a kernel's.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import struct
import threading
from collections import deque
from collections.abc import Iterable

from trivisor.core.errors import BadArgument, CallGone, GuestError, GuestGone, GuestProtocolError
from trivisor.vos import wire
from trivisor.vos.process import Process
from trivisor.vos.processes import Processes
from trivisor.vos.syscalls import decode
from trivisor.vos.syscalls.behalf import Wish
from trivisor.vos.syscalls.carrier import MAX_MESSAGE, REPLY_TIMEOUT, Carrier, Spares
from trivisor.vos.syscalls.channels import Channels
from trivisor.vos.syscalls.listener import ARGS, ID, NOTIFICATION, PID, Notification, Returned
from trivisor.vos.syscalls.table import names, signature

_MAX_WAITING = 1 << 16
"""Calls that the guest may have waiting here; it has no more threads."""
_ATTACH_TIMEOUT = 8.0
_AHEAD = 4096
_READ = 256 << 10
_SETFD, _SEND = 2, 1


class RemoteListener:
    """A listener over the line."""

    def __init__(self, process: Process, processes: Processes, ahead: bytes, *, token: bytes = b"", spares: Spares | None = None) -> None:
        """Take over `process`, the builtin, and wait until it is attached. Raises GuestError if it is not.

        One that rested is given `token`. `spares` gets it when it rests again.
        """
        self.machine = processes.machine
        self.held: set[int] = set()
        self._processes = processes
        self._wishes: dict[int, Wish] = {}
        self._calls: deque[Notification] = deque()
        self._back: deque[Returned] = deque()
        self._ahead: dict[int, dict[int, bytes]] = {}
        self._attached = threading.Event()
        self._bells = (os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK | os.EFD_SEMAPHORE), os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        self._channels = Channels(self._channel_data, self._channel_end)
        self._carrier = Carrier(process, self.machine, self._message, self._end, spares)
        self._carrier.start(token, ahead)
        self._attached.wait(_ATTACH_TIMEOUT)
        if not self._attached.is_set() or self._carrier.over:
            raise self._refusal()

    # -- what Supervisor polls --------------------------------------------------------------------

    def fileno(self) -> int:
        return self._bells[0]

    @property
    def connection(self) -> int | None:
        return self._bells[1]

    def receive(self) -> Notification | None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._bells[0])
        try:
            return self._calls.popleft()
        except IndexError:
            if self._carrier.over:
                raise GuestGone("the machine's answerer has gone", machine=self.machine) from None
            return None

    def returned(self) -> list[Returned]:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._bells[1])
        return [self._back.popleft() for _ in range(len(self._back))]

    # -- the program's memory ---------------------------------------------------------------------

    def valid(self, notification: Notification) -> bool:
        try:
            self._carrier.ask(b"v", struct.pack("<Q", notification[ID]))
        except (OSError, GuestError):
            return False
        return True

    def read(self, notification: Notification, address: int, size: int) -> bytes:
        if not size:
            return b""
        known = self._known(notification, address)
        if known is not None and len(known) >= size:
            return known[:size]
        parts: list[bytes] = []
        while size:
            piece = min(size, _READ)
            try:
                part = self._carrier.ask(b"r", self._who(notification) + struct.pack("<QI", address, piece))
            except OSError as error:
                if parts:
                    break
                raise self._memory_error(error, address) from error
            parts.append(part[:piece])
            address, size = address + len(part), size - len(part)
            if len(part) < piece:
                break
        if not any(parts):
            raise BadArgument(errno.EFAULT, f"nothing can be read at {address:#x}", machine=self.machine)
        return b"".join(parts)

    def string(self, notification: Notification, address: int, most: int) -> bytes | None:
        known = self._known(notification, address)
        if known is not None and len(known) < min(most, _AHEAD):
            return known
        raw = self.read(notification, address, most)
        end = raw.find(b"\0")
        if end < 0 and len(raw) < most:
            raise BadArgument(errno.EFAULT, f"the string at {address:#x} has no end", machine=self.machine)
        return raw[:end] if end >= 0 else None

    def write(self, notification: Notification, address: int, data: bytes) -> None:
        for at in range(0, len(data), _READ):
            part = data[at : at + _READ]
            try:
                self._carrier.ask(b"w", self._who(notification) + struct.pack("<Q", address + at) + part)
            except OSError as error:
                raise self._memory_error(error, address) from error

    def link(self, notification: Notification, name: str) -> str:
        done = self._processes.run_builtin(["lstat", f"/proc/{notification[PID]}/{name}"], timeout=REPLY_TIMEOUT, limit=1 << 16)
        if done.exit_code:
            raise FileNotFoundError(done.exit_code, os.strerror(done.exit_code), name)
        if not self.valid(notification):
            raise CallGone("the program has gone", machine=self.machine)
        return os.fsdecode(wire.parse_stat(wire.Reader(done.stdout)).target)

    # -- answers ----------------------------------------------------------------------------------

    def answer(self, notification: Notification, value: int, error: int, flags: int) -> bool:
        self._ahead.pop(notification[ID], None)
        if self._carrier.over:
            return False
        try:
            self._carrier.send(b"d", struct.pack("<QqiI", notification[ID], value, -error, flags))
        except GuestError:
            return False
        return True

    def give(self, notification: Notification, source: bytes | int, number: int | None, cloexec: bool, send: bool) -> int:
        flags = (_SETFD if number is not None else 0) | (_SEND if send else 0)
        if send:
            self._ahead.pop(notification[ID], None)
        head = struct.pack("<QBII", notification[ID], flags, number or 0, os.O_CLOEXEC if cloexec else 0)
        content = source if isinstance(source, bytes) else _content(source)
        try:
            if content is None:
                assert isinstance(source, int)
                channel = self._carrier.number()
                self._channels.add(channel, os.dup(source))
                try:
                    made = int.from_bytes(self._carrier.ask(b"F", head, channel)[:4], "little", signed=True)
                except BaseException:
                    self._channels.abandon(channel)
                    raise
                self._channels.begin(channel)
                return made
            if len(content) > MAX_MESSAGE - 64:
                raise OSError(errno.EFBIG, f"{len(content)} bytes are more than a machine can be given at once")
            return int.from_bytes(self._carrier.ask(b"f", head + content)[:4], "little", signed=True)
        except FileNotFoundError as error:
            raise CallGone("the program has gone", machine=self.machine) from error

    def hand_off(self, notification: Notification, back: bool) -> None:
        self._carrier.send(b"h", bytes([back]) + NOTIFICATION.pack(*notification))

    def behalf(self, wish: Wish) -> None:
        self.held.add(wish.notification[ID])
        number = self._carrier.number()
        self._wishes[number] = wish
        try:
            self._carrier.send({"P": b"p", "M": b"m", "N": b"N"}[wish.what], struct.pack("<I", number) + wish.body)
        except BaseException:
            self._wishes.pop(number, None)
            self.held.discard(wish.notification[ID])
            raise

    def close(self) -> None:
        self._channels.close()
        self._carrier.close()
        bells, self._bells = self._bells, (-1, -1)
        for bell in bells:
            if bell >= 0:
                os.close(bell)

    # -- inside -----------------------------------------------------------------------------------

    @staticmethod
    def _who(notification: Notification) -> bytes:
        return struct.pack("<QI", notification[ID], notification[PID])

    def _known(self, notification: Notification, address: int) -> bytes | None:
        """Return what came with the call of what is at `address`."""
        ahead = self._ahead.get(notification[ID])
        if ahead:
            for argument, data in ahead.items():
                if notification[ARGS + argument] == address:
                    return data
        return None

    def _memory_error(self, error: OSError, address: int) -> Exception:
        if error.errno in (errno.ENOENT, errno.ESRCH):
            return CallGone("the program has gone", machine=self.machine)
        if error.errno in (errno.EFAULT, errno.EIO):
            return BadArgument(errno.EFAULT, f"nothing is at {address:#x}", machine=self.machine)
        return error

    # -- inside: what comes -----------------------------------------------------------------------

    def _message(self, kind: int, body: bytes) -> None:
        if kind == ord("n"):
            self._notified(body)
        elif kind == ord("R"):
            number, code = struct.unpack_from("<Ii", body)
            self._replied(number, abs(code))
        elif kind in (ord("a"), ord("b")):
            came = Returned(struct.unpack("<Q", body)[0], kind == ord("a"))
            if came.answered:
                self._ahead.pop(came.id, None)
            self._back.append(came)
            os.eventfd_write(self._bells[1], 1)
        elif kind == ord("s"):
            self._channels.write(int.from_bytes(body[:4], "little"), body[4:])
        elif kind == ord("k"):
            self._channels.taken(*struct.unpack("<II", body))
        elif kind == ord("e"):
            self._channels.end(int.from_bytes(body[:4], "little"))
        elif kind == ord("o"):
            self._attached.set()
        else:
            raise GuestProtocolError(f"a message of kind {kind} from the answerer", machine=self.machine)

    def _notified(self, body: bytes) -> None:
        notification = NOTIFICATION.unpack_from(body)
        ahead: dict[int, bytes] = {}
        at = NOTIFICATION.size + 1
        for _ in range(min(body[at - 1], 6)):
            argument, size = struct.unpack_from("<BI", body, at)
            at += 5
            if argument < 6 and size <= len(body) - at:
                ahead[argument] = body[at : at + size]
            at += size
        if len(self._calls) >= _MAX_WAITING or len(self._ahead) >= _MAX_WAITING:
            raise GuestProtocolError("more calls than a machine can have", machine=self.machine)
        if ahead:
            self._ahead[notification[ID]] = ahead
        self._calls.append(notification)
        os.eventfd_write(self._bells[0], 1)

    def _replied(self, number: int, code: int) -> None:
        wish = self._wishes.pop(number, None)
        if wish is not None:  # else it came too late
            self.held.discard(wish.notification[ID])
            self._ahead.pop(wish.notification[ID], None)
            if code or wish.what != "P":
                self.answer(wish.notification, 0, code, 0)

    def _end(self) -> None:
        self._attached.set()
        self._channels.close()
        with contextlib.suppress(OSError):  # closed meanwhile
            os.eventfd_write(self._bells[0], 1)

    def _channel_data(self, channel: int, data: bytes) -> None:
        with contextlib.suppress(GuestError):
            self._carrier.send(b"s", struct.pack("<I", channel) + data)

    def _channel_end(self, channel: int) -> None:
        with contextlib.suppress(GuestError):
            self._carrier.send(b"e", struct.pack("<I", channel))

    def _refusal(self) -> GuestError:
        code = self._carrier.status()
        self.close()
        if code is None:
            return GuestError("the program's calls cannot be answered: the machine does not attach us", machine=self.machine)
        if code == errno.ESRCH:
            return CallGone("the programs whose calls were to be answered have ended", machine=self.machine)
        why = os.strerror(code) if code else "it has ended"
        return GuestError(f"the program's calls cannot be answered: {why}", machine=self.machine, hint="has it started?")


def dial(processes: Processes, token: bytes, calls: Iterable[str], architecture: str, spares: Spares) -> RemoteListener:
    """Borrow the listener that bears `token` from the machine's answerer; `calls` are those that have handlers. Raises GuestError."""
    ahead = read_ahead(calls, architecture)
    while spares:
        try:
            process = spares.pop()
        except IndexError:  # another thread was quicker
            break
        if not process.reachable:
            continue
        try:
            return RemoteListener(process, processes, ahead, token=token, spares=spares)
        except GuestError:
            if process.reachable:
                raise
            # It was killed in there: so it knows nothing of the token.
    process = processes.builtin(["answer", token.hex()], stdin=True)
    return RemoteListener(process, processes, ahead, spares=spares)


def read_ahead(calls: Iterable[str], architecture: str) -> bytes:
    """Return the table of what the guest is to send along with each call."""
    numbers = {name: number for number, name in names(architecture).items()}
    rows = []
    for name in calls:
        if name not in numbers:
            continue
        for argument in signature(name).arguments:
            if argument.kind in ("path", "str"):
                rows.append((numbers[name], argument.index, 0, 0))
            elif argument.kind in ("in", "sockaddr"):
                rows.append((numbers[name], argument.index, 2, argument.length or 0))
            elif argument.kind == "msghdr":
                rows.append((numbers[name], argument.index, 1, 56))
            elif argument.kind in decode.STRUCTS:
                rows.append((numbers[name], argument.index, 1, decode.STRUCTS[argument.kind].size))
    return struct.pack("<I", len(rows)) + b"".join(struct.pack("<IBBI", *row) for row in rows)


def _content(fd: int) -> bytes | None:
    """Return what a regular file holds, from where it stands; None if it is no file, or larger than can be given at once."""
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        return None
    here = os.lseek(fd, 0, os.SEEK_CUR)
    if status.st_size - here > MAX_MESSAGE - 64:
        raise OSError(errno.EFBIG, f"{status.st_size - here} bytes are more than a machine can be given at once")
    return os.pread(fd, status.st_size - here, here)
