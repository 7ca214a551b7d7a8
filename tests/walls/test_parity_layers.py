"""Images of several layers behind each wall: what the uppermost says holds, what it hides is gone."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from images_for_tests import layered_image
from machine_home import VmHome
from wall_fixtures import Make

from trivisor import VMM, Machine
from trivisor.core.paths import Home
from trivisor.core.spec import Wall

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

from tar_maker import END, block, file, folder

LAYERS = [
    folder("srv/d") + file("srv/d/old", b"old") + file("srv/gone", b"x") + file("srv/kept", b"kept") + END,
    file("srv/.wh.gone") + folder("srv/d") + file("srv/d/.wh..wh..opq") + file("srv/d/new", b"new") + END,
    block("srv/its", mode=0o640, uid=1000, gid=2000) + file("etc/motd", b"three layers") + END,
]


@pytest.fixture(scope="module")
def layered(wall_home: VmHome, wall: Wall) -> Iterator[Machine]:
    home = Home(wall_home.root)
    with VMM(wall_home.root) as vmm:
        layered_image(home, "mini", LAYERS, "layered", env=["FROM_IMAGE=yes"])
        machine = vmm.create("layered", wall=wall)
        machine.start()
        yield machine
        machine.delete(force=True)


def test_layers_lie_over_one_another(layered: Machine) -> None:
    said = layered.exec("cd /srv; echo * d/*; cat d/new kept /etc/motd; echo; echo $FROM_IMAGE", check=True).text
    assert said == "d its kept d/new\nnewkeptthree layers\nyes\n"
    its = layered.files.stat("/srv/its")
    assert (its.mode & 0o7777, its.uid, its.gid) == (0o640, 1000, 2000)


def test_they_can_be_written_over(layered: Machine) -> None:
    commands = "cd /srv; rm kept; echo more >> d/new; mkdir gone; mv d/new gone; rm -r d; mkdir d; echo * d/* gone/*; cat gone/new"
    assert layered.exec(commands, check=True).text == "d gone its d/* gone/new\nnewmore\n"


@pytest.mark.walls("container", "gvisor")
def test_as_many_layers_as_there_may_be(wall_home: VmHome, make: Make) -> None:
    tars = [file(f"srv/{number}", b"%d" % number) + END for number in range(126)]
    layered_image(Home(wall_home.root), "mini", tars, "tall")
    assert make("tall").exec("set -- /srv/*; echo $#; cat /srv/0 /srv/125", check=True).text == "126\n0125"
