"""The peer of bench/vos.py: sandlock (PyPI), which has Python handlers of held calls, too. `sandlocked.py CALL [--path] -- ARGV...`

It is a program of its own, so that its threads do not wait for our interpreter lock, nor ours for theirs. It prints what `ARGV` printed.
"""

from __future__ import annotations

import errno
import sys

import sandlock
from sandlock.handler import Handler, HandlerCtx, NotifAction


class Answer(Handler):
    """Returns a number, or looks at the path and fails the call: as the handlers in bench/vos.py."""

    def __init__(self, with_path: bool) -> None:
        self.with_path = with_path

    def handle(self, ctx: HandlerCtx) -> NotifAction:
        """Answer one call."""
        if not self.with_path:
            return NotifAction.returns(4242)
        return NotifAction.errno(errno.ENOENT) if ctx.read_path() == "/etc/passwd" else NotifAction.continue_()


def main() -> int:
    """Run one program under one handler."""
    call, argv = sys.argv[1], sys.argv[sys.argv.index("--") + 1 :]
    answer = Answer("--path" in sys.argv)
    result = sandlock.Sandbox(fs_readable=["/"]).run_with_handlers(argv, [(call, answer)])
    sys.stdout.buffer.write(result.stdout)
    sys.stderr.buffer.write(result.stderr)
    return 0 if result.success else 1


if __name__ == "__main__":
    sys.exit(main())
