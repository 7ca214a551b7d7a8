"""What docs/disks.md shows does what it says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from trivisor import VMM
from trivisor.core.spec import Wall
from trivisor.core.units import MIB
from trivisor.images.disks import qemuimg

DOCUMENT = Path(__file__).parents[2] / "docs/disks.md"
pytestmark = [pytest.mark.slow, pytest.mark.walls("vm")]


def test_the_examples(wall: Wall, wall_vmm: VMM, tmp_path: Path) -> None:
    """One after the other, in a folder with the two files that they name."""
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/there").write_text("there\n")
    with (tmp_path / "raw").open("wb") as file:
        file.truncate(16 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-d", tmp_path / "tree", tmp_path / "raw"], check=True)
    qemuimg.convert(qemuimg.open_source(tmp_path / "raw", "raw"), tmp_path / "server.vmdk", "vmdk")
    disks = wall_vmm.disks
    disks.import_(tmp_path / "raw", "raw")
    disks.export("raw", tmp_path / "appliance.ova", memory="256M")
    disks.remove("raw")
    examples = re.findall(r"^```python\n(.*?)^```", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(examples)],
        env={**os.environ, "TRIVISOR_HOME": str(wall_vmm.home)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=170,
    )
    assert done.returncode == 0, done.stderr
    disks.remove("appliance")
    said = done.stdout.splitlines()
    assert "there" in said and "vhdx" in said and "raw 1 268435456 () ()" in said
    assert (tmp_path / "data.vhdx").exists() and (tmp_path / "out.ova").exists()
