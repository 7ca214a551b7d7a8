"""Folders in a machine's memory, behind every wall."""

from __future__ import annotations

import pytest

from trivisor import VMM
from trivisor.core.errors import InvalidSpec
from trivisor.core.spec import Spec, Wall
from trivisor.core.units import MIB

SCRIPT = """
echo x > /scratch/deep/mine && cat /scratch/deep/mine
head -c 3000000 /dev/zero > /small/much 2>/dev/null || echo full
test $(wc -c < /small/much) -le 1048576 && echo bounded
"""


def test_a_folder_in_memory(wall_vmm: VMM, wall: Wall) -> None:
    machine = wall_vmm.create("mini", wall=wall, memory="128M", tmpfs={"/scratch/deep": "16M", "/small": "1M"})
    machine.start()
    said = machine.exec(["sh", "-c", SCRIPT], user="user", check=True).text.split()
    assert said == ["x", "full", "bounded"]
    machine.stop()
    machine.start()
    assert machine.exec("echo /scratch/deep/* /small/*", check=True).text.split() == ["/scratch/deep/*", "/small/*"]
    machine.delete(force=True)


@pytest.mark.walls("vm")
def test_what_is_none(wall: Wall) -> None:
    spec = Spec.make(image="x", name="x", wall=wall, tmpfs={"/a/": "1M"})
    assert spec.tmpfs == {"/a": MIB}
    for wish, says in (
        (["/a"], "must map"),
        ({"a": "1M"}, "not a place"),
        ({"/proc/x": "1M"}, "cannot lie"),
        ({"/a": "much"}, "tmpfs /a"),
        ({"/a": "1M", "/a/": "1M"}, "same place"),
        ({f"/{number}": 1 for number in range(65)}, "may have 64"),
    ):
        with pytest.raises(InvalidSpec, match=says):
            Spec.make(image="x", name="x", wall=wall, tmpfs=wish)
    with pytest.raises(InvalidSpec, match="both to lie at /a"):
        Spec.make(image="x", name="x", wall=wall, tmpfs={"/a": "1M"}, volumes={"/a": "v"})
