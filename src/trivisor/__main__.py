"""`python -m trivisor`: the command line, where its script is not on the PATH."""

from __future__ import annotations

from trivisor.cli.main import main

if __name__ == "__main__":
    main()
