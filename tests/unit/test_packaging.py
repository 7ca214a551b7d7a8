"""What pip installs: a wheel that carries the compiled guest program and nothing of the repository besides the package."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GUEST = ("trivisor/_guest/tvinit", "trivisor/_guest/probe.bin")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build a wheel of a copy of the tree, with the build tools of this environment."""
    if shutil.which("gcc") is None or shutil.which("make") is None:
        pytest.skip("needs gcc and make")
    if subprocess.run([sys.executable, "-c", "import hatchling"], capture_output=True).returncode:
        pytest.skip("needs hatchling")
    copy = tmp_path_factory.mktemp("tree")
    for name in ("src", "guest", "scripts"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("_guest", "build", "__pycache__"))
    for name in ("pyproject.toml", "README.md", ".gitignore"):
        shutil.copy(ROOT / name, copy)
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel"],
        cwd=copy,
        capture_output=True,
        text=True,
        timeout=170,
    )
    assert done.returncode == 0, done.stderr
    (built,) = (copy / "dist").glob("*.whl")
    return built


def test_wheel_carries_the_guest_program(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert set(GUEST) <= set(names)
    assert [name for name in names if not name.startswith(("trivisor/", "trivisor-"))] == []
    assert [name for name in names if name.endswith((".c", ".h", ".o"))] == []


def test_guest_program_is_static_and_can_be_run(wheel: Path, tmp_path: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    info = archive.getinfo(GUEST[0])
    assert stat.S_IMODE(info.external_attr >> 16) & 0o111
    program = tmp_path / "tvinit"
    program.write_bytes(archive.read(info))
    program.chmod(0o755)
    assert b"/ld-linux" not in program.read_bytes()
    assert subprocess.run([program], capture_output=True, timeout=10).returncode != os.EX_OK


def test_wheel_is_of_this_platform_only(wheel: Path) -> None:
    assert wheel.name.startswith("trivisor-") and wheel.name.endswith("_x86_64.whl") and "-py3-none-linux" in wheel.name
