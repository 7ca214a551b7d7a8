"""What wall="auto" takes, for each host there can be."""

from __future__ import annotations

import pytest

from trivisor.core.spec import Wall
from trivisor.vmm.choice import choose
from trivisor.vmm.engine import WallReport


def _host(vm: str, gvisor: bool, container: bool) -> list[WallReport]:
    return [
        WallReport("vm", vm != "", why="no QEMU", remedy="install QEMU", features={"kvm": vm == "kvm"}),
        WallReport("gvisor", gvisor, why="no runsc", remedy="install runsc"),
        WallReport("container", container, why="no namespaces"),
    ]


@pytest.mark.parametrize("container", [True, False])
@pytest.mark.parametrize(
    ("vm", "gvisor", "taken"),
    [
        ("kvm", True, "vm"),
        ("kvm", False, "vm"),
        ("tcg", True, "gvisor"),
        ("tcg", False, "vm"),
        ("", True, "gvisor"),
        ("", False, None),
    ],
)
def test_strongest_is_taken_and_never_the_container(vm: str, gvisor: bool, container: bool, taken: Wall | None) -> None:
    choice = choose(_host(vm, gvisor, container))
    assert choice.wall == taken
    assert choice.why


def test_nothing_says_what_is_missing_and_what_helps() -> None:
    choice = choose(_host("", False, True))
    assert choice.why == "vm: no QEMU; gvisor: no runsc"
    assert choice.remedy == "install QEMU; install runsc"


def test_walls_without_an_engine_are_no_choice() -> None:
    assert choose([]).wall is None
