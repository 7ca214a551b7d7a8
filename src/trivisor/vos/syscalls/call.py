"""A held system call, as a handler gets it: what the program asks for (asked.py), and what it shall get.

An answer is noted when the handler gives it and sent when the handler returns, so a handler that raises after all has
refused the call, and one that gives no answer has, too.

Which answers enforce: `returns`, `errno`, `give` and those on the program's behalf, `open`, `mount` and `mknod`, act on what was
copied, or on nothing. `proceed` lets the kernel read the program's memory again, which another thread may have changed: it is for watching,
and for decisions on plain numbers. A handler that was registered to enforce cannot proceed with a call whose memory it looked at.
"""

from __future__ import annotations

import errno as errnos
import os
import time
from collections.abc import Mapping
from typing import Any, Protocol

from trivisor.core.errors import BadArgument, CallerError, CallGone
from trivisor.vos.syscalls import behalf, decode
from trivisor.vos.syscalls.asked import AT_FDCWD, BUFFERS, PATHS, Asked, Handled
from trivisor.vos.syscalls.listener import ARGS, MAX_COPY, Listener, Notification

__all__ = ["Call", "Handled", "HasFileno"]

MAX_DELAY = 3600.0


class HasFileno(Protocol):
    """A file or a socket."""

    def fileno(self) -> int: ...


class Call(Asked):
    """One held call. Usable until it is answered; by one thread."""

    __slots__ = ("_answer", "_delay", "_turn")

    def __init__(self, listener: Listener, notification: Notification, handled: Handled) -> None:
        self._listener = listener
        self._notification = notification
        self._handled = handled
        self._copies = None
        self._answer: Any = None
        self._delay = 0.0
        self._turn = [True]
        self.answered = False

    # -- answers ----------------------------------------------------------------------------------

    def proceed(self) -> None:
        """Have the kernel carry the call out. Enforces nothing of what was read from the program's memory (see above).

        A call that the wall's profile never allows gets the profile's errno all the same.
        """
        if self._handled.enforces and self._copies:
            raise CallerError(
                f"a handler that enforces cannot proceed with {self.name} after looking at the program's memory: it may change",
                hint="answer with call.open(), call.give(...) or call.errno(...), or register it to watch",
            )
        self._note(self._handled.proceeding)

    def returns(self, value: int = 0) -> None:
        """The call returns `value` (-4095 to -1 would be an error: use errno) and does nothing else."""
        if not -(1 << 63) <= value < 1 << 64 or -4096 < value < 0:
            raise CallerError(f"a call cannot return {value}", hint="for an error, call.errno(number)")
        self._note((value - (1 << 64) if value >= 1 << 63 else value, 0, 0))

    def errno(self, number: int) -> None:
        """The call fails with `number`, such as errno.ENOENT."""
        if not 0 < number < 4096:
            raise CallerError(f"{number} is no errno", hint="1 to 4095, for example errno.EACCES")
        self._note((0, number, 0))

    def give(
        self,
        source: bytes | bytearray | memoryview | str | int | HasFileno,
        *,
        fd: int | None = None,
        cloexec: bool | None = None,
        returns: int | None = None,
    ) -> None:
        """The program gets a descriptor: of an unchangeable file with these bytes, or a duplicate of a file, socket or number of ours.

        The call returns its number, or `returns`. With `fd` it takes the place of that descriptor of the program, and the
        call returns 0 unless told otherwise: how a connect is answered. It is close-on-exec if the call's flags, or the
        descriptor in whose place it comes, say so. A file or socket may be closed as soon as this returns.
        """
        self._check()
        content: bytes | int
        if isinstance(source, str):
            content = source.encode()
        elif isinstance(source, bytes | bytearray | memoryview):
            content = bytes(source)
        else:
            content = os.dup(source if isinstance(source, int) else source.fileno())
        if fd is not None and returns is None:
            returns = 0
        self._note(_Given(content, fd, self._closes(fd) if cloexec is None else cloexec, returns))

    def install(self, source: bytes | int | HasFileno, *, fd: int | None = None, cloexec: bool = True) -> int:
        """Give the program a descriptor at once and return its number, leaving the call unanswered: for pipe, accept, recvmsg."""
        self._check()
        content = source if isinstance(source, bytes | int) else source.fileno()
        return self._listener.give(self._notification, content, fd, cloexec, send=False)

    def write(self, where: str | int, data: bytes, *, offset: int = 0) -> int:
        """Copy `data` to where a pointer argument (by name or index) leads, and return its length. Raises BadArgument, CallGone.

        A buffer, and a vector, get no more than fits.
        """
        self._check()
        argument = self._handled.signature.find(where, BUFFERS)
        at = self._notification[ARGS + argument.index] + offset
        if argument.kind in ("iovec", "iovec_out", "msghdr_out"):
            return self._scatter(argument.index, data[:MAX_COPY])
        if argument.kind in ("in", "out"):
            data = data[: max(0, self._size(argument) - offset)]
        self._listener.write(self._notification, at, data)
        return len(data)

    def write_at(self, address: int, data: bytes) -> None:
        """Copy `data` to an address in the program. Raises BadArgument, CallGone."""
        self._check()
        self._listener.write(self._notification, address, data)

    def write_struct(self, where: str | int, values: Mapping[str, int | str | bytes]) -> None:
        """Write a struct argument (utsname, timespec, sysinfo ...), with 0 where `values` names no field. NULL is passed over."""
        argument = self._handled.signature.find(where, frozenset())
        kind = argument.kind.removesuffix("_out")
        if kind not in decode.STRUCTS:
            raise LookupError(f"{argument.name} of {self.name} is no struct that is known; use write")
        if self._notification[ARGS + argument.index]:
            self.write(argument.index, decode.encode_fields(kind, values))

    def write_sockaddr(self, where: str | int, raw: bytes) -> None:
        """Write an address (decode.encode_address) as accept and getpeername do: cut to the room there is, with its length."""
        argument = self._handled.signature.find(where, frozenset())
        at, length_at = self._notification[ARGS + argument.index], self._size(argument)
        if at and length_at:
            room = int.from_bytes(self._whole(length_at, 4), "little")
            self.write_at(at, raw[: min(room, decode.MAX_ADDRESS)])
            self.write_at(length_at, len(raw).to_bytes(4, "little"))

    def delay(self, seconds: float) -> None:
        """Send the answer that much later. Other calls are answered meanwhile."""
        if not 0 <= seconds <= MAX_DELAY:
            raise CallerError(f"a call cannot be delayed by {seconds} s", hint=f"0 to {MAX_DELAY:g}")
        self._check()
        self._delay = seconds

    def open(self, path: str | bytes | None = None, flags: int | None = None, mode: int | None = None) -> None:
        """Open for the program what it asked for, or `path`, and give it that: enforcement.

        It resolves in the program's root and directory, with its credentials and umask; what was copied is what is opened. The program gets
        the errno if it fails.
        """
        dirfd, resolve = AT_FDCWD, 0
        signature = self._handled.signature
        if path is None:
            argument = signature.find(None, PATHS)
            path = self.path_bytes(argument.index)
            start = signature.before(argument)
            dirfd = AT_FDCWD if start is None else self._number(start)
        if any(argument.kind == "open_how" for argument in signature.arguments):
            how = self.struct()
            resolve = int(how["resolve"])
            flags, mode = int(how["flags"]) if flags is None else flags, int(how["mode"]) if mode is None else mode
        if flags is None:
            flags = os.O_CREAT | os.O_WRONLY | os.O_TRUNC if self.name == "creat" else int(self.flag())
        if mode is None:
            mode = next((self._number(a) for a in signature.arguments if a.kind == "mode"), 0) & 0o7777
        cloexec = bool(flags & os.O_CLOEXEC)
        self._note(behalf.opening(self._notification, dirfd, os.fsencode(path), flags, mode, resolve, cloexec))

    def mount(self) -> None:
        """Mount for the program what it asked for, with what its own user namespace allows."""
        source, target, kind, data = (self._optional(name) for name in ("source", "target", "filesystemtype", "data"))
        self._note(behalf.mounting(self._notification, source, target, kind, self.arg("mountflags"), data))

    def mknod(self) -> None:
        """Make for the program the node that it asked for, if it is one that is safe to have."""
        argument = self._handled.signature.find(None, PATHS)
        start = self._handled.signature.before(argument)
        dirfd = AT_FDCWD if start is None else self._number(start)
        path = self.path_bytes(argument.index)
        self._note(behalf.making(self._notification, dirfd, path, self.arg("mode"), self.arg("dev")))

    # -- called by the supervisor -----------------------------------------------------------------

    @property
    def wants(self) -> bool:
        """Whether its handler gave an answer."""
        return self._answer is not None

    @property
    def listener(self) -> Listener:
        return self._listener

    @property
    def handled(self) -> Handled:
        return self._handled

    @property
    def timeout(self) -> float:
        """Seconds that its handler has."""
        return self._handled.timeout

    @property
    def delayed(self) -> bool:
        return self._delay > 0

    @property
    def elsewhere(self) -> bool:
        """Whether its answer is still to come when its handler has ended: it stays held until then."""
        return self._delay > 0 or isinstance(self._answer, behalf.Wish)

    @property
    def due(self) -> float:
        """When to send the answer (monotonic), 0 for now."""
        return time.monotonic() + self._delay if self._delay else 0.0

    def claim(self) -> bool:
        """Take the one right to answer. A handler's thread and the watchdog may both try."""
        try:
            return self._turn.pop()
        except IndexError:
            return False

    def send(self) -> None:
        """Send the answer that was noted; whoever does so has claimed it."""
        answer = self._answer
        self.answered = True
        if type(answer) is tuple:
            self._listener.answer(self._notification, *answer)
            return
        try:
            if isinstance(answer, behalf.Wish):
                self._listener.behalf(answer)
            else:
                answer.carry_out(self._listener, self._notification)
        except CallGone:
            return
        except BadArgument as error:
            self._listener.answer(self._notification, 0, error.errno, 0)
        except OSError as error:
            self._listener.answer(self._notification, 0, error.errno or errnos.EIO, 0)

    def refuse(self, number: int) -> None:
        """Send errno `number` instead of what was noted; whoever does so has claimed it."""
        self.drop()
        self.answered = True
        self._listener.answer(self._notification, 0, number, 0)

    def drop(self) -> None:
        """Let go of what was to be given."""
        answer, self._answer = self._answer, None
        if isinstance(answer, _Given):
            answer.close()

    # -- inside -----------------------------------------------------------------------------------

    def _optional(self, name: str) -> bytes:
        return self.path_bytes(name) if self.arg(name) else b""

    def _scatter(self, index: int, data: bytes) -> int:
        done = 0
        for at, size in self.iovec(index):
            part = data[done : done + size]
            if part:
                self._listener.write(self._notification, at, part)
                done += len(part)
        return done

    def _closes(self, fd: int | None) -> bool:
        """Whether a descriptor that comes now is to be close-on-exec."""
        for argument in self._handled.signature.arguments:
            if argument.kind in ("OPEN", "SOCK"):
                return bool(self._notification[ARGS + argument.index] & os.O_CLOEXEC)
        return fd is not None

    def _note(self, answer: object) -> None:
        self._check()
        if self._answer is not None:
            if isinstance(answer, _Given):
                answer.close()
            raise CallerError(f"{self.name} has two answers", hint="a handler answers a call once")
        self._answer = answer


class _Given:
    """A descriptor for the program, as an answer."""

    def __init__(self, source: bytes | int, fd: int | None, cloexec: bool, returns: int | None) -> None:
        self.source = source
        self.fd = fd
        self.cloexec = cloexec
        self.returns = returns

    def carry_out(self, listener: Listener, notification: Notification) -> None:
        try:
            listener.give(notification, self.source, self.fd, self.cloexec, send=self.returns is None)
        finally:
            self.close()
        if self.returns is not None:
            listener.answer(notification, self.returns, 0, 0)

    def close(self) -> None:
        source, self.source = self.source, b""
        if isinstance(source, int):
            os.close(source)
