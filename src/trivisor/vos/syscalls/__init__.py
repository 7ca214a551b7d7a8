"""System calls, shaped from Python: rules, handlers and traces, behind every wall that can.

    from trivisor.vos.syscalls import Policy

Names are imported when they are first asked for (PEP 562): what runs commands needs a few modules of this package, not all.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trivisor.core.rules import Condition, Paths, Rule, SyscallSpec, parse
    from trivisor.vos.syscalls.call import Call
    from trivisor.vos.syscalls.policy import Handler, Policy
    from trivisor.vos.syscalls.service import Syscalls
    from trivisor.vos.syscalls.trace import Trace

__all__ = ["Call", "Condition", "Handler", "Paths", "Policy", "Rule", "SyscallSpec", "Syscalls", "Trace", "parse"]

_PLACES = {
    "Call": "vos.syscalls.call",
    "Handler": "vos.syscalls.policy",
    "Policy": "vos.syscalls.policy",
    "Syscalls": "vos.syscalls.service",
    "Trace": "vos.syscalls.trace",
}
"""Where the names are that are not of core.rules."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"trivisor.{_PLACES.get(name, 'core.rules')}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
