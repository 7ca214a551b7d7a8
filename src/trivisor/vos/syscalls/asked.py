"""What a program asks for in a held system call: the half of Call that reads.

Nothing is decoded before a handler asks for it. What a pointer argument leads to is copied once and kept: a program that
changes it meanwhile changes nothing of what the handler decides on. Every length is the program's word and is bounded.
"""

from __future__ import annotations

import errno as errnos
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from trivisor.core.errors import BadArgument, CallGone
from trivisor.vos.syscalls import decode
from trivisor.vos.syscalls.listener import ARCH, ARCHS, ARGS, CONTINUE, ID, MAX_COPY, NR, PID, Listener, Notification
from trivisor.vos.syscalls.table import Argument, Signature

if TYPE_CHECKING:
    from trivisor.vos.syscalls.call import Call

_T = TypeVar("_T")
PATH_MAX = 4096
MAX_BUFFER = 1 << 20
"""Bytes of a buffer that are copied unless the handler asks for more."""
AT_FDCWD = -100
PATHS = frozenset(("path", "str"))
BUFFERS = frozenset(("in", "out", "iovec", "iovec_out", "msghdr", "msghdr_out"))
_INPUTS = frozenset(("in", "iovec", "msghdr"))
_VECTORS = frozenset(("iovec", "iovec_out", "msghdr", "msghdr_out"))
_ADDRESSES = frozenset(("sockaddr",))
_FLAGS = frozenset(decode.FLAGS)
_SIGNED = {"int": 32, "fd": 32, "dirfd": 32, "pid": 32, "sig": 32, "int64": 64}
_NARROW = frozenset(("mode", "uid"))


@dataclass(frozen=True, slots=True)
class Handled:
    """A handler and what it was registered for. `timeout` in seconds; `errno` is what the program gets if it fails."""

    function: Callable[[Call], object]
    signature: Signature
    timeout: float = 5.0
    enforces: bool = False
    errno: int = errnos.EPERM
    proceeding: tuple[int, int, int] = (0, 0, CONTINUE)
    """The answer that lets the call go on (value, errno, flags): an errno where the wall's profile does not allow it at all."""
    path: int | None = None
    """The index of its first path."""


class Asked:
    """What a held call is and points to."""

    __slots__ = ("_copies", "_handled", "_listener", "_notification", "answered")

    def __init__(self, listener: Listener, notification: Notification, handled: Handled) -> None:
        self._listener = listener
        self._notification = notification
        self._handled = handled
        self._copies: dict[Any, Any] | None = None
        self.answered = False
        """True once the program has its answer, whoever gave it."""

    # -- what it is -------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        return self._handled.signature.name

    @property
    def nr(self) -> int:
        """Its number in the machine's architecture."""
        return self._notification[NR]

    @property
    def id(self) -> int:
        """The kernel's cookie of this one call."""
        return self._notification[ID]

    @property
    def pid(self) -> int:
        """The calling thread: as this host sees it on the container wall, as the machine does on the vm wall."""
        return self._notification[PID]

    @property
    def machine(self) -> str:
        """The architecture: x86_64 or aarch64."""
        return ARCHS.get(self._notification[ARCH], "x86_64")

    @property
    def args(self) -> tuple[int, ...]:
        """The six registers, as they are."""
        return self._notification[ARGS:]

    @property
    def valid(self) -> bool:
        """Whether the program still waits."""
        return not self.answered and self._listener.valid(self._notification)

    def arg(self, which: str | int) -> int:
        """Return an argument by name or index as the number it is: signed where the kernel takes it so. Raises LookupError."""
        argument = self._handled.signature.find(which, PATHS)
        return self._number(argument)

    def __getitem__(self, which: str | int) -> int:
        return self.arg(which)

    def __repr__(self) -> str:
        names = ", ".join(f"{a.name}={self._number(a):#x}" for a in self._handled.signature.arguments)
        return f"<Call {self.name}({names}) of {self.pid}>"

    # -- what its pointers lead to ----------------------------------------------------------------

    def read(self, address: int, size: int) -> bytes:
        """Copy `size` bytes of the program's memory, at most 16 MiB; fewer where they end. Raises BadArgument, CallGone."""
        if size > MAX_COPY:
            raise BadArgument(errnos.EINVAL, f"{size} bytes are more than may be copied")
        return self._copy(("read", address, size), lambda: self._listener.read(self._notification, address, size))

    def string(self, address: int, most: int = PATH_MAX) -> bytes:
        """Copy the string at `address`, without its NUL. Raises BadArgument (ENAMETOOLONG) if it has none within `most` bytes."""
        copies = self._copies
        if copies is None:
            copies = self._copies = {}
        key = (address, most)
        if key not in copies:
            if self.answered:
                self._check()
            text = self._listener.string(self._notification, address, min(most, MAX_COPY))
            if text is None:
                raise BadArgument(errnos.ENAMETOOLONG, f"the string at {address:#x} is longer than {most} bytes")
            copies[key] = text
        found: bytes = copies[key]
        return found

    def path(self, which: str | int | None = None) -> str:
        """Return a string argument, the first path unless told otherwise, as the program wrote it: perhaps relative.

        Bytes that are not UTF-8 are kept as os.fsdecode does.
        """
        return os.fsdecode(self.path_bytes(which))

    def path_bytes(self, which: str | int | None = None) -> bytes:
        """Return the same as bytes."""
        handled = self._handled
        index = handled.path if which is None else handled.signature.find(which, PATHS).index
        if index is None:
            index = handled.signature.find(None, PATHS).index  # says what there is instead
        return self.string(self._notification[ARGS + index])

    def full_path(self, which: str | int | None = None) -> str:
        """Return a path made absolute against the program's directory, or the descriptor that goes with it, and without . and `..`.

        It is what the words say: links in it are not followed, and the program may change its directory. For watching.
        """
        argument = self._handled.signature.find(which, PATHS)
        path = self.path(argument.index)
        if path.startswith("/"):
            return os.path.normpath(path).replace("//", "/")
        start = self._handled.signature.before(argument)
        number = AT_FDCWD if start is None else self._number(start)
        try:
            folder = self.link("cwd" if number == AT_FDCWD else f"fd/{number}")
        except FileNotFoundError as error:
            raise BadArgument(errnos.EBADF, f"the program has no descriptor {number}") from error
        return os.path.normpath(f"{folder}/{path}").replace("//", "/")

    def fd_path(self, which: str | int = 0) -> str:
        """Return what the program's descriptor in an argument is: a path, or such as socket:[123]. For watching. Raises BadArgument."""
        number = self.arg(which)
        try:
            return self.link(f"fd/{number}")
        except FileNotFoundError as error:
            raise BadArgument(errnos.EBADF, f"the program has no descriptor {number}") from error

    def link(self, name: str) -> str:
        """Return where a link of /proc/PID leads: cwd, exe, fd/3. Raises FileNotFoundError, CallGone."""
        return self._copy(("link", name), lambda: self._listener.link(self._notification, name))

    def sockaddr(self, which: str | int | None = None) -> decode.Address:
        """Return the address that a connect, bind or sendto names; of sendmsg, the one in its msghdr."""
        signature = self._handled.signature
        if which is None and any(argument.kind == "msghdr" for argument in signature.arguments):
            head = self.msghdr()
            at, size = head.name, head.name_length
        else:
            argument = signature.find(which, _ADDRESSES)
            at, size = self._notification[ARGS + argument.index], self._size(argument) & 0xFFFFFFFF
        if not at:
            return decode.Address("AF_UNSPEC")
        return self._copy(
            ("sockaddr", at, size), lambda: self._decoded(lambda: decode.address(self._listener_read(at, size, decode.MAX_ADDRESS)))
        )

    def buffer(self, which: str | int | None = None, most: int = MAX_BUFFER) -> bytes:
        """Return what the program hands to the call (write, sendto, writev, sendmsg ...), at most `most` bytes of it.

        A vector's pieces are joined.
        """
        argument = self._handled.signature.find(which, _INPUTS if which is None else BUFFERS)
        most = min(most, MAX_COPY)
        if argument.kind in ("in", "out"):
            return self.read(self._notification[ARGS + argument.index], min(self._size(argument), most))
        return self._copy(("buffer", argument.index, most), lambda: self._gather(argument, most))

    def iovec(self, which: str | int | None = None) -> tuple[tuple[int, int], ...]:
        """Return the pieces of a vector: address and length each."""
        argument = self._handled.signature.find(which, _VECTORS)
        if argument.kind.startswith("msghdr"):
            head = self.msghdr(argument.index)
            at, count = head.vector, head.count
        else:
            at, count = self._notification[ARGS + argument.index], self._size(argument)
        if count > decode.MAX_IOVEC:
            raise BadArgument(errnos.EINVAL, f"a vector of {count} pieces")
        return self._copy(("iovec", at, count), lambda: self._decoded(lambda: decode.iovec(self._whole(at, 16 * count))))

    def msghdr(self, which: str | int | None = None) -> decode.Message:
        """Return the struct msghdr of sendmsg and recvmsg."""
        argument = self._handled.signature.find(which, frozenset(("msghdr", "msghdr_out")))
        at = self._notification[ARGS + argument.index]
        return self._copy(("msghdr", at), lambda: self._decoded(lambda: decode.message(self._whole(at, 56))))

    def controls(self) -> tuple[decode.Control, ...]:
        """Return the control messages of sendmsg, such as descriptors."""
        head = self.msghdr()
        return decode.controls(self.read(head.control, head.control_length)) if head.control else ()

    def struct(self, which: str | int | None = None) -> decode.Fields:
        """Return a struct argument (timespec, rlimit, open_how ...) by the names of its fields. Raises BadArgument if it is NULL."""
        argument = self._handled.signature.find(which, frozenset(decode.STRUCTS))
        kind, at = argument.kind.removesuffix("_out"), self._notification[ARGS + argument.index]
        size = decode.STRUCTS[kind].size
        return self._copy(("struct", at, kind), lambda: self._decoded(lambda: decode.fields(kind, self._whole(at, size))))

    @property
    def flags(self) -> decode.Flags:
        """The first flags argument: a number that knows its names. openat2's are in its struct."""
        signature = self._handled.signature
        if any(argument.kind == "open_how" for argument in signature.arguments):
            return decode.flags("OPEN", int(self.struct()["flags"]), self.machine)
        return self.flag()

    def flag(self, which: str | int | None = None) -> decode.Flags:
        """Return a flags argument: `"O_CREAT" in call.flag("flags")`. Raises LookupError if it is none."""
        argument = self._handled.signature.find(which, _FLAGS)
        if argument.kind not in _FLAGS:
            raise LookupError(f"{argument.name} of {self.name} holds no flags")
        wide = self._notification[ARGS + argument.index]
        return decode.flags(argument.kind, wide if argument.kind in ("CLONE", "MOUNT") else wide & 0xFFFFFFFF, self.machine)

    # -- inside -----------------------------------------------------------------------------------

    def _number(self, argument: Argument) -> int:
        value = self._notification[ARGS + argument.index]
        bits = _SIGNED.get(argument.kind)
        if bits is None:
            return value & 0xFFFFFFFF if argument.kind in _NARROW else value
        value &= (1 << bits) - 1
        return value - (1 << bits) if value >> (bits - 1) else value

    def _size(self, argument: Argument) -> int:
        assert argument.length is not None, argument.name
        return self._notification[ARGS + argument.length]

    def _copy(self, key: object, take: Callable[[], _T]) -> _T:
        copies = self._copies
        if copies is None:
            copies = self._copies = {}
        if key not in copies:
            self._check()
            copies[key] = take()
        found: _T = copies[key]
        return found

    def _listener_read(self, at: int, size: int, most: int) -> bytes:
        if size > most:
            raise BadArgument(errnos.EINVAL, f"{size} bytes where at most {most} belong")
        return self._whole(at, size)

    def _whole(self, at: int, size: int) -> bytes:
        raw = self.read(at, size)
        if len(raw) < size:
            raise BadArgument(errnos.EFAULT, f"only {len(raw)} of {size} bytes can be read at {at:#x}")
        return raw

    @staticmethod
    def _decoded(decoded: Callable[[], _T]) -> _T:
        try:
            return decoded()
        except ValueError as error:
            raise BadArgument(errnos.EINVAL, str(error)) from error

    def _gather(self, argument: Argument, most: int) -> bytes:
        parts, left = [], most
        for at, size in self.iovec(argument.index):
            take = min(size, left)
            if take:
                part = self.read(at, take)
                parts.append(part)
                left -= len(part)
                if len(part) < take:
                    break
        return b"".join(parts)

    def _check(self) -> None:
        if self.answered:
            raise CallGone(f"{self.name} has been answered: its handler took longer than {self._handled.timeout:g} s, or has ended")
