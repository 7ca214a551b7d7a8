"""qemu-img, jailed: it sees the files that it reads, the one that it writes and its own libraries; time, memory and bytes are bounded.

A disk image is a program for the parser that reads it. headers.py has refused what leads elsewhere, the format of each file is told,
never guessed, and nothing that an image could name is there to be opened.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from trivisor.core.errors import EngineError, ImageError, StorageError
from trivisor.core.files import sync
from trivisor.core.process import find, run
from trivisor.core.units import GIB, MIB, TIB
from trivisor.images.disks.formats import DRIVERS, Format
from trivisor.images.disks.headers import Header, read
from trivisor.launch import jail, once
from trivisor.launch.jail import Bind
from trivisor.launch.once import Done
from trivisor.launch.plan import Op, Plan

Progress = Callable[[str], object]
_OPTIONS: dict[str, str] = {
    "vhd": "subformat=dynamic,force_size=on",
    "vhdx": "subformat=dynamic",
    "stream": "subformat=streamOptimized,adapter_type=lsilogic",
}
_SLOT = 98_000_000
"""The id that it runs as belongs to no machine."""
_LAUNCH_FAILED = 125
_CHECKED: tuple[Format, ...] = ("qcow2", "vmdk", "vhdx")
_CHECK_LEAKS, _CHECK_NONE = 3, 63
"""What `qemu-img check` exits with for what is merely lost room, and for an image that it has no check for."""
_OVERHEAD = 256 * MIB
"""More than any format needs beside one byte in a hundred of the disk."""
_LEAST_SECONDS, _RATE = 600.0, 2 * MIB
_STEP = 5
"""Per cent between two words of progress."""


@dataclass(frozen=True)
class Bounds:
    """What one conversion may take: bytes, and seconds."""

    virtual: int = 16 * TIB
    """Of the disk, as a machine sees it."""
    memory: int = 2 * GIB
    seconds: float | None = None
    """By the clock, and of processors two times as many; None: ten minutes, and a second for each 2 MiB that the image takes."""

    def time(self, source: Source) -> float:
        """Return the seconds for a conversion of `source`. Raises StorageError."""
        if self.seconds is not None:
            return self.seconds
        try:
            taken = sum(path.stat().st_blocks * 512 for path in (source.path, source.below) if path)
        except OSError as error:
            raise StorageError(f"{source.path} cannot be read: {error.strerror}") from error
        return _LEAST_SECONDS + taken / _RATE


DEFAULT = Bounds()


@dataclass(frozen=True)
class Source:
    """A disk in a file; `below`: what a machine's own part of it, a qcow2, lies over; `shared`: an engine that stands still may have it."""

    path: Path
    header: Header
    below: Path | None = None
    shared: bool = False


def open_source(path: Path, kind: Format | None, bounds: Bounds = DEFAULT) -> Source:
    """Return the disk in the file `path`. Raises NotFound, InvalidSpec, ImageError (it does not stand for itself, or is too large)."""
    path = path.absolute().resolve()
    header = read(path, kind)
    if header.size > bounds.virtual:
        raise ImageError(f"{path.name}: a disk of {header.size} bytes; the bound is {bounds.virtual}")
    return Source(path, header)


def convert(
    source: Source,
    target: Path,
    to: Format,
    *,
    stream: bool = False,
    bounds: Bounds = DEFAULT,
    progress: Progress = lambda _: None,
) -> Header:
    """Write the disk `source` to the new file `target` in the format `to`, synced; holes stay holes. `stream`: a VMDK for packages (OVA).

    Nothing is left of a target that could not be written. Raises ImageError, EngineError, StorageError, HostLacks.
    """
    target = target.absolute()
    try:
        os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise StorageError(f"{target} cannot be made: {error.strerror}") from error
    option = _OPTIONS.get("stream" if stream else to)
    words = [
        "convert",
        "-p",
        *(["-U"] if source.shared else []),
        "-O",
        _driver(to),
        *(["-o", option] if option else []),
        *_named(source),
        str(target),
    ]
    binds = [Bind(path, str(path), "ro") for path in (source.path, source.below) if path]
    what = f"{source.header.format} to {'streamed vmdk' if stream else to}"
    try:
        _check(_jailed(words, [*binds, Bind(target, str(target), "rw")], source, bounds, _percent(progress, what)), source, bounds)
        _sync(target)
        made = read(target, to)
    except BaseException:
        target.unlink(missing_ok=True)
        raise
    return made


def verify(source: Source, bounds: Bounds = DEFAULT) -> None:
    """Raise ImageError for a disk whose tables point to what is not there: reading it would give zeros. Raises what `convert` raises."""
    if source.header.format not in _CHECKED:
        return
    words = ["check", "-f", _driver(source.header.format), str(source.path)]
    done = _jailed(words, [Bind(source.path, str(source.path), "ro")], source, bounds, lambda _: None)
    if done.status in (1, 2) and not done.timed_out:
        raise ImageError(f"{source.path.name}: damaged, or cut: {_last(done.said, source)}", hint="copy it again, or have it mended")
    if done.status not in (_CHECK_LEAKS, _CHECK_NONE):
        _check(done, source, bounds)


def create(target: Path, size: int) -> None:
    """Make an empty qcow2 of `size` bytes. Raises EngineError, HostLacks."""
    run([find("qemu-img", "qemu-utils"), "create", "-q", "-f", "qcow2", target, str(size)], timeout=60)


def _named(source: Source) -> list[str]:
    if source.below is None:
        return ["-f", _driver(source.header.format), str(source.path)]
    own, below = (str(path).replace(",", ",,") for path in (source.path, source.below))
    parts = ["driver=qcow2", "file.driver=file", f"file.filename={own}", "backing.driver=qcow2", "backing.file.driver=file"]
    return ["--image-opts", ",".join([*parts, f"backing.file.filename={below}", "backing.backing="])]


def _driver(kind: Format) -> str:
    return DRIVERS.get(kind, kind)


def _jailed(words: Sequence[str], binds: Sequence[Bind], source: Source, bounds: Bounds, heard: Callable[[bytes], object]) -> Done:
    program = str(Path(find("qemu-img", "qemu-utils")).resolve())
    report = jail.probe()
    if report.own_id:
        done = _tried(program, words, [dataclasses.replace(bind, flags=bind.flags + ",owner") for bind in binds], source, bounds, heard)
        if done.status != _LAUNCH_FAILED:
            return done
        # The file system cannot show its files as another's: root without any power, then.
        report = dataclasses.replace(report, own_id=False)
    return _tried(program, words, binds, source, bounds, heard, report)


def _tried(
    program: str,
    words: Sequence[str],
    binds: Sequence[Bind],
    source: Source,
    bounds: Bounds,
    heard: Callable[[bytes], object],
    report: jail.JailReport | None = None,
) -> Done:
    folders = [Bind(Path(folder), folder, "ro,exec") for folder in _libraries(program)]
    plan = jail.jail(
        [program, *words],
        binds=[Bind(Path(program), program, "ro,exec"), *folders, *binds],
        env={"PATH": "/usr/bin", "HOME": "/", "LC_ALL": "C"},
        fds={},
        # Over the old root, in a mount namespace of its own: no folder has to be made, and none is left.
        root=Path("/"),
        slot=_SLOT,
        network="none",
        report=report,
    )
    seconds = bounds.time(source)
    return once.run(_bounded(plan, source.header.size, bounds.memory, seconds), seconds, heard=heard)


def _bounded(plan: Plan, size: int, memory: int, seconds: float) -> Plan:
    """Put limits into a plan, setrlimit(2): where it drops its own, before it gives up the right to."""
    written, processor = size + size // 100 + _OVERHEAD, max(1, int(2 * seconds))
    limits: list[Op] = [
        ("rlimit", "as", str(memory), str(memory)),
        ("rlimit", "cpu", str(processor), str(processor)),
        ("rlimit", "fsize", str(written), str(written)),
    ]
    return tuple(word for op in plan for word in ((*limits, op) if op[:2] == ("rlimit", "core") else (op,)))


def _check(done: Done, source: Source, bounds: Bounds) -> None:
    name = source.path.name
    if done.timed_out or done.status == 128 + signal.SIGXCPU:
        raise EngineError(
            f"converting {name} took over {bounds.time(source):g} s", command=["qemu-img", "convert"], hint="give it more time"
        )
    if "No space left" in done.said:
        raise StorageError(f"the disk is full: {name} could not be converted", hint="free space, or write elsewhere")
    if done.status < 0 or done.status > 128:
        raise ImageError(f"{name}: qemu-img died of signal {abs(done.status) % 128}: the image is damaged, or made to harm")
    if done.status == _LAUNCH_FAILED:
        raise EngineError("qemu-img cannot be run", command=["qemu-img", "convert"], output=done.said)
    if done.status:
        raise ImageError(f"{name}: qemu-img: {_last(done.said, source)}")


def _percent(progress: Progress, what: str) -> Callable[[bytes], None]:
    told = [-_STEP]

    def heard(data: bytes) -> None:
        for found in re.findall(rb"\(\s*(\d+)(?:\.\d+)?/100%\)", data):
            now = min(100, int(found))
            if now >= told[0] + _STEP:
                told[0] = now
                progress(f"converting {what}: {now} %")

    return heard


@functools.cache
def _libraries(path: str) -> tuple[str, ...]:
    output = run([find("ldd", "libc-bin"), path], timeout=10).decode(errors="replace")
    return tuple(sorted({str(Path(word).parent) for word in re.findall(r"(?:=>\s+|^\s+)(/\S+) \(0x", output, re.MULTILINE)}))


def _last(said: str, source: Source) -> str:
    lines = said.strip().splitlines() or ["it failed"]
    return lines[-1].removeprefix("qemu-img: ").replace(str(source.path.parent) + "/", "")[:300]


def _sync(path: Path) -> None:
    try:
        sync(path)
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror}") from error
