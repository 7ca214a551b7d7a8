"""What images take of the disk, and clearing away what nobody needs: beside pulls, builds and machines."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import tar_maker as tar
from images_for_tests import layered_image

from trivisor.core.errors import CallerError, NotFound
from trivisor.core.paths import Home
from trivisor.images.catalog import Images
from trivisor.images.intake import Bytes
from trivisor.images.registry import partial
from trivisor.images.upkeep import STEPS, Upkeep
from trivisor.va.build import cache


@pytest.fixture
def place(tmp_path: Path) -> Home:
    made = Home(tmp_path / "home")
    made.open()
    return made


@pytest.fixture
def images(place: Home, tmp_path: Path) -> Iterator[Images]:
    """With "one" of one layer, and "two" of that and another of 100 kB."""
    made = Images(place)
    (tmp_path / "root").mkdir()
    (tmp_path / "root/hello").write_text("one")
    made.import_(tmp_path / "root", "one")
    layered_image(place, "one", [tar.file("more", os.urandom(100_000)) + tar.END], "two", labels={"team": "blue"})
    yield made
    made.close()


def step(images: Images, data: bytes, name: str, *, age: float = 0.0) -> str:
    """Remember a layer as that of a build's step."""
    with images.workspace() as work:
        digest = images.store.add(Bytes(data), work.owner)
        images.store.set_ref(STEPS + name, digest, {"size": len(data), "created": time.time() - age})
    return digest


def piece(images: Images, size: int, *, age: float = 0.0) -> Path:
    """Leave a piece of a download."""
    path = partial.piece(images.store, "sha256:" + "ab" * 32)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(bytes(size))
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_shared_blobs_are_told_from_own(images: Images) -> None:
    one, two = images.get("one"), images.get("two")
    usage = images.usage()
    weighed = {image.names: image for image in usage.images}
    first, second = weighed[("one:latest",)], weighed[("two:latest",)]
    assert second.size > 100_000 and second.size - second.own == one.size == two.layers[0].size
    assert first.size - first.own == one.size
    assert usage.blobs.size == first.own + second.own + one.size == sum(images.store.sizes().values())
    assert usage.size == usage.reclaimable == usage.blobs.size


def test_everything_has_its_row(images: Images) -> None:
    images.pin(images.get("two"), "machine:x")
    images.lowers(images.get("two").digest)
    step(images, b"step" * 1000, "s")
    piece(images, 5000)
    with images.workspace() as work:
        images.store.add(io.BytesIO(b"work under way"), work.owner)
        usage = images.usage()
        assert usage.rest.size == len(b"work under way") and usage.rest.reclaimable == 0
    usage = images.usage()
    assert (usage.build.count, usage.build.size) == (1, 4000)
    assert (usage.downloads.count, usage.downloads.size) == (1, 5000)
    assert usage.roots.count == 2 and usage.roots.size > 100_000 and usage.roots.reclaimable == 0
    assert usage.rest.reclaimable == len(b"work under way")
    (used,) = [image for image in usage.images if image.used_by]
    assert used.used_by == ("machine:x",) and used.roots == usage.roots.size
    assert usage.blobs.reclaimable < 2000, "the layer that both have is needed"


def test_step_that_an_image_has_costs_nothing(images: Images) -> None:
    layer = images.get("two").layers[1]
    images.store.set_ref(STEPS + "s", layer.digest, {"size": layer.size, "created": time.time()})
    usage = images.usage()
    assert (usage.build.count, usage.build.size) == (1, 0)
    assert images.prune().steps == 0
    assert images.prune(everything=True).steps == 1


def test_names_of_steps_are_those_of_builds() -> None:
    assert STEPS == cache.PREFIX


def test_prune_takes_what_no_name_reaches(images: Images) -> None:
    step(images, b"step" * 1000, "s")
    left = piece(images, 5000)
    with images.workspace() as work:
        images.store.add(io.BytesIO(b"garbage" * 100), work.owner)
    pruned = images.prune()
    assert (pruned.images, pruned.steps, pruned.freed, pruned.kept) == ([], 1, 4000 + 5000 + 700, [])
    assert not left.exists()
    assert [image.name for image in images.list()] == ["one:latest", "two:latest"]
    assert images.check() == []


def test_prune_of_everything_keeps_what_machines_have(images: Images) -> None:
    two = images.get("two")
    images.pin(two, "machine:x")
    images.tag("two", "also")
    images.lowers(images.get("one").digest)
    images.lowers(two.digest)
    assert images.prune(everything=True).images == ["one:latest"]
    assert [image.name for image in images.list()] == ["also:latest", "two:latest"]
    assert all(path.exists() for path in images.lowers(two.digest)) and images.check() == []
    images.unpin("machine:x")
    before = images.usage().size
    pruned = images.prune(everything=True)
    assert pruned.images == ["also:latest", "two:latest"] and pruned.freed == before
    assert images.usage().size == 0


def test_prune_by_age_and_label(images: Images) -> None:
    step(images, b"new", "new")
    step(images, b"old", "old", age=7200)
    new = piece(images, 10, age=60)
    pruned = images.prune(everything=True, older=3600)
    assert (pruned.images, pruned.steps) == ([], 1) and new.exists()
    assert images.prune(everything=True, labels={"team": "red"}).images == []
    assert images.prune(everything=True, labels={"team": None}).images == ["two:latest"]


@pytest.mark.parametrize("everything", [False, True])
def test_dry_run_says_what_prune_does(images: Images, everything: bool) -> None:
    images.pin(images.get("one"), "machine:x")
    for name in ("one", "two"):
        images.lowers(images.get(name).digest)
    step(images, b"step" * 1000, "s")
    images.store.set_ref(STEPS + "of two", images.get("two").layers[1].digest, {"size": 1, "created": time.time()})
    left = piece(images, 5000)
    with images.workspace() as work:
        images.store.add(io.BytesIO(b"garbage" * 100), work.owner)
    before = images.usage()
    told = images.prune(everything=everything, dry_run=True)
    assert images.usage() == before and left.exists()
    assert told.images == (["two:latest"] if everything else []) and told.steps == 1 + everything
    assert images.prune(everything=everything) == told
    assert told.freed == before.size - images.usage().size >= 9700


def test_force_takes_the_name_of_what_a_machine_has(images: Images) -> None:
    """The image stays, without a name, for as long as the machine does."""
    two = images.get("two")
    images.pin(two, "machine:x")
    with pytest.raises(CallerError, match="machine:x"):
        images.remove("two")
    images.remove("two", force=True)
    with pytest.raises(NotFound):
        images.get("two")
    assert images.get(two.digest).digest == two.digest and images.lowers(two.digest)
    assert [image.digest for image in images.usage().images if not image.names] == [two.digest]
    images.unpin("machine:x")
    images.collect()
    assert not images.store.exists(two.digest)


def test_host_roots_stay_while_machines_have_them(place: Home, tmp_path: Path) -> None:
    """What machines have is asked for after looking what is there."""
    needed = ["host:" + "a" * 64]
    with_machines = Images(place, needs=lambda: needed)
    root = with_machines.lower_paths(needed[0])[0]
    root.mkdir(parents=True)
    with_machines.prune(everything=True)
    assert root.exists()
    needed.clear()
    with_machines.prune()
    assert not root.exists()
    with_machines.close()


def test_machine_that_takes_the_image_at_that_instant_keeps_it(images: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between looking who needs what and dropping names."""
    labelled = Upkeep._labelled

    def late(upkeep: Upkeep, digest: str, labels: dict[str, str | None]) -> bool:
        if digest == images.get("two").digest:
            images.pin(images.get("two"), "machine:late")
        return labelled(upkeep, digest, labels)

    monkeypatch.setattr(Upkeep, "_labelled", late)
    assert images.prune(everything=True).images == ["one:latest"]
    assert images.get("two") and images.check() == []


def test_damaged_image_keeps_no_other_from_being_pruned(images: Images) -> None:
    two = images.get("two")
    images.store.path(two.digest).unlink()
    other = Images(Home(images.store.root.parent))
    pruned = other.prune(everything=True)
    assert pruned.images == ["one:latest", "two:latest"]
    assert other.usage().size == 0
    other.close()


def test_inspect_says_all(images: Images) -> None:
    images.tag("two", "also")
    two = images.get("two")
    images.pin(two, "machine:x")
    about = images.inspect("two")
    assert (about["names"], about["digest"], about["used_by"]) == (["also:latest", "two:latest"], two.digest, ["machine:x"])
    assert [layer["in"] for layer in about["layers"]] == [["one:latest"], []]
    assert about["config"]["Labels"] == {"team": "blue"} and about["platform"] == str(two.platform)
    assert about["roots"] == {"squashfs": None, "trees": []}
    lowers = images.lowers(two.digest)
    assert images.inspect(two.digest)["roots"]["trees"] == [str(path) for path in lowers]
    assert images.inspect("host")["digest"].startswith("host:")
    with pytest.raises(NotFound):
        images.inspect("none")


def test_history_by_name_and_digest(images: Images) -> None:
    assert images.history("one") == images.history(images.get("one").digest)
    assert images.history("one")[0].created_by == "import"
