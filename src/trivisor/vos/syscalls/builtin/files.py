"""Files that programs see and the machine does not have: opens of certain paths are answered with contents from here."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping

from trivisor.vos.syscalls.call import Call, HasFileno
from trivisor.vos.syscalls.policy import Policy

Content = bytes | str | Callable[[Call], bytes | str | HasFileno]
"""What a file holds, or a function that says so at each open; it may return a file, pipe or socket."""


def files(policy: Policy, shown: Mapping[str, Content]) -> None:
    """Show programs these files, by absolute path, whenever they open them to read; opening them to write fails with EACCES.

    Paths are compared as they are written, after the folder that they start at: a link to one of them leads to the real file,
    and stat(2) tells of the real file, too.
    """
    for handler in policy.handlers:
        if isinstance(handler.function, _Opened):
            handler.function.shown.update(shown)
            return
    policy.on("open", "openat", "openat2", "creat")(_Opened(shown))


class _Opened:
    """The one handler of a policy's opens."""

    __name__ = "files"

    def __init__(self, shown: Mapping[str, Content]) -> None:
        self.shown = dict(shown)

    def __call__(self, call: Call) -> None:
        content = self.shown.get(call.full_path())
        if content is None:
            call.proceed()
        elif _writes(call):
            call.errno(errno.EACCES)
        else:
            source = content(call) if callable(content) else content
            call.give(source)
            if not isinstance(source, bytes | str):
                source.close() if hasattr(source, "close") else None


def _writes(call: Call) -> bool:
    if call.name == "creat":
        return True
    flags = int(call.struct()["flags"]) if call.name == "openat2" else call.arg("flags")
    return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_TRUNC))
