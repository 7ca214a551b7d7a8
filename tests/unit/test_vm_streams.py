"""What is left of a migration's streams when it is given up."""

from __future__ import annotations

from typing import Any, cast

from trivisor.core.errors import EngineError
from trivisor.vmm.engines.vm import streams
from trivisor.vmm.engines.vm.qmp import Qmp


class Ending:
    """A QEMU whose mirror ends by itself as it is told to: it takes no word any more then."""

    def __init__(self) -> None:
        self.job: str | None = "ready"
        self.nodes = ["away"]

    def ask(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        match command:
            case "query-jobs":
                return [{"id": "away", "status": self.job}] if self.job else []
            case "block-job-cancel":
                self.job = "concluded"
                raise EngineError("QEMU refused block-job-cancel", output="in state 'aborting' cannot accept command verb 'cancel'")
            case "job-dismiss":
                self.job = None
            case "query-named-block-nodes":
                return [{"node-name": name} for name in self.nodes]
            case "blockdev-del":
                self.nodes.clear()
        return {}


def test_a_mirror_that_ends_as_it_is_ended_is_cleared_away() -> None:
    qemu = Ending()
    streams._clear(cast(Qmp, qemu))
    assert (qemu.job, qemu.nodes) == (None, [])
