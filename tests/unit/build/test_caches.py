"""What RUN --mount=type=cache keeps: who has it at the same time, what it weighs, clearing it away."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from fake_engine import FakeEngine

from trivisor import VMM
from trivisor.core.errors import BuildFailed
from trivisor.va.build import caches
from trivisor.va.build.caches import Asker
from trivisor.va.build.halt import Halt, Halted
from trivisor.va.build.mounts import Mount, Sharing

ASKER = Asker("Containerfile", 3, 0.2, Halt().check)


@pytest.fixture
def vmm(tmp_path: Path) -> Iterator[VMM]:
    with VMM(tmp_path / "home", engines=[FakeEngine()]) as opened:
        yield opened


def mount(sharing: Sharing = "shared", cache: str = "c") -> Mount:
    return Mount("cache", "/kept", id=cache, sharing=sharing)


def hold(vmm: VMM, stack: ExitStack, *mounts: Mount) -> dict[str, str]:
    return caches.hold(vmm, mounts, ASKER, stack)


def test_shared_is_had_by_many(vmm: VMM) -> None:
    with ExitStack() as one, ExitStack() as other:
        assert hold(vmm, one, mount()) == hold(vmm, other, mount())
        assert hold(vmm, other, mount(cache="d")).keys() == {"d"}
    assert len(vmm.volumes.list()) == 2


def test_locked_is_waited_for(vmm: VMM) -> None:
    with ExitStack() as one, ExitStack() as other:
        hold(vmm, one, mount("locked"))
        with pytest.raises(BuildFailed, match=r"^Containerfile:3: .*another build has the cache c"):
            hold(vmm, other, mount("locked"))
        one.close()
        hold(vmm, other, mount("locked"))


def test_who_waits_ends_with_its_build(vmm: VMM) -> None:
    halt = Halt()
    with ExitStack() as one, ExitStack() as other:
        hold(vmm, one, mount("locked"))
        soon = threading.Timer(0.1, halt.call)
        soon.start()
        with pytest.raises(Halted):
            caches.hold(vmm, [mount("locked")], Asker("Containerfile", 3, 60, halt.check), other)
        soon.join()


def test_private_takes_another(vmm: VMM) -> None:
    with ExitStack() as one, ExitStack() as other:
        assert hold(vmm, one, mount("private"))["c"] + "-1" == hold(vmm, other, mount("private"))["c"]
    with ExitStack() as later:
        assert not hold(vmm, later, mount("private"))["c"].endswith("-1")


def test_twice_in_one_step_is_once(vmm: VMM) -> None:
    with ExitStack() as stack:
        assert hold(vmm, stack, mount("locked"), mount(), mount("locked")).keys() == {"c"}


def test_what_is_held_stays(vmm: VMM) -> None:
    vmm.volumes.create("build-mine")
    with ExitStack() as stack:
        (name,) = hold(vmm, stack, mount()).values()
        (vmm.volumes.get(name).path / "kept").write_bytes(bytes(100_000))
        weight = caches.weigh(vmm)
        assert (weight.count, weight.reclaimable) == (1, 0) and weight.size >= 100_000
        assert caches.prune(vmm) == 0
    assert caches.weigh(vmm).reclaimable == weight.size
    assert caches.prune(vmm, older=60) == 0
    os.utime(vmm.volumes.get(name).path, (time.time() - 100,) * 2)
    assert caches.prune(vmm, older=60) == weight.size
    assert [volume.name for volume in vmm.volumes.list()] == ["build-mine"]
    assert list((vmm.home / "tmp").iterdir()) == []


def test_one_that_a_machine_has_stays(vmm: VMM, tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root/file").touch()
    vmm.images.import_(tmp_path / "root", "tiny")
    with ExitStack() as stack:
        (name,) = hold(vmm, stack, mount()).values()
    machine = vmm.create("tiny", volumes={"/kept": name})
    (vmm.volumes.get(name).path / "kept").write_text("x")
    assert caches.weigh(vmm).reclaimable == caches.prune(vmm) == 0 and vmm.volumes.get(name)
    machine.delete()
    caches.prune(vmm)
    assert vmm.volumes.list() == []
