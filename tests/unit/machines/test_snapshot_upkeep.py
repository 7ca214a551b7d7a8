"""The tree of snapshots, what they take, what is pruned, and their way to another home as one file."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from frozen_engine import FreezingEngine, disk, mind, warm, write
from machine_home import TestHome

from trivisor import VMM, AlreadyExists, HostLacks, InvalidSpec, Machine, NotFound, StorageError, TrivisorError
from trivisor.vmm.snapshots import carry, upkeep

MIB = 1 << 20


@pytest.fixture
def engine() -> FreezingEngine:
    return FreezingEngine()


@pytest.fixture
def vmm(home: TestHome, engine: FreezingEngine) -> Iterator[VMM]:
    with home.open(engine) as opened:
        yield opened


@pytest.fixture
def web(vmm: VMM, home: TestHome) -> Machine:
    return warm(vmm, home, random.Random(1).randbytes(MIB))


def test_tree(vmm: VMM, web: Machine) -> None:
    for name in ("a", "b"):
        web.snapshot(name, tags=["x"])
    web.restore("a")
    web.snapshot("c")
    other = vmm.create(snapshot="web@b", name="other")
    lines = [line for branch in vmm.snapshots.tree() for line in branch.lines()]
    assert lines == ["web@a memory #x", "  web@b memory #x  <- other", "  web@c memory  <- web"]
    # Those after one that is removed come after what was before it, whether a machine needs it or not.
    other.start()
    vmm.snapshots.remove("web@b")
    vmm.snapshots.remove("web@a")
    other.snapshot("d")
    assert [line for branch in vmm.snapshots.tree() for line in branch.lines()] == ["web@c memory  <- web", "other@d memory  <- other"]
    changed = vmm.snapshots.change("web@c", note="kept for later", tags=["y"], keep=True, ttl="1h")
    assert (changed.note, changed.tags, changed.keep) == ("kept for later", ("y",), True)
    assert changed.expires is not None and changed.expires > time.time() + 3000
    assert vmm.snapshots.change("web@c", ttl=0).expires is None
    assert [one.ref for one in vmm.snapshots.list(tag="y")] == ["web@c"]
    with pytest.raises(InvalidSpec):
        vmm.snapshots.change("web@c", tags=[""])


def test_a_long_line_of_them(vmm: VMM, web: Machine) -> None:
    for number in range(12):
        web.snapshot(f"s{number}")
    (branch,) = vmm.snapshots.tree()
    assert len([*branch.lines()]) == 12


def test_what_they_take(vmm: VMM, home: TestHome, web: Machine) -> None:
    web.snapshot("one")
    data = bytearray(disk(home.folder(web)))
    data[:4096] = bytes(4096)
    write(home.folder(web), bytes(data))
    web.snapshot("two")
    web.suspend()
    total = vmm.snapshots.du()
    one, two = total.snapshots
    assert one.own < 8192 and two.own < 16384 and one.shared > MIB - 8192 and two.shared > MIB - 8192
    assert one.plain >= MIB and total.other >= MIB - 4096
    assert total.packs < 1.1 * MIB
    assert vmm.snapshots.check() == []


def test_pruning(vmm: VMM, home: TestHome, web: Machine) -> None:
    for number, name in enumerate(["old", "kept", "used", "new"]):
        write(home.folder(web), random.Random(number).randbytes(MIB))
        web.snapshot(name, keep=name == "kept")
    child = vmm.create(snapshot="web@used", name="child")
    said = vmm.snapshots.prune(max_bytes=int(4.5 * MIB), dry_run=True)
    assert said.snapshots == ("web@old",) and said.plain == ("web@kept", "web@new")
    assert len(vmm.snapshots.du().snapshots) == 4 and vmm.snapshots.du().plain > 4 * MIB
    assert vmm.snapshots.prune().freed == 0  # there is no budget
    vmm.snapshots.max_bytes = "4608K"
    assert [one.name for one in vmm.snapshots.list()] == ["kept", "used", "new"]
    assert vmm.snapshots.max_bytes == 4608 << 10
    vmm.snapshots.prune(everything=True)
    assert [one.name for one in vmm.snapshots.list()] == ["kept", "used"]
    vmm.snapshots.max_bytes = 1
    assert web.snapshot("last").name in [one.name for one in vmm.snapshots.list()]
    child.start()
    web.restore("kept")
    assert disk(home.folder(web)) == random.Random(1).randbytes(MIB)


def test_no_more_is_laid_out_than_is_of_use(vmm: VMM, home: TestHome, web: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upkeep, "LAID_OUT", 5 * MIB // 2)
    for number in range(4):
        write(home.folder(web), random.Random(number).randbytes(MIB))
        web.snapshot(f"s{number}")
        if number == 1:
            web.restore("s0")
    there = [use.ref for use in vmm.snapshots.du().snapshots if use.plain]
    assert there == ["web@s0", "web@s2", "web@s3"]  # the first, since the machine runs from it
    web.restore("s1")
    assert disk(home.folder(web)) == random.Random(1).randbytes(MIB)


def test_check_says_what_is_damaged(vmm: VMM, home: TestHome, web: Machine) -> None:
    taken = web.snapshot("one")
    plain = home.root / "snapshots" / taken.id / "plain"
    (plain / "mind").write_bytes(b"cold")
    (words,) = vmm.snapshots.check()
    assert words.startswith("web@one: ") and not plain.exists()
    web.restore("one")
    assert mind(home.folder(web)) == b"warm"
    pack = max((home.root / "snapshots/packs/blobs/sha256").iterdir(), key=lambda path: path.stat().st_size)
    pack.chmod(0o600)
    pack.write_bytes(pack.read_bytes()[:-1])
    (words,) = vmm.snapshots.check()
    assert words.startswith("web@one: ") and pack.name in words


def other_home(tmp_path: Path, template: Path) -> TestHome:
    return TestHome(tmp_path / "other", template)


def test_to_another_home(vmm: VMM, home: TestHome, web: Machine, tmp_path: Path, home_template: Path) -> None:
    web.snapshot("ready", note="warm", tags=["a"])
    file = tmp_path / "web.snapshot"
    vmm.snapshots.export("web@ready", file)
    with pytest.raises(AlreadyExists):
        vmm.snapshots.export("web@ready", file)
    there = other_home(tmp_path, home_template)
    with there.open(FreezingEngine()) as other:
        taken = other.snapshots.import_(file)
        assert (taken.ref, taken.note, taken.tags, taken.memory) == ("web@ready", "warm", ("a",), True)
        with pytest.raises(AlreadyExists):
            other.snapshots.import_(file)
        assert other.snapshots.import_(file, "web@again").ref == "web@again"
        with other.run(snapshot="web@again") as machine:
            assert (mind(there.folder(machine)), disk(there.folder(machine))) == (b"warm", disk(home.folder(web)))
            assert machine.info()["facts"]["other"] == "True"
        other.images.collect()
    with VMM(tmp_path / "empty", engines=[FreezingEngine()]) as empty, pytest.raises(NotFound, match="image"):
        empty.snapshots.import_(file)
    with there.open(FreezingEngine()) as other:
        with other.images.rootfs(web.info()["digest"]).open("ab") as root:  # as another squashfs-tools would write it
            root.write(bytes(4096))
        with pytest.raises(HostLacks, match="byte for byte"):
            other.snapshots.import_(file, "web@squashed")
    strange = FreezingEngine()
    strange.here = "two"
    with there.open(strange) as other, pytest.raises(HostLacks, match="one"):
        other.snapshots.import_(file, "web@third")
    there.clear()


def test_a_file_that_is_not_what_it_was(vmm: VMM, web: Machine, tmp_path: Path) -> None:
    web.snapshot("ready")
    file = tmp_path / "file"
    vmm.snapshots.export("web@ready", file)
    vmm.snapshots.remove("web@ready")
    whole = file.read_bytes()
    places = random.Random(7).sample(range(len(whole)), 40)
    for data in [*(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in places), whole[:-1], whole + b"x", b"", whole[:50]]:
        file.write_bytes(data)
        try:
            vmm.snapshots.import_(file, "web@ready")
        except TrivisorError:
            assert vmm.snapshots.list() == []
            assert {entry.name for entry in (vmm.home / "snapshots").iterdir()} == {"packs"}
        else:  # a letter of a note may have changed
            vmm.snapshots.remove("web@ready")


def test_a_stranger_s_wishes(vmm: VMM, web: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file can be written by anybody: what it asks for must not open this host."""
    web.snapshot("ready")
    write, wishes = msgspec.json.encode, {"volumes": {"/x": {"source": "/etc", "readonly": False}}, "network": "backend", "reach": ["host"]}

    def forged(value: object) -> bytes:
        if not isinstance(value, carry.Head):
            return write(value)
        said = msgspec.json.decode(write(value))
        said["spec"] |= wishes
        return write(said)

    monkeypatch.setattr(carry.msgspec.json, "encode", forged)
    vmm.snapshots.export("web@ready", tmp_path / "file")
    monkeypatch.undo()
    vmm.snapshots.import_(tmp_path / "file", "web@forged")
    child = vmm.create(snapshot="web@forged")
    assert (child.spec.volumes, child.spec.network, child.spec.reach) == ({}, "nat", ())
    wishes.clear()
    wishes["kernel"] = "/etc/shadow"  # type: ignore[assignment]
    monkeypatch.setattr(carry.msgspec.json, "encode", forged)
    vmm.snapshots.export("web@ready", tmp_path / "two")
    monkeypatch.undo()
    with pytest.raises(InvalidSpec):
        vmm.snapshots.import_(tmp_path / "two", "web@two")
    with pytest.raises(StorageError):
        vmm.snapshots.import_(tmp_path / "none")
