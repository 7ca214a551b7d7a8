"""What is said of a migration on its way, by a departure whose steps are over at once."""

from __future__ import annotations

import socket
from typing import Any

from trivisor.vmm.engines.vm.streams import Precopy
from trivisor.vmm.migration.source import Migration, MigrationProgress, _Ends
from trivisor.vmm.migration.transport import Access, address


class Quick:
    """A departure that is further than asked for whenever it is asked."""

    def live(self) -> bool:
        return True

    def mirrored(self) -> tuple[int, int, bool]:
        return 512, 512, True

    def looked(self) -> Precopy:
        return Precopy("pre-switchover", 4096, 0, 4096)

    sending = looked

    def __getattr__(self, step: str) -> Any:
        return lambda *_, **__: None


def test_each_phase_is_said_however_quick_it_was() -> None:
    seen: list[MigrationProgress] = []
    at = address("127.0.0.1:1", Access(token="a token that only this test knows"))
    nobody: Any = None
    moving = Migration(nobody, "web", at, Access(), downtime=1, timeout=1, rate=None, throttle=False, report=seen.append)
    memory, disk = socket.socketpair()
    moving._send(nobody, Quick(), _Ends(memory, disk, 4096))
    assert [said.phase for said in seen] == ["disk", "memory", "handover"]
    assert (seen[0].done, seen[0].total) == (512, 4096)
