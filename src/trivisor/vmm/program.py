"""A machine's program: what its image says is to be run, started once and left to itself.

The guest knows of it (PROTOCOL.md, "The program"): its output goes to the machine's log "program" whoever is there, and when the machine is
stopped, by anybody or because its time is up, it gets its image's stop signal first. A clone of the machine has it, too. So nothing of it
is written down here: who asks gets the guest's answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trivisor.core.errors import FileError, GuestError, GuestProtocolError
from trivisor.core.state import State
from trivisor.vmm import health, runconfig
from trivisor.vmm.context import Context
from trivisor.vmm.health import HealthStatus
from trivisor.vmm.records import Row
from trivisor.vmm.runconfig import Wanted
from trivisor.vos.files import Files
from trivisor.vos.processes import Processes

_ANSWER = 5.0
_ANSWER_MAX = 4096


@dataclass(frozen=True)
class Program:
    """How a machine's program is: running as `pid` (in the machine), or ended with `exit_code`: its status, or 128 + its signal."""

    pid: int
    exit_code: int | None = None

    @property
    def running(self) -> bool:
        return self.exit_code is None


class Programmed:
    """What a Machine does with its image's program."""

    _context: Context
    _first: Row

    def _processes(self, verb: str) -> Processes:
        raise NotImplementedError  # Machine has them

    def command(self, args: Sequence[str] | None = None, entrypoint: Sequence[str] | str | None = None) -> list[str]:
        """Return the argv that the image's entrypoint and cmd make, as Docker puts them together.

        `args` stand for the cmd, `entrypoint` for the entrypoint: then the image's cmd is left out. A text as `entrypoint` is one word,
        "" is none.

        Raises InvalidSpec if the image says nothing and nothing is given, ImageError for a config that cannot be followed.
        """
        return self._wanted().argv(args, entrypoint)

    def launch(
        self,
        args: Sequence[str] | None = None,
        entrypoint: Sequence[str] | str | None = None,
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
    ) -> Program:
        """Start the machine's program, which is `command(args, entrypoint)`, and return it running. It outlives this process.

        What it writes goes to the log "program" (`logs(source="program")`). When the machine is stopped it gets the image's stop signal
        and most of the time that there is. There is one at a time. Raises what `command` raises, InvalidState, and GuestError if there
        is one already, or no such user or folder.
        """
        wanted = self._wanted()
        argv = wanted.argv(args, entrypoint)
        process = self._processes("spawn").launch(argv, wanted.stop_signal, env=env, cwd=cwd or "", user=user or "")
        health.begin(self._context, self._context.row(self._first.id))
        return Program(process.pid)

    def program(self) -> Program | None:
        """Return how the machine's program is, None if none was started since the machine was. Raises InvalidState, GuestError."""
        return ask(self._processes("exec"))

    def health(self, *, check: bool = True) -> HealthStatus:
        """Run the image's health check in it and return how it is; without `check` what the last one said. At most the check's own time.

        Nobody else runs the check: there is no daemon. Raises InvalidState, GuestError, StorageError, ImageError.
        """
        row, asked = self._context.row(self._first.id), self._wanted().health
        return health.check(self._context, row, asked, self._processes("exec")) if check else health.known(self._context, row, asked)

    def wait_healthy(self, timeout: float | None = 60.0) -> HealthStatus:
        """Check, as often as the image wants, until it is healthy.

        Raises GuestError once it is unhealthy, or its program has ended, WaitTimeout after `timeout` seconds, InvalidSpec if its image
        has no check, InvalidState.
        """

        def ended() -> int | None:
            found = self.program()
            return found.exit_code if found is not None else None

        row = self._context.row(self._first.id)
        return health.wait(self._context, row, self._wanted().health, self._processes("exec"), ended, timeout)

    @property
    def main_log(self) -> str:
        """Which of its logs says most of it: "program" if one was launched and wrote anything, else "serial"."""
        return "program" if self._context.folder(self._first).log("program").exists() else "serial"

    def _wanted(self) -> Wanted:
        return runconfig.wanted(self._context.images, self._first.digest)


def furnish(context: Context, row: Row, files: Files) -> None:
    """Make the folders that the image wants and may not have: its volumes and its working folder. One that cannot be is an event."""
    wanted = runconfig.wanted(context.images, row.digest)
    folders = dict.fromkeys((*wanted.volumes, *filter(None, [wanted.cwd])))
    if folders and context.row(row.id).state is not State.RUNNING:
        return  # it goes on paused, and has them
    for path in folders:
        try:
            files.mkdir(path, parents=True)
        except FileError as error:
            context.records.update(row.id, event=("image", f"the folder {path} that its image wants cannot be made: {error.strerror}"))


def ask(processes: Processes) -> Program | None:
    """Have the guest say how its program is."""
    result = processes.run_builtin(["program"], timeout=_ANSWER, limit=_ANSWER_MAX)
    if result.exit_code:
        raise GuestError(f"program failed: {result.error_text.strip()[:200]}", machine=processes.machine)
    try:
        said = {key: int(value) for key, value in (line.split(" ") for line in result.stdout.decode("ascii").splitlines())}
        if not said:
            return None
        if not said["pid"] > 0 or not all(0 <= value < 1 << 32 for value in said.values()):
            raise ValueError
        return Program(said["pid"], 128 + said["signaled"] if "signaled" in said else said.get("exited"))
    except (ValueError, KeyError, UnicodeDecodeError) as error:
        raise GuestProtocolError(f"its program is said to be {result.stdout[:80]!r}", machine=processes.machine) from error
