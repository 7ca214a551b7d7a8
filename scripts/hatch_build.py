"""Build hook: compiles the guest program into the wheel, which is then of this platform only."""

from __future__ import annotations

import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class GuestBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """Runs `make -C guest` and puts what it made under trivisor/_guest."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        root = Path(self.root)
        subprocess.run(["make", "-C", str(root / "guest"), "--no-print-directory"], check=True)
        build_data["pure_python"] = False
        build_data["tag"] = "py3-none-" + sysconfig.get_platform().replace("-", "_").replace(".", "_")
        for made in (root / "src" / "trivisor" / "_guest").iterdir():
            build_data["force_include"][str(made)] = f"trivisor/_guest/{made.name}"
