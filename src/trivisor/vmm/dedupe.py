"""Equal pages of machines kept once: kernel samepage merging, KSM (Documentation/admin-guide/mm/ksm.rst).

Two things must be so. A machine offers its memory (`dedupe=True`): of a virtual machine its RAM, as QEMU advises the kernel (madvise(2),
MADV_MERGEABLE), of a container all that its programs have (prctl(2), PR_SET_MEMORY_MERGE). And the host's kernel looks for equal pages,
which costs processor time, holds for the whole host, and is root's to decide: so that happens only where it is asked for by name, and what
was set before is kept in the home, to be put back.

Only memory of no file is merged: what a clone has written of its ice, and all of a machine that was booted.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import msgspec

from trivisor.core.errors import HostLacks, InvalidSpec
from trivisor.core.units import format_size
from trivisor.vmm import procs
from trivisor.vmm.context import Context
from trivisor.vmm.engine import Box
from trivisor.vmm.records import Row

KSM = Path("/sys/kernel/mm/ksm")
_SETTING = "ksm-before"
_PAGE = os.sysconf("SC_PAGE_SIZE")
PAGES, PAUSE = 5000, 20
"""Pages that are looked at in one go, and milliseconds between two: a gigabyte in a second, for a processor's half at most."""


@runtime_checkable
class Merging(Protocol):
    """An engine that can begin and end to offer the memory of a machine that runs."""

    def merge(self, box: Box, on: bool) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Merged:
    """What the host's kernel has merged, of all that is offered to it, by whomever. Bytes."""

    available: bool
    """Whether the kernel has KSM at all."""
    scanning: bool
    pages: int
    """Of merged pages, each counted once: what they take now."""
    saved: int
    """What the same took more before."""
    profit: int | None
    """Of `saved`, what remains when the kernel's own notes are taken off; None before Linux 6.1."""
    scans: int
    """How often all has been looked at since the host was booted."""

    def __str__(self) -> str:
        if not self.available:
            return "this host's kernel cannot merge them"
        return f"{'looked for' if self.scanning else 'not looked for'}, {format_size(self.saved)} saved"


class Dedupe:
    """`vmm.dedupe`: whether the host's kernel looks for equal pages."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def report(self) -> Merged:
        """Return what is merged on this host now."""
        profit = _number("general_profit")
        return Merged(
            available=KSM.is_dir(),
            scanning=_number("run") == 1,
            pages=(_number("pages_shared") or 0) * _PAGE,
            saved=(_number("pages_sharing") or 0) * _PAGE,
            profit=profit,
            scans=_number("full_scans") or 0,
        )

    def start(self, *, pages: int = PAGES, pause_ms: int = PAUSE) -> None:
        """Have the host's kernel look for equal pages: `pages` in one go, with `pause_ms` milliseconds between.

        For the whole host, until `stop`, whichever process calls it. Raises InvalidSpec, HostLacks.
        """
        if not 1 <= pages <= 1 << 20 or not 0 <= pause_ms <= 60_000:
            raise InvalidSpec("pages must be 1 to 1048576, pause_ms 0 to 60000")
        check()
        # A kernel with smart_scan (Linux 6.7) looks at a page that was not merged every ninth time only: two pages that are equal but were
        # first seen at another time would never be looked at in one go, which alone merges them.
        wanted = {"smart_scan": 0, "pages_to_scan": pages, "sleep_millisecs": pause_ms, "run": 1}
        before = {name: value for name in wanted if (value := _number(name)) is not None}
        if self._context.records.setting(_SETTING) is None:
            self._context.records.set_setting(_SETTING, msgspec.json.encode(before).decode())
        _set({name: value for name, value in wanted.items() if name in before})

    def stop(self) -> None:
        """Put back what was set when `start` was called first. What is merged stays so until somebody writes to it. Raises HostLacks."""
        said = self._context.records.setting(_SETTING)
        if said is None:
            return
        _set(msgspec.json.decode(said, type=dict[str, int]))
        self._context.records.set_setting(_SETTING, None)

    @contextmanager
    def scanning(self, *, pages: int = PAGES, pause_ms: int = PAUSE) -> Iterator[None]:
        """`start`, and `stop` at the end of the `with`."""
        self.start(pages=pages, pause_ms=pause_ms)
        try:
            yield
        finally:
            self.stop()


def check() -> None:
    """Raise HostLacks if the kernel cannot merge pages."""
    if not KSM.is_dir():
        raise HostLacks("this host's kernel cannot merge pages", hint="use a kernel that is built with CONFIG_KSM")


def merged(context: Context, row: Row) -> int | None:
    """Return how many bytes of a machine lie in merged pages; None where the kernel does not say."""
    found = None
    for pid in procs.tree(context.folder(row)):
        # (ksm_merging_pages, which is older, is put right only by the kernel's next look.)
        with suppress(OSError):
            said = re.search(r"^KSM: +(\d+) kB$", (Path("/proc") / pid / "smaps_rollup").read_text(), re.MULTILINE)
            found = (found or 0) + (int(said[1]) << 10) if said else found
    return found


def _number(name: str) -> int | None:
    try:
        return int((KSM / name).read_text())
    except (OSError, ValueError):
        return None


def _set(values: dict[str, int]) -> None:
    try:
        # `run` last: with what it is to run.
        for name in sorted(values, key="run".__eq__):
            (KSM / name).write_text(f"{values[name]}\n")
    except OSError as error:
        raise HostLacks(
            f"the host's kernel cannot be told how to look for equal pages: {error.strerror}",
            hint="that is root's to decide: run it as root",
        ) from error
