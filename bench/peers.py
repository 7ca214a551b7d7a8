"""The peers of bench/walls.py: other programs that run /bin/true in the same image's root, whichever are installed and work here."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.common import Series

_LONGEST = 60.0


@dataclass
class Peer:
    """One command line, and what it took. `why` says why it was not run."""

    name: str
    argv: list[str]
    why: str = ""

    def __post_init__(self) -> None:
        self.series = Series()
        if not self.why:
            self.why = self._try()

    def _try(self) -> str:
        if shutil.which(self.argv[0]) is None:
            return "not installed"
        done = subprocess.run(self.argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=_LONGEST, check=False)
        if not done.returncode:
            return ""
        said = [
            line for line in done.stderr.decode(errors="replace").splitlines() if line.strip() and not line.startswith(("Run ", "See "))
        ]
        return said[-1].strip()[:120] if said else f"exit status {done.returncode}"

    def measure(self) -> None:
        """Run it once more."""
        if not self.why:
            with self.series.timed():
                subprocess.run(self.argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=_LONGEST, check=True)


def _bundle(folder: Path, root: Path) -> None:
    """Write the OCI bundle of `runc spec`, less its terminal."""
    subprocess.run(["runc", "spec", "--bundle", str(folder)], check=True, capture_output=True)
    config = json.loads((folder / "config.json").read_text())
    config["process"] |= {"terminal": False, "args": ["/bin/true"]}
    config["root"] = {"path": str(root), "readonly": True}
    (folder / "config.json").write_text(json.dumps(config))


@contextmanager
def peers(root: Path, runsc_path: str, platform: str) -> Iterator[dict[str, Peer]]:
    """Give bwrap, runc, runsc and docker, with the image's root unpacked in `root`, and the runsc and platform that our machines have."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if shutil.which("runc"):
            _bundle(folder, root)
        bwrap = ["bwrap", "--unshare-all", "--ro-bind", str(root), "/", "--proc", "/proc", "--dev", "/dev", "/bin/true"]
        runc = ["runc", "--root", f"{name}/runc", "run", "--bundle", name, "trivisor-bench"]
        runsc = [runsc_path, f"--root={name}/runsc", "--network=none", f"--platform={platform}", "do", "/bin/true"]
        docker = ["docker", "run", "--rm", "--pull=never", "--network=none", "debian", "/bin/true"]
        yield {
            "bwrap": Peer("bwrap --unshare-all", bwrap),
            "runc": Peer("runc run", runc),
            "runsc": Peer("runsc do", runsc),
            "docker": Peer("docker run", docker),
        }
