"""What the benches share: a series of timings, rows with a peer and a bound, the table, and the command line.

A bench is a module with `NOTES`, a text printed under its table, and `rows(quick) -> list[Row]`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field


@dataclass
class Series:
    """Measurements of one thing, in one unit."""

    values: list[float] = field(default_factory=list)

    @contextmanager
    def timed(self, scale: float = 1000.0) -> Iterator[None]:
        """Add how long the body took: milliseconds unless `scale` says otherwise. A body that fails adds nothing."""
        began = time.perf_counter()
        yield
        self.values.append((time.perf_counter() - began) * scale)

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def spread(self) -> tuple[float, float]:
        """The quartiles; the extremes of fewer than four."""
        if len(self.values) < 4:
            return min(self.values), max(self.values)
        low, _, high = statistics.quantiles(self.values, n=4)
        return low, high


@dataclass(frozen=True)
class Row:
    """One line of a table. `bound` is what `value` must not exceed, in the same unit; None: there is none."""

    what: str
    value: float
    unit: str
    peer: str = ""
    peer_value: float | None = None
    bound: float | None = None
    spread: tuple[float, float] | None = None

    @property
    def holds(self) -> bool | None:
        """Whether the bound is kept; None where there is none."""
        return None if self.bound is None else self.value <= self.bound

    def plain(self) -> dict[str, object]:
        """Return what --json prints."""
        return {**asdict(self), "holds": self.holds}


def row(
    what: str,
    series: Series,
    unit: str,
    *,
    bound: float | None = None,
    peer: str = "",
    against: Series | None = None,
    share: float | None = None,
) -> Row:
    """Return the row of a series. With `share`, the bound is that share of the peer's median. A peer that did not run is not named."""
    peer_value = against.median if against and against.values else None
    peer = "" if against and peer_value is None else peer
    if share is not None and peer_value is not None:
        bound = share * peer_value
    return Row(what, series.median, unit, peer, peer_value, bound, series.spread)


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def table(rows: Sequence[Row]) -> str:
    """Return the rows as a Markdown table, columns aligned."""
    cells = [["what", "median", "spread", "unit", "peer", "peer's", "share", "bound", "holds"]]
    for line in rows:
        spread = f"{_number(line.spread[0])}..{_number(line.spread[1])}" if line.spread else ""
        share = f"{line.value / line.peer_value:.2f}" if line.peer_value else ""
        holds = {None: "", True: "yes", False: "MISSED"}[line.holds]
        cells.append(
            [line.what, _number(line.value), spread, line.unit, line.peer, _number(line.peer_value), share, _number(line.bound), holds]
        )
    widths = [max(len(cell[column]) for cell in cells) for column in range(len(cells[0]))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in cells]
    lines.insert(1, "| " + " | ".join("-" * width for width in widths) + " |")
    return "\n".join(lines)


def main(rows: Callable[[bool], list[Row]], notes: str) -> None:
    """Run one bench as a program. Exit status 1 if a bound is missed."""
    parser = argparse.ArgumentParser(description=notes)
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    options = parser.parse_args()
    found = rows(options.quick)
    if options.json:
        print(json.dumps([line.plain() for line in found]))
    else:
        print(f"{table(found)}\n\n{notes.strip()}")
    sys.exit(any(line.holds is False for line in found))
