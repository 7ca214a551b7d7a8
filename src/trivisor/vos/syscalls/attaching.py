"""From a command's start to its handlers' first call.

A command's listener is there only once the command has set itself up, which it may fail to do, and gone once its last program
has ended, which may be before anybody has asked for it. So the listener is waited for beside the command, and whichever comes first ends
the wait: handlers that could not attach are an error only while there is a command that waits for them.
"""

from __future__ import annotations

import threading

from trivisor.core.errors import CallGone
from trivisor.vos.command import Command
from trivisor.vos.syscalls.compile import Compiled
from trivisor.vos.syscalls.service import Syscalls


class Attaching:
    """Handlers on their way to a command that is under way."""

    def __init__(self, syscalls: Syscalls, compiled: Compiled, command: Command) -> None:
        self._syscalls = syscalls
        self._compiled = compiled
        self._command = command
        self._done = False
        self._error: BaseException | None = None
        threading.Thread(target=self._attach, name=f"handlers of a command in {command.machine}", daemon=True).start()

    def wait(self, deadline: float | None) -> None:
        """Return once the handlers answer, the command is over, or `deadline` (monotonic) has passed. Raises what kept them from it."""
        self._command.wait(lambda: self._done, deadline)
        # CallGone: the command's end is on its way.
        if self._error is not None and not self._command.over and not isinstance(self._error, CallGone):
            raise self._error

    def _attach(self) -> None:
        try:
            self._syscalls.attach(self._compiled)
        except BaseException as error:
            self._error = error
        with self._command.changed:
            self._done = True
            self._command.changed.notify_all()
