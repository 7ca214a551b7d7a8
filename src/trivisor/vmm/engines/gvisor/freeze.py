"""Freeze and clone of a sandbox: `runsc checkpoint` and `runsc restore`, in the machine's jail (vmm/freezer.py).

What is frozen: the Sentry's whole state (memory/), with the tvinit that runs in it, which a later one cannot stand in for
(memory/tvinit), and the writable layer of the same instant (frozen_layers.py). What has the name memory/ is whole.

The line has to be down meanwhile, since the Sentry cannot save a socket of the host's. The door is taken away and tvinit told to hang
up; it calls again until there is a door, which after a restore is the new keeper's. Commands go on; who listened to them is let go.

A runsc that goes on by itself after a checkpoint is paused for it and for the copy of the layer. One that does not (that of 2022) ends
with it, and the machine is restored from what was frozen at once, with another keeper.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from trivisor.core import process
from trivisor.core.errors import EngineError, GuestError, HostLacks, StorageError
from trivisor.core.files import sync
from trivisor.launch import ids, keeper
from trivisor.vmm import frozen_layers, layers, watch
from trivisor.vmm.engine import Box, Engine
from trivisor.vmm.engines.gvisor import bundle, control, door, jailed
from trivisor.vmm.engines.gvisor.runsc import Runsc
from trivisor.vos import guest
from trivisor.vos.line import Line

MEMORY = "memory"
TVINIT = "tvinit"
_HANGS_UP = 10.0
_BACK = 20.0
_ENDS = 30.0
_SAVE = 300.0
_SYNC = 60.0
_POLL = 0.001
_LOOK = 0.02
_CUT = 5.0
_LOCK = "checkpoint.lock"
_PATH = {"PATH": "/usr/bin:/bin"}
_GUARD = """read word; [ "$word" ] && exit; $1 -T -- "$2" "$3" 2> /dev/null; shift 3; [ $# = 0 ] || "$@" > /dev/null 2>&1"""
"""What is done when those who hold its standard input have died or ended: who freezes, and the checkpoint, which may outlive him. Were
the door there before, the guest would call, and the Sentry end of a line that it cannot save."""
_GOES_ON = "TESTONLY-autosave-resume"
"""An option of every runsc that `checkpoint --leave-running` leaves running; those before end, and start another."""


_UNSAVED = "state.(*encodeState).Save"
"""What is in the last words of a Sentry that met something which it has no way to save, such as runSyscallAfterPtraceEventSeccomp."""
_BREAKS = "net-disconnect-ok"
"""An option of those that break connections that leave the machine (jailed.py). Those before fail, and the machine ends, if there is
one or was in the last minute: who closes first remembers it for so long."""


def goes_on(found: Runsc) -> bool:
    """Whether a machine of this runsc runs on by itself after it was frozen."""
    return _GOES_ON in found.options


def whole(box: Box, found: Runsc, command: Sequence[str], into: Path, go_on: Callable[[], object], *, ends: bool, lasting: bool) -> float:
    """Freeze a running machine with its memory, and return the seconds that it did not run until it does again or this returned.

    It has ended with `ends`, and where not `goes_on`. If this fails it runs as before, by `go_on` if it had ended, unless runsc failed.
    """
    shape = layers.shape(box)
    engine = control.engine(box)
    if _BREAKS not in found.options and box.spec.network != "none":
        raise HostLacks(
            f"runsc {found.version} cannot freeze the memory of a machine with a network",
            machine=box.spec.name,
            hint="have a newer one ($TRIVISOR_RUNSC), or freeze its files alone",
        )
    state = _begin(box, engine, shape.ids(box.slot).owner)
    saved = into / MEMORY
    stays = goes_on(found) and not ends
    words = [*(["--leave-running"] if stays else []), *(["--compression=none"] if goes_on(found) else [])]
    with ExitStack() as stack:
        guard = stack.enter_context(_hung_up(box, stays, control.argv(engine, command, "resume", jailed.NAME) if stays else []))
        place = os.open(state, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, place)
        # The folder is entered by its descriptor: it lies in no namespace of the machine's.
        verb = ["checkpoint", "--image-path", f"/proc/self/fd/{place}", *words, jailed.NAME]
        began = time.monotonic()
        if stays:
            control.pause(box, command)
            stack.callback(control.resume, box, command)
            # Before it is resumed: its guest has been looking for the door since it hung up, and may look but once more.
            stack.callback(door.unshut, box.dir)
            with _savable(box):
                control.inside(box, command, *verb, pid=engine, fds=[place, guard], timeout=_SAVE)
            state.rename(saved)
        else:
            with _told(box) as lock, _savable(box):
                control.last(engine, command, *verb, wrote=(state, saved), fds=[place, lock, guard], timeout=_SAVE)
        try:
            _end(saved)
            if not stays and not watch.wait_ended(box.dir, _ENDS):
                raise EngineError("its sandbox did not end with its checkpoint", machine=box.spec.name)
            frozen_layers.keep(box, shape, into, lasting=False)
            if lasting and not stays:
                _settle(into)
        except BaseException:
            if not stays and not keeper.alive(box.dir):
                go_on()
            raise
    stood = time.monotonic() - began
    if lasting and stays:  # the disk is waited for while it runs
        _settle(into)
    return stood


@contextmanager
def _savable(box: Box) -> Iterator[None]:
    """Raise GuestError where runsc says that the Sentry cannot save something: a thread that a tracer has just stopped at a system call."""
    try:
        yield
    except EngineError as error:
        if _UNSAVED not in error.output:
            raise
        what = "runsc cannot freeze what it does at this instant"
        hint = "a program that is traced is such a case: end the trace first, or freeze its files alone; start it if it has ended by this"
        raise GuestError(what, machine=box.spec.name, hint=hint) from error


def layer(engine: Engine, box: Box, into: Path, *, lasting: bool) -> float:
    """Freeze the writable layer alone, and return the seconds for which the machine, which may run, stood still for that."""
    runs = keeper.alive(box.dir) and not engine.paused(box)
    began = time.monotonic()
    with ExitStack() as stack:
        if runs:
            # The Sentry holds back what was written.
            line = Line.connect(box.dir.line, box.spec.name)
            stack.callback(line.close)
            guest.configure(line, [("sync",)], _SYNC)
            began = time.monotonic()
            engine.pause(box)
            stack.callback(engine.resume, box)
        frozen_layers.keep(box, layers.shape(box), into, lasting=lasting)
    return time.monotonic() - began if runs else 0.0


def needs(found: Runsc, platform: str, command: Sequence[str]) -> dict[str, str]:
    """Return what a host must have to restore what is frozen with this runsc."""
    network = next((word.partition("=")[2] for word in command if word.startswith("--network=")), "")
    return {"runsc": found.version, "platform": platform, "network stack": network, "processor": _processor()}


def fits(here: Mapping[str, str], needed: Mapping[str, str], machine: str) -> None:
    """Raise HostLacks if this host is not what is needed."""
    for what, wanted in needed.items():
        has = here.get(what, "")
        if what == "processor":
            lacks = sorted(set(wanted.split()) - set(has.split()))
            wanted, has = " ".join(lacks), "" if lacks else " ".join(lacks)
        if wanted != has:
            raise HostLacks(
                f"it was frozen with {what} {wanted}, and here is {has or 'none'}",
                machine=machine,
                hint="a checkpoint is read by the very runsc that wrote it ($TRIVISOR_RUNSC), on a processor with the same features",
            )


def _processor() -> str:
    """Return the features of the processors here that programs see."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return " ".join(sorted(value.split()))
    return ""


@contextmanager
def _told(box: Box) -> Iterator[int]:
    """Give a descriptor for who carries the checkpoint out: while he has it others can tell, also when we have died (`await_cut`)."""
    place = box.dir.root / _LOCK
    lock = os.open(place, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock
        place.unlink(missing_ok=True)
    finally:
        os.close(lock)


def await_cut(box: Box) -> None:
    """Return when a machine whose checkpoint goes on without who began it has ended by that, or goes on."""
    place = box.dir.root / _LOCK
    try:
        lock = os.open(place, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        deadline = time.monotonic() + _SAVE
        while time.monotonic() < deadline:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(_LOOK)  # flock(2) has no wait with a bound
        watch.wait_ended(box.dir, _CUT)
        place.unlink(missing_ok=True)
    finally:
        os.close(lock)


def _begin(box: Box, engine: int, owner: tuple[int, int]) -> Path:
    """Make the folder that runsc, who is `owner`, writes in, with the tvinit that runs. It has another name when it is whole."""
    state = box.dir.root / "checkpoint"
    try:
        if state.exists():
            ids.remove_tree(state)
        state.mkdir(mode=0o700)
        shutil.copyfile(f"/proc/{engine}/root{bundle.GUEST}/{TVINIT}", state / TVINIT)
        (state / TVINIT).chmod(0o755)
        if owner != (os.geteuid(), os.getegid()):
            os.chown(state, *owner)
    except OSError as error:
        raise StorageError(f"{state} cannot be made: {error.strerror}", hint="free space under the home") from error
    return state


def _end(state: Path) -> None:
    """Have what runsc wrote be ours and changed by nobody."""
    try:
        for file in [*state.iterdir(), state]:
            if os.geteuid() == 0:
                os.chown(file, 0, 0)
            file.chmod(0o755 if file.name in (state.name, TVINIT) else 0o444)
    except OSError as error:
        raise StorageError(f"{state} cannot be written: {error.strerror}", hint="free space under the home") from error


def _settle(into: Path) -> None:
    """Bring what was frozen to the disk."""
    state = into / MEMORY
    try:
        for file in [*state.iterdir(), state, into / frozen_layers.TAR, into]:
            sync(file)
    except OSError as error:
        raise StorageError(f"{into} cannot be written: {error.strerror}", hint="free space under the home") from error


@contextmanager
def _hung_up(box: Box, stays: bool, resume: Sequence[str]) -> Iterator[int]:
    """Have the line down while the `with` lasts, and up again after it if the machine `stays` or the `with` failed.

    If we die in the `with` a shell opens the door, and has the machine go on by the command `resume`.
    """
    line = Line.connect(box.dir.line, box.spec.name)
    try:
        with _opened_without_us(box, resume) as guard:
            door.shut(box.dir)
            try:
                _away(line)
                _until(line, "0", _HANGS_UP, "its guest does not hang up")
                yield guard
            except BaseException:
                door.unshut(box.dir)
                with suppress(GuestError, EngineError):  # what went wrong before says more
                    _back(box)
                raise
            door.unshut(box.dir)
            if stays:
                _back(box)
    finally:
        line.close()


@contextmanager
def _opened_without_us(box: Box, resume: Sequence[str]) -> Iterator[int]:
    words = [process.find("mv", "coreutils"), *door.ways(box.dir), *resume]
    with subprocess.Popen(["/bin/sh", "-c", _GUARD, "sh", *words], stdin=subprocess.PIPE, env=_PATH, start_new_session=True) as shell:
        assert shell.stdin is not None
        try:
            yield shell.stdin.fileno()
        finally:
            with suppress(BrokenPipeError):
                os.write(shell.stdin.fileno(), b"done\n")


def _away(line: Line) -> None:
    """Have the guest hang up, if nothing in it is what runsc fails at."""
    try:
        guest.configure(line, [("away",)], _HANGS_UP)
    except GuestError as error:
        error.hint = error.hint or "have its programs close what they removed, end what traces them, or freeze its files alone"
        raise


def _back(box: Box) -> None:
    """Wait until the guest has called again."""
    line = Line.connect(box.dir.line, box.spec.name)
    try:
        _until(line, "1", _BACK, "its guest does not call again")
    finally:
        line.close()


def _until(line: Line, synced: str, timeout: float, fault: str) -> None:
    """Wait until the keeper has a line to the guest, or none: it tells of that when asked alone."""
    deadline = time.monotonic() + timeout
    while line.keeper_info()["synced"] != synced:
        if time.monotonic() > deadline:
            raise EngineError(fault, machine=line.machine)
        time.sleep(_POLL)
