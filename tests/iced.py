"""A home with ice for its image, so that no copy of it boots. `python -m iced HOME` makes it before the tests begin."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

from trivisor import VMM, HostLacks
from trivisor.core.paths import Home
from trivisor.vmm.engines.vm import kit


def make(home: Path) -> None:
    """Make ice for the image, and the kit of the full kernel, which has to be fetched: the tests that need it say so if it is not there."""
    with VMM(home) as vmm:
        if not next(report for report in vmm.walls() if report.wall == "vm").available:
            return
        with suppress(HostLacks):
            kit.get(Home(home), "full", lambda _: None)
        for _ in range(2):  # an image's own ice is made at its second start
            with vmm.run("debian", wall="vm", disk="8G"):
                pass


if __name__ == "__main__":
    make(Path(sys.argv[1]))
