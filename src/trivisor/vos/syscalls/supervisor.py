"""Who runs the handlers: one thread a machine, which waits for all its listeners.

The way of a call: epoll, receive, the handler, answer, on one thread and without a lock. A second thread, the watchdog, sleeps
while no handler runs. When one takes longer than `patience`, the watchdog gives the turn to a fresh thread: the
slow handler is left to finish beside it, so it may wait for what itself needs answers, such as an exec in the
same machine. When it is overdue, the watchdog refuses its call; what the handler still does then changes nothing.

Who has the turn is decided by `slot`, a dict that holds the call under way: its pop is atomic, and whoever gets the call out of it goes on
to the next. Who answers a call is decided alike (Call.claim).

Everything fails closed: a handler that raises, gives no answer or is late; more than MAX_BESIDE handlers that hang; a
call that is handed off to rules which nobody keeps any more.
"""

from __future__ import annotations

import contextlib
import errno
import heapq
import itertools
import logging
import os
import select
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping

from trivisor.core.errors import BadArgument, CallGone, GuestError, GuestGone
from trivisor.vos.syscalls.asked import Handled
from trivisor.vos.syscalls.attachment import Answering, Attachment, Failure, handled_by
from trivisor.vos.syscalls.call import Call
from trivisor.vos.syscalls.listener import ARCH, ARCHS, ID, NR, Listener, Notification

__all__ = ["Attachment", "Failure", "Supervisor", "step_aside"]

PATIENCE = 0.05
"""Seconds that one handler may keep all others waiting."""
MAX_BESIDE = 32
"""Handlers that may be slow, or hang, at a time: calls beyond are refused."""
MAX_DELAYED = 256
"""Delayed answers beyond which those are thrown out that nobody waits for any more."""
_EVENTS = 16
_LOGGED = 20
"""Failures of one listener's handlers that are logged: a hostile program must not fill a log."""

_log = logging.getLogger("trivisor.syscalls")
_here = threading.local()


class _Worker:
    """A thread that has, or had, the turn. `slot[0]` is the call under way while it has."""

    def __init__(self) -> None:
        self.slot: dict[int, Call] = {}
        self.attachment: Attachment | None = None
        """Whose call that is."""


class Supervisor:
    """Answers the calls of one machine with Python functions. Thread-safe."""

    def __init__(self, machine: str = "", *, patience: float = PATIENCE) -> None:
        self.machine = machine
        self._patience = patience
        self._starting = threading.Lock()
        self._pid = 0

    def attach(
        self,
        listener: Listener,
        handlers: Iterable[Answering],
        *,
        ruled: Iterable[int] = (),
        refused: Mapping[int, int] | None = None,
        architectures: Iterable[str] = ("x86_64", "aarch64"),
    ) -> Attachment:
        """Have `handlers` answer what comes from `listener`, which is taken over. Returns at once. Raises GuestGone once it is closed.

        `ruled`: numbers of calls that rules of the answerer are asked about first. `refused`: numbers of calls that may not
        proceed, to the errno that they get instead.
        """
        known = {arch: handled_by(handlers, arch, refused or {}) for arch in architectures}
        if self._pid not in (0, os.getpid()):
            self._starting = threading.Lock()  # a forked child's may be held by a thread that is not there
        attachment = Attachment(self.leave, listener, known, frozenset(ruled))
        with self._starting:
            if self._pid != os.getpid():
                self._start()
            if self._closed:  # while the command was setting itself up
                listener.close()
                raise GuestGone("this process has let go of the machine", machine=self.machine)
            connection = listener.connection
            attachment.fds = (listener.fileno(),) if connection is None else (listener.fileno(), connection)
            # The listener last: its programs may have ended already, and then all is closed at once.
            for fd in reversed(attachment.fds):
                self._sources[fd] = attachment
                self._epoll.register(fd, select.EPOLLIN)
        return attachment

    def leave(self, attachment: Attachment) -> None:
        """Have the serving thread close the attachment."""
        if self._pid == os.getpid() and not attachment.ended.is_set():
            self._leaving.append(attachment)
            self._ring()

    def close(self, timeout: float = 1.0) -> None:
        """Leave all listeners. Handlers that still run are left to themselves."""
        with self._starting:
            if self._pid != os.getpid():
                return
            self._closed = True
            self._ring()
            self._watch.set()
            worker = self._thread
        if worker is not threading.current_thread():
            worker.join(timeout)
            if worker.is_alive():  # in a handler
                self._end_all()

    # -- the serving thread -----------------------------------------------------------------------

    def _start(self) -> None:
        self._pid = os.getpid()
        self._closed = False
        self._sources: dict[int, Attachment] = {}
        self._leaving: deque[Attachment] = deque()
        self._delayed: list[tuple[float, int, Call, Attachment]] = []
        self._delays = itertools.count()
        self._kept = 0
        self._beside: dict[Call, tuple[float, Attachment]] = {}
        self._hanging: set[_Worker] = set()
        self._turning = threading.Lock()
        self._epoll = select.epoll()
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._bell, select.EPOLLIN)
        self._watch = threading.Event()
        self._watch_sleeps = False
        self._worker = _Worker()
        self._thread = self._run(self._worker)
        threading.Thread(target=self._watchdog, name=f"watchdog of {self.machine}'s calls", daemon=True).start()

    def _run(self, worker: _Worker) -> threading.Thread:
        thread = threading.Thread(target=self._serve, args=(worker,), name=f"calls of {self.machine}", daemon=True)
        thread.start()
        return thread

    def _serve(self, worker: _Worker) -> None:
        _here.worker, _here.supervisor = worker, self
        poll, sources = self._epoll.poll, self._sources
        try:
            while not self._closed:
                for fd, events in poll(self._fire() if self._delayed else -1, _EVENTS):
                    attachment = sources.get(fd)
                    if attachment is None:
                        self._answer_bell()
                    elif fd != attachment.fds[0]:
                        if not self._returned(worker, attachment, events):
                            return
                    elif events & select.EPOLLIN:
                        if not self._next(worker, attachment):
                            return
                    else:  # EPOLLHUP: the last program under the filter has ended
                        self._end(attachment)
            self._end_all()
        except BaseException:
            self._end_all()  # fails closed
            raise
        finally:
            self._hanging.discard(worker)

    def _next(self, worker: _Worker, attachment: Attachment) -> bool:
        """Answer one call. False if this thread has lost the turn meanwhile."""
        try:
            notification = attachment.listener.receive()
        except GuestError:
            self._end(attachment)
            return True
        if notification is None:
            return True
        try:
            handled = attachment.handled[ARCHS[notification[ARCH]]][notification[NR]]
        except KeyError:
            self._hand_off(attachment, notification, back=False)
            return True
        if notification[NR] in attachment.ruled:
            attachment.waiting[notification[ID]] = notification
            attachment.listener.held.add(notification[ID])
            self._hand_off(attachment, notification, back=True)
            return True
        return self._handle(worker, attachment, Call(attachment.listener, notification, handled), handled)

    def _handle(self, worker: _Worker, attachment: Attachment, call: Call, handled: Handled) -> bool:
        if self._hanging and len(self._hanging) >= MAX_BESIDE:
            self._fail(attachment, call, handled, RuntimeError(f"{MAX_BESIDE} handlers are running already"))
            return True
        worker.attachment = attachment
        slot = worker.slot
        slot[0] = call
        if self._watch_sleeps:
            self._watch.set()
        try:
            result = handled.function(call)
            if result is not None:
                raise TypeError(f"it returned {type(result).__name__}: a handler answers with call.returns(...) and the like")
            if not call.wants:
                raise TypeError("it gave no answer, such as call.proceed()")
            if call.delayed:
                self._postpone(call, attachment)
            elif call.claim():
                call.send()
        except BaseException as error:
            self._fail(attachment, call, handled, error)
        if slot.pop(0, None) is call:
            return True
        with self._turning:
            self._beside.pop(call, None)
        if not call.elsewhere:
            attachment.listener.held.discard(call.id)
        return False

    def _fail(self, attachment: Attachment, call: Call, handled: Handled, error: BaseException) -> None:
        """Refuse a call because its handler failed, and say so, unless it is the program's own fault."""
        ours = not isinstance(error, BadArgument | CallGone)
        handler = getattr(handled.function, "__qualname__", repr(handled.function))
        if ours:
            attachment.failures.append(Failure(call.name, call.pid, handler, error))
            attachment.failed += 1
        if call.claim():
            try:
                call.refuse(error.errno if isinstance(error, BadArgument) else handled.errno)
            except OSError as failure:
                error.add_note(f"nor could the call be refused: {failure}")
        else:
            call.drop()
        if ours and attachment.failed <= _LOGGED:
            _log.warning("%s: %s of process %d was refused: handler %s failed", self.machine, call.name, call.pid, handler, exc_info=error)

    def _hand_off(self, attachment: Attachment, notification: Notification, *, back: bool) -> None:
        try:
            attachment.listener.hand_off(notification, back)
        except (OSError, GuestError) as error:
            attachment.waiting.pop(notification[ID], ())
            attachment.listener.held.discard(notification[ID])
            _log.debug("%s: nobody takes a call: %s", self.machine, error)
            attachment.refuse(notification)

    def _returned(self, worker: _Worker, attachment: Attachment, events: int) -> bool:
        """Handle what no rule matched. False if this thread has lost the turn meanwhile: the rest stays for the next."""
        try:
            back = attachment.listener.returned()
        except GuestError:
            self._forget(attachment.fds[1])
            for notification in list(attachment.waiting.values()):
                attachment.refuse(notification)
            attachment.waiting.clear()
            return True
        ours = True
        for came in back:
            notification = attachment.waiting.pop(came.id, ())
            attachment.listener.held.discard(came.id)
            if came.answered or not notification:
                continue
            handled = attachment.handled[ARCHS[notification[ARCH]]][notification[NR]]
            call = Call(attachment.listener, notification, handled)
            if ours:
                ours = self._handle(worker, attachment, call, handled)
            elif call.claim():
                call.refuse(handled.errno)
        return ours

    # -- later ------------------------------------------------------------------------------------

    def _postpone(self, call: Call, attachment: Attachment) -> None:
        attachment.listener.held.add(call.id)
        heapq.heappush(self._delayed, (call.due, next(self._delays), call, attachment))
        if _here.worker is not self._worker:
            self._ring()

    def _prune(self) -> None:
        """Throw out what nobody waits for any more: a program may have calls put off, and die, as often as it likes."""
        entries = [heapq.heappop(self._delayed) for _ in range(len(self._delayed))]  # others may push meanwhile
        kept = 0
        for entry in entries:
            _, _, call, attachment = entry
            if call.valid:
                heapq.heappush(self._delayed, entry)
                kept += 1
                continue
            attachment.listener.held.discard(call.id)
            if call.claim():  # what it was to be given is let go of
                with contextlib.suppress(OSError):
                    call.refuse(errno.EPERM)
        self._kept = kept

    def _fire(self) -> float:
        """Send what is due, and return the seconds until the next is."""
        if len(self._delayed) > max(MAX_DELAYED, 2 * self._kept):
            self._prune()
        while self._delayed:
            left = self._delayed[0][0] - time.monotonic()
            if left > 0:
                return left
            _, _, call, attachment = heapq.heappop(self._delayed)
            attachment.listener.held.discard(call.id)
            if call.claim():
                try:
                    call.send()
                except OSError as error:
                    _log.debug("%s: a delayed answer came to nobody: %s", self.machine, error)
        return -1

    def _ring(self) -> None:
        os.eventfd_write(self._bell, 1)

    def _answer_bell(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._bell)
        while self._leaving:
            self._end(self._leaving.popleft())

    def _end(self, attachment: Attachment) -> None:
        """Close an attachment, once: the serving thread and one that calls `close` may both try. Whoever gets to forget the first does."""
        first, *others = attachment.fds
        if not self._forget(first):
            return
        for fd in others:
            self._forget(fd)
        attachment.listener.close()
        attachment.ended.set()

    def _end_all(self) -> None:
        for attachment in set(self._sources.values()):
            self._end(attachment)

    def _forget(self, fd: int) -> bool:
        """Poll `fd` no longer. False if somebody has seen to that already."""
        if self._sources.pop(fd, None) is None:
            return False
        with contextlib.suppress(OSError):  # the attachment was ended meanwhile, and the descriptor closed
            self._epoll.unregister(fd)
        return True

    # -- the watchdog -----------------------------------------------------------------------------

    def _watchdog(self) -> None:
        watch = self._watch
        seen: Call | None = None
        since = 0.0
        while not self._closed:
            call, now = self._worker.slot.get(0), time.monotonic()
            if call is None and not self._beside:
                self._watch_sleeps = True
                if self._worker.slot.get(0) is None and not self._beside and not self._closed:
                    watch.wait()
                self._watch_sleeps = False
                watch.clear()
                call, now = self._worker.slot.get(0), time.monotonic()
            if call is not seen:
                seen, since = call, now
            elif call is not None and now - since >= min(self._patience, call.timeout):
                self._turn_over(self._worker, since)
            watch.wait(self._refuse_late(now))
            watch.clear()

    def _turn_over(self, worker: _Worker, since: float) -> None:
        """Leave the call that `worker` is at to itself and have a fresh thread serve the others."""
        with self._turning:
            call, attachment = worker.slot.pop(0, None), worker.attachment
            if call is None or attachment is None:
                return  # it ended just now
            attachment.listener.held.add(call.id)
            self._beside[call] = (since + call.timeout, attachment)
            self._hanging.add(worker)
            self._worker = _Worker()
            self._thread = self._run(self._worker)

    def _refuse_late(self, now: float) -> float:
        """Refuse calls whose handlers are overdue, and return how long to sleep."""
        sleep = self._patience
        for call, (deadline, attachment) in list(self._beside.items()):
            if now < deadline:
                sleep = min(sleep, deadline - now)
            elif self._beside.pop(call, None) is not None:
                late = TimeoutError(f"it has run for more than {call.timeout:g} s")
                self._fail(attachment, call, call.handled, late)
                attachment.listener.held.discard(call.id)
        return max(sleep, 0.001)

    def step_aside(self, worker: _Worker) -> None:
        """Turn over at once: the handler on this thread is about to wait for the machine."""
        self._turn_over(worker, time.monotonic())
        self._watch.set()


def step_aside() -> None:
    """Called by whoever is about to wait for a machine: if this thread runs a handler, others are answered meanwhile by another."""
    worker = getattr(_here, "worker", None)
    if worker is not None and worker.slot:
        _here.supervisor.step_aside(worker)
