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
        GuestShort,
        HostError,
        HostLacks,
        ImageError,
        InvalidSpec,
        InvalidState,
        MigrationError,
        NotFound,
        PoolClosed,
        PoolEmpty,
        RegistryError,
        StorageError,
        TrivisorError,
        UnsupportedByWall,
        WaitTimeout,
    )
    from trivisor.core.events import Event
    from trivisor.core.spec import Spec
    from trivisor.core.state import State
    from trivisor.vmm.engine import WallReport
    from trivisor.vmm.health import HealthStatus
    from trivisor.vmm.machine import Machine, Stats
    from trivisor.vmm.manager import VMM
    from trivisor.vmm.migration.source import Migration
    from trivisor.vmm.migration.transport import Tls
    from trivisor.vmm.modify import Plan
    from trivisor.vmm.pool import Pool
    from trivisor.vmm.program import Program
    from trivisor.vos.syscalls.call import Call
    from trivisor.vos.syscalls.policy import Policy

__all__ = [
    "VMM",
    "AlreadyExists",
    "Busy",
    "Call",
    "CallerError",
    "EngineError",
    "Event",
    "ExecFailed",
    "ExecTimeout",
    "FileError",
    "GuestError",
    "GuestGone",
    "GuestProtocolError",
    "GuestShort",
    "HealthStatus",
    "HostError",
    "HostLacks",
    "ImageError",
    "InvalidSpec",
    "InvalidState",
    "Machine",
    "Migration",
    "MigrationError",
    "NotFound",
    "OverBudget",
    "Plan",
    "Policy",
    "Pool",
    "PoolClosed",
    "PoolEmpty",
    "Program",
    "RegistryError",
    "Spec",
    "State",
    "Stats",
    "StorageError",
    "Tls",
    "TrivisorError",
    "UnsupportedByWall",
    "WaitTimeout",
    "WallReport",
]

_ELSEWHERE = {
    "VMM": "vmm.manager",
    "Call": "vos.syscalls.call",
    "Event": "core.events",
    "HealthStatus": "vmm.health",
    "Machine": "vmm.machine",
    "Migration": "vmm.migration.source",
    "Plan": "vmm.modify",
    "Pool": "vmm.pool",
    "Policy": "vos.syscalls.policy",
    "Program": "vmm.program",
    "Spec": "core.spec",
    "State": "core.state",
    "Stats": "vmm.machine",
    "Tls": "vmm.migration.transport",
    "WallReport": "vmm.engine",
}
"""Where the names are that are not errors."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"trivisor.{_ELSEWHERE.get(name, 'core.errors')}")
    value = globals()[name] = getattr(module, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
