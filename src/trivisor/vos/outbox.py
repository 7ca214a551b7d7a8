"""What waits to be sent on a line.

The lock is held only while bytes are moved, never over a wait, so the thread that reads the line can always send (it
must not wait for a peer that waits for us). Whoever queues bytes also sends; a caller with much to send waits here
until its bytes are gone, and if it gives up at its deadline they stay queued: the stream of frames is never torn.
"""

from __future__ import annotations

import select
import socket
import threading
import time
from collections import deque
from collections.abc import Iterable
from itertools import islice

_BATCH = 64
_FULL = 64 * 1024
"""A caller that may wait does so while more than this is queued."""
_LIMIT = 16 << 20
"""More than this is queued only for a peer that reads nothing at all."""

Buffer = bytes | memoryview


class Outbox:
    """A queue of buffers in front of a non-blocking socket. Raises OSError as the socket does."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._lock = threading.Lock()
        self._queue: deque[Buffer] = deque()
        self._size = 0

    @property
    def size(self) -> int:
        """Bytes that are queued."""
        return self._size

    def put(self, buffers: Iterable[Buffer]) -> bool:
        """Queue `buffers`, send what goes at once; True if nothing is left queued."""
        with self._lock:
            for buffer in buffers:
                self._queue.append(buffer)
                self._size += len(buffer)
            if self._size > _LIMIT:
                raise BrokenPipeError("the peer takes nothing")
            return self._flush()

    def flush(self) -> bool:
        """Send what goes at once; True if nothing is left queued."""
        with self._lock:
            return self._flush()

    def drain(self, deadline: float | None) -> None:
        """Wait until little is queued, or until `deadline` (monotonic), whichever comes first."""
        poller = select.poll()
        poller.register(self._sock, select.POLLOUT)
        while self._size > _FULL:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                return
            # Bounded, since the reader may close the socket between our register and our poll.
            poller.poll(1000 if left is None else min(left, 1.0) * 1000)
            self.flush()

    def _flush(self) -> bool:
        queue = self._queue
        while queue:
            try:
                sent = self._sock.sendmsg(islice(queue, _BATCH), (), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            except (BlockingIOError, InterruptedError):
                return False
            self._size -= sent
            while sent:
                first = queue[0]
                if len(first) > sent:
                    queue[0] = memoryview(first)[sent:]
                    break
                sent -= len(first)
                queue.popleft()
        return True
