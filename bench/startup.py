"""How long until the command line answers?

The interpreter is run itself, without the shim that a version manager puts before it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.common import Row, Series, main, row

NOTES = "Bounds: --help 120 ms, ps on an empty home 180 ms. The peer is the same interpreter doing nothing."
RUN = "from trivisor.cli.main import main; main()"
PEER = "python -c pass"


def _time(argv: list[str], rounds: int, bytecode: str) -> Series:
    # A user's second start finds compiled bytecode, even where this environment was told to write none.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = bytecode
    series = Series()
    for number in range(rounds + 1):
        with series.timed():
            subprocess.run(argv, check=True, stdout=subprocess.DEVNULL, env=environment)
        if number == 0:
            series.values.clear()  # the first one compiled, and read the files from the disk
    return series


def rows(quick: bool) -> list[Row]:
    """Time the interpreter, `trivisor --help`, and `trivisor ps` on an empty home."""
    python = str(Path(sys.executable))
    rounds = 5 if quick else 20
    with tempfile.TemporaryDirectory() as folder:
        bytecode, home = f"{folder}/bytecode", f"{folder}/home"
        nothing = _time([python, "-c", "pass"], rounds, bytecode)
        shown = _time([python, "-c", RUN, "--help"], rounds, bytecode)
        listed = _time([python, "-c", RUN, "--home", home, "ps"], rounds, bytecode)
    return [
        row("trivisor --help", shown, "ms", bound=120, peer=PEER, against=nothing),
        row("trivisor ps, empty home", listed, "ms", bound=180, peer=PEER, against=nothing),
    ]


if __name__ == "__main__":
    main(rows, NOTES)
