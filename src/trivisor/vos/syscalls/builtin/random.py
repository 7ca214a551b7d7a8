"""The same random numbers at every run: getrandom(2), /dev/random and /dev/urandom out of one seeded stream.

For tests that must repeat themselves. Never for programs that make keys. With one thread the stream is the same each time;
where several programs draw at once, which gets what is up to the scheduler. The 16 bytes that the kernel hands each new program
(getauxval(3), AT_RANDOM) stay its own.
"""

from __future__ import annotations

import hashlib
import os
import selectors
import threading

from trivisor.vos.syscalls.builtin.files import files
from trivisor.vos.syscalls.call import Call
from trivisor.vos.syscalls.policy import Policy

_MOST = 1 << 20
"""Bytes that one call draws: getrandom(2) may give fewer than were asked for."""
_CHUNK = 4096
_READERS = 256


def seeded(policy: Policy, seed: int | bytes) -> None:
    """Have all random numbers that programs draw from the kernel come from `seed`."""
    stream = _Stream(seed)
    policy.without_vdso()  # newer kernels answer getrandom there, too

    @policy.on("getrandom")
    def getrandom(call: Call) -> None:
        data = stream.take(min(call.arg("buflen"), _MOST))
        call.returns(call.write("buf", data) if data else 0)

    feeder = _Feeder(stream)
    files(policy, dict.fromkeys(("/dev/random", "/dev/urandom"), lambda _: feeder.open()))


class _Stream:
    """SHAKE-128 of the seed and a counter, block by block. Thread-safe."""

    def __init__(self, seed: int | bytes) -> None:
        self._seed = seed if isinstance(seed, bytes) else str(seed).encode()
        self._counter = 0
        self._lock = threading.Lock()

    def take(self, size: int) -> bytes:
        with self._lock:
            self._counter += 1
            return hashlib.shake_128(b"%d:%s" % (self._counter, self._seed)).digest(size)


class _Feeder:
    """Keeps the pipes that stand for /dev/urandom full: one thread, which ends when nobody reads any more."""

    def __init__(self, stream: _Stream) -> None:
        self._stream = stream
        self._lock = threading.Lock()
        self._pipes: selectors.BaseSelector | None = None

    def open(self) -> _Pipe:
        """Return the reading end of a pipe that never ends."""
        reader, writer = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(writer, False)
        os.write(writer, self._stream.take(_CHUNK))
        with self._lock:
            if self._pipes is None:
                self._pipes = selectors.DefaultSelector()
                threading.Thread(target=self._feed, args=(self._pipes,), name="random", daemon=True).start()
            if len(self._pipes.get_map()) < _READERS:
                self._pipes.register(writer, selectors.EVENT_WRITE)
            else:
                os.close(writer)  # it ends after its first bytes
        return _Pipe(reader)

    def _feed(self, pipes: selectors.BaseSelector) -> None:
        while True:
            for key, _ in pipes.select():
                try:
                    os.write(key.fd, self._stream.take(_CHUNK))
                except BlockingIOError:
                    pass
                except BrokenPipeError:
                    pipes.unregister(key.fd)
                    os.close(key.fd)
            with self._lock:
                if not pipes.get_map():
                    pipes.close()
                    self._pipes = None
                    return


class _Pipe:
    """A descriptor with an owner."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        os.close(self._fd)
