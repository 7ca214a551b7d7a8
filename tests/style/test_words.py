"""What must not be in the tree: hosts of package registries, paths of somebody's machine, work left undone."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Each is written so that this file does not match itself.
FORBIDDEN = {
    "a registry's host": r"(pypi|pythonhosted|npmjs|crates|docker|quay|ghcr|gcr|(deb|snapshot)[.]debian|anaconda)[.](org|io|com)\b",
    "an index of packages": r"--(extra-)?index-url|PIP_INDEX" + "_URL",
    "a path of somebody's machine": r"(?<![\w.*])/(root/[.]pyenv|home/\w+/|wo[r]k/|var/tmp/d[e]v|tmp/b[a]sh_jobs)",
    "work left undone": r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X)\b",
}

ALLOWED = {
    "a registry's host": {
        "src/trivisor/images/reference.py",
        "tests/unit/test_images_model.py",
        "tests/unit/test_images_reference.py",
    }
}
"""Where a name of an image without a registry leads is part of how names are read: there, and nowhere else."""


def _files() -> list[Path]:
    listed = subprocess.run(
        ["git", "-c", f"safe.directory={ROOT}", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        check=False,
    )
    if listed.returncode:
        folders = ("src", "guest/src", "docs", "scripts", "tests", "bench")
        return [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    return [ROOT / name for name in listed.stdout.decode().split("\0") if name and (ROOT / name).is_file()]


@pytest.mark.parametrize("what", FORBIDDEN)
def test_is_nowhere(what: str) -> None:
    pattern = re.compile(FORBIDDEN[what])
    found = []
    for path in _files():
        if str(path.relative_to(ROOT)) in ALLOWED.get(what, ()):
            continue
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), 1):
            if pattern.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not found, "\n".join(found)


def test_constraints_are_pins_only() -> None:
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        assert re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][0-9A-Za-z.]*", line), line
