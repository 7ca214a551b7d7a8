"""Trivisor gives a Python program computers.

    from trivisor import VMM

    with VMM().run("debian") as vm:
        print(vm.exec(["uname", "-a"]).text)

VMM is where it begins; the errors are drawn in trivisor.core.errors. Names are imported when they are first
asked for (PEP 562): the command line imports this package too, and must answer `--help` at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trivisor.core.errors import (
        AlreadyExists,
        Busy,
        CallerError,
        EngineError,
        ExecFailed,
        ExecTimeout,
        FileError,
        GuestError,
        GuestGone,
        GuestProtocolError,
        HostError,
        HostLacks,
        ImageError,
        InvalidSpec,
        InvalidState,
        NotFound,
        StorageError,
        TrivisorError,
        UnsupportedByWall,
        WaitTimeout,
    )
    from trivisor.core.events import Event
    from trivisor.core.spec import Spec
    from trivisor.core.state import State
    from trivisor.vmm.engine import WallReport
    from trivisor.vmm.machine import Machine, Stats
    from trivisor.vmm.manager import VMM

__all__ = [
    "VMM",
    "AlreadyExists",
    "Busy",
    "CallerError",
    "EngineError",
    "Event",
    "ExecFailed",
    "ExecTimeout",
    "FileError",
    "GuestError",
    "GuestGone",
    "GuestProtocolError",
    "HostError",
    "HostLacks",
    "ImageError",
    "InvalidSpec",
    "InvalidState",
    "Machine",
    "NotFound",
    "Spec",
    "State",
    "Stats",
    "StorageError",
    "TrivisorError",
    "UnsupportedByWall",
    "WaitTimeout",
    "WallReport",
]

_WHERE = {
    "AlreadyExists": "trivisor.core.errors",
    "Busy": "trivisor.core.errors",
    "CallerError": "trivisor.core.errors",
    "EngineError": "trivisor.core.errors",
    "ExecFailed": "trivisor.core.errors",
    "ExecTimeout": "trivisor.core.errors",
    "FileError": "trivisor.core.errors",
    "GuestError": "trivisor.core.errors",
    "GuestGone": "trivisor.core.errors",
    "GuestProtocolError": "trivisor.core.errors",
    "HostError": "trivisor.core.errors",
    "HostLacks": "trivisor.core.errors",
    "ImageError": "trivisor.core.errors",
    "InvalidSpec": "trivisor.core.errors",
    "InvalidState": "trivisor.core.errors",
    "NotFound": "trivisor.core.errors",
    "StorageError": "trivisor.core.errors",
    "TrivisorError": "trivisor.core.errors",
    "UnsupportedByWall": "trivisor.core.errors",
    "WaitTimeout": "trivisor.core.errors",
    "Event": "trivisor.core.events",
    "Spec": "trivisor.core.spec",
    "State": "trivisor.core.state",
    "WallReport": "trivisor.vmm.engine",
    "Machine": "trivisor.vmm.machine",
    "Stats": "trivisor.vmm.machine",
    "VMM": "trivisor.vmm.manager",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_WHERE[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})
