"""`make bench`: every bench, one table. The rows are kept in build/ as well, as Markdown and as JSON."""

from __future__ import annotations

import importlib
import json
import platform
import sys
from pathlib import Path
from typing import Any

from bench.common import table

ROOT = Path(__file__).parents[1]
# Those that are part of another bench among them.
HELPERS = (
    "__init__",
    "common",
    "devices",
    "fork_gvisor",
    "fork_peers",
    "merging",
    "network",
    "peer",
    "peers",
    "plugging",
    "pools",
    "sandlocked",
)


def benches() -> list[Any]:
    """Return the modules in bench/ that answer a question."""
    names = sorted(path.stem for path in (ROOT / "bench").glob("*.py") if path.stem not in HELPERS)
    return [importlib.import_module(f"bench.{name}") for name in names]


def main() -> int:
    """Run them all. A bound that is missed is in the table as missed; the exit status is then 1."""
    found, notes = [], []
    for bench in benches():
        print(f"== {bench.__name__}: {bench.__doc__.splitlines()[0]}", file=sys.stderr, flush=True)
        found += bench.rows("--quick" in sys.argv)
        notes.append(f"{bench.__name__}: {' '.join(bench.NOTES.split())}")
    text = "\n\n".join([f"Linux {platform.release()}, {platform.processor() or platform.machine()}", table(found), *notes])
    print(text)
    folder = ROOT / "build"
    folder.mkdir(exist_ok=True)
    (folder / "benches.md").write_text(text + "\n")
    (folder / "benches.json").write_text(json.dumps([line.plain() for line in found], indent=1) + "\n")
    return int(any(line.holds is False for line in found))


if __name__ == "__main__":
    sys.exit(main())
