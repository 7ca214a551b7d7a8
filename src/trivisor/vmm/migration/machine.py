"""The part of Machine that has it move to another home."""

from __future__ import annotations

import math
from collections.abc import Callable

from trivisor.core.errors import InvalidSpec
from trivisor.core.state import check
from trivisor.core.units import parse_size
from trivisor.vmm.context import Context
from trivisor.vmm.migration import transport
from trivisor.vmm.migration.source import Migration, MigrationProgress
from trivisor.vmm.migration.transport import Access, Tls
from trivisor.vmm.records import Row


class Movable:
    """What Machine is too: a machine that can go on elsewhere."""

    _context: Context

    def migrate(
        self,
        to: str,
        *,
        tls: Tls | None = None,
        token: str | None = None,
        plain: bool = False,
        downtime: float = 0.3,
        timeout: float = 600.0,
        rate: int | str | None = None,
        throttle: bool = True,
        wait: bool = True,
        progress: Callable[[MigrationProgress], object] = lambda _: None,
    ) -> Migration:
        """Have it go on in another home, which waits for it at `to` (VMM.receive): host:port, or unix:/path. Here it is gone then.

        It runs while its disk and memory are sent, and stands still for about `downtime` seconds at the end. Where it changes its memory
        faster than that is sent, its processors are slowed down more and more, unless not to `throttle`; after `timeout` seconds no more is
        tried. `rate`: bytes a second at most ("50M"). Over TCP both sides show certificates (`tls`) or know a `token`; `plain` is neither.
        Without `wait` it returns at once; the Migration says how far it is, and cancels it.

        Raises InvalidSpec, InvalidState, UnsupportedByWall, Busy, HostLacks, MigrationError, EngineError. Whatever is raised, the machine
        goes on here as before, but for a MigrationError whose `where` is "unknown".
        """
        access = Access(tls, token, plain)
        at = transport.address(to, access)
        for what, seconds in (("downtime", downtime), ("timeout", timeout)):
            if not 0 < seconds < math.inf:
                raise InvalidSpec(f"{what} must be seconds, more than 0, not {seconds!r}")
        row = self._row()
        check(row.name, row.state, "migrate")
        speed = None if rate is None else parse_size(rate, "rate")
        migration = Migration(
            self._context, row.id, at, access, downtime=downtime, timeout=timeout, rate=speed, throttle=throttle, report=progress
        ).begin()
        return migration.wait() if wait else migration

    def _row(self) -> Row:
        raise NotImplementedError
