"""Descriptors of ours that programs in a virtual machine were given: what they write and read is carried over the line.

One thread serves all of one listener's channels. What a program writes is kept for our reader up to MAX_UNREAD; a
program that writes on regardless loses the channel. Towards the program at most WINDOW bytes are under way: it says what it took.

A channel is added before the machine is asked to make its other end, as the program may write there at once. Ours may hold data already
then: nothing is read of it before the channel is begun, which is when the machine has said that it knows it.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
from collections import deque
from collections.abc import Callable

MAX_UNREAD = 4 << 20
MAX_CHANNELS = 256
WINDOW = 256 << 10
_LINGER = 60.0
"""Seconds that our reader may take nothing of what programs wrote before they ended."""
_PIECE = 32 << 10


class _Channel:
    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.out: deque[bytes] = deque()
        self.unread = 0
        self.room = WINDOW
        self.begun = False
        """The machine knows the channel."""
        self.ending = False
        """The program has nothing more to say ..."""
        self.shut = False
        """... and ours was told."""
        self.at_end = False
        """Ours has nothing more to say."""
        self.gone = False
        """One of both has closed it."""


class Channels:
    """The channels of one listener. `carry(number, data)` and `finish(number)` send towards the program."""

    def __init__(self, carry: Callable[[int, bytes], None], finish: Callable[[int], None]) -> None:
        self._carry = carry
        self._finish = finish
        self._lock = threading.Lock()
        self._channels: dict[int, _Channel] = {}
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread: threading.Thread | None = None
        self._closed = False

    def add(self, number: int, fd: int) -> None:
        """Join `fd`, which is taken over, to channel `number`, which is still to begin. Raises OSError if there are too many."""
        with self._lock:
            if self._closed or len(self._channels) >= MAX_CHANNELS:
                os.close(fd)
                raise OSError(24, f"a program has at most {MAX_CHANNELS} of our descriptors")
            os.set_blocking(fd, False)
            self._channels[number] = _Channel(fd)
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name="channels", daemon=True)
                self._thread.start()
        self._ring()

    def begin(self, number: int) -> None:
        """The machine has made the channel: from here on it is carried what ours says."""
        with self._lock:
            channel = self._channels.get(number)
            if channel is not None:
                channel.begun = True
        self._ring()

    def abandon(self, number: int) -> None:
        """The machine has not made the channel: let go of it. What ours holds is left there."""
        with self._lock:
            channel = self._channels.get(number)
            if channel is not None:
                channel.out.clear()
                channel.ending = channel.gone = True
        self._ring()

    def write(self, number: int, data: bytes) -> None:
        """Take what the program wrote."""
        with self._lock:
            channel = self._channels.get(number)
            if channel is None or channel.ending:
                return
            channel.out.append(data)
            channel.unread += len(data)
            if channel.unread > MAX_UNREAD:
                channel.out.clear()
                channel.ending = channel.gone = True
        self._ring()

    def taken(self, number: int, size: int) -> None:
        """The program took that much of what was carried to it. Raises ValueError if it never was."""
        with self._lock:
            channel = self._channels.get(number)
            if channel is not None:
                channel.room += size
                if channel.room > WINDOW:
                    raise ValueError(f"{size} bytes taken that were not sent")
        self._ring()

    def end(self, number: int) -> None:
        """The program says no more there; told so again: it has closed it. What it wrote before is still delivered."""
        with self._lock:
            channel = self._channels.get(number)
            if channel is not None:
                channel.gone, channel.ending = channel.ending, True
        self._ring()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            if self._thread is None and self._bell >= 0:
                os.close(self._bell)
                self._bell = -1
        self._ring()

    def _ring(self) -> None:
        with contextlib.suppress(OSError, ValueError, OverflowError):  # closed meanwhile
            os.eventfd_write(self._bell, 1)

    def _serve(self) -> None:
        while not self._closed:
            poll = select.poll()
            poll.register(self._bell, select.POLLIN)
            with self._lock:
                now = dict(self._channels)
            by_fd = {channel.fd: number for number, channel in now.items()}
            for channel in now.values():
                if channel.begun and (channel.room or channel.out):  # else a hang-up, which cannot be masked, would keep us busy
                    wanted = select.POLLIN if channel.room and not channel.at_end else 0
                    poll.register(channel.fd, wanted | (select.POLLOUT if channel.out else 0))
            for fd, events in poll.poll():
                if fd == self._bell:
                    with contextlib.suppress(BlockingIOError):
                        os.eventfd_read(fd)
                    continue
                number = by_fd[fd]
                self._step(number, now[number], events)
            for number, channel in now.items():
                self._settle(number, channel)
        self._serve_last()
        bell, self._bell = self._bell, -1
        os.close(bell)

    def _serve_last(self) -> None:
        """Nothing comes or goes any more; what did come is still delivered."""
        while True:
            with self._lock:
                now = dict(self._channels)
            poll = select.poll()
            by_fd = {channel.fd: channel for channel in now.values() if channel.out}
            for number, channel in now.items():
                if channel.out:
                    poll.register(channel.fd, select.POLLOUT)
                else:
                    self._drop(number)
            if not by_fd:
                return
            ready = poll.poll(_LINGER * 1000)
            for fd, _ in ready:
                try:
                    self._deliver(by_fd[fd])
                except BlockingIOError:
                    continue
                except OSError:  # nobody reads it
                    by_fd[fd].out.clear()
            if not ready:
                for channel in by_fd.values():
                    channel.out.clear()

    def _step(self, number: int, channel: _Channel, events: int) -> None:
        try:
            if events & select.POLLOUT and channel.out:
                self._deliver(channel)
            if events & select.POLLIN:
                data = os.read(channel.fd, min(_PIECE, channel.room))
                if data:
                    with self._lock:
                        channel.room -= len(data)
                    self._carry(number, data)
                    return
                channel.at_end = True
                self._finish(number)
            elif channel.room and events & (select.POLLHUP | select.POLLERR | select.POLLNVAL):
                if not channel.at_end:
                    self._finish(number)
                channel.out.clear()
                channel.gone = True
        except BlockingIOError:
            return
        except OSError:
            channel.out.clear()
            channel.gone = True
            self._finish(number)

    def _settle(self, number: int, channel: _Channel) -> None:
        """Tell ours that the program has ended, and let go of what both have."""
        if channel.out or not (channel.gone or (channel.begun and channel.ending)):
            return
        if channel.gone or (channel.shut and channel.at_end):
            self._drop(number)
        elif not channel.shut:
            channel.shut = True
            try:
                with socket.socket(fileno=os.dup(channel.fd)) as half:
                    half.shutdown(socket.SHUT_WR)
            except OSError:  # a pipe, or a socket that is at its end
                self._drop(number)

    def _deliver(self, channel: _Channel) -> None:
        with self._lock:
            data = channel.out[0]
        done = os.write(channel.fd, data)
        with self._lock:
            if channel.out:
                channel.unread -= done
                if done < len(data):
                    channel.out[0] = data[done:]
                else:
                    channel.out.popleft()

    def _drop(self, number: int) -> None:
        with self._lock:
            channel = self._channels.pop(number, None)
        if channel is not None:
            os.close(channel.fd)
