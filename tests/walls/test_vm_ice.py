"""Ice in every condition: none, damaged, out of date, wanted by two at once, not wanted at all; and kernels of every kind."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import msgspec
import pytest
from host_state import assert_nothing_left
from machine_home import VmHome, in_child
from wall_fixtures import Make

from trivisor import VMM, HostLacks, Machine
from trivisor.launch import tvinit
from trivisor.vmm.engines.vm import ice, qemu

BOUND = 60.0


def way(machine: Machine) -> str:
    return str(machine.info()["facts"]["start"]).partition(",")[0]


def ices(home: Path) -> dict[str, Path]:
    """Return blank ice and image ice by what they are, of which there is one each; an image's needs its root."""
    found = {}
    for folder in (home / "ice").iterdir():
        if folder.is_dir():
            facts = msgspec.json.decode((folder / "ice.json").read_bytes(), type=ice.Facts)
            # An image of one layer that came as a root is that blob, any other is made of its layers.
            kind = "image" if any("/blobs/" in path or "/roots/" in path for path in facts.needs) else "blank"
            assert kind not in found
            found[kind] = folder
    return found


def micro(home: VmHome) -> Path:
    """The folder of the micro kit."""
    return next(path for path in (home.root / "kits").iterdir() if path.is_dir() and path.name.startswith("micro"))


def without_ice(home: VmHome) -> VmHome:
    shutil.rmtree(home.root / "ice")
    for mark in (home.root / "cache").glob("ran-*"):
        mark.unlink()
    return home


@pytest.fixture
def bare_home(own_home: VmHome) -> VmHome:
    """A home with its kit and its image, and no ice."""
    return without_ice(own_home)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory, iced_home: Path) -> Iterator[Path]:
    """A home with one blank ice and one image ice, for tests to take their own from."""
    home = without_ice(VmHome(tmp_path_factory.mktemp("ice") / "home", iced_home))
    with VMM(home.root) as vmm:
        for _ in range(2):
            with vmm.run("debian", wall="vm"):
                pass
    yield home.root
    shutil.rmtree(home.root)


@pytest.fixture
def iced(tmp_path: Path, template: Path) -> Iterator[VmHome]:
    """A home with one blank ice and one image ice, files of its own that a test may damage."""
    home = VmHome(tmp_path / "home", template)
    restore(home, template)
    yield home
    home.clear()
    assert_nothing_left(home.root, set())
    shutil.rmtree(home.root)


def restore(home: VmHome, template: Path) -> None:
    """Give the home copies of the template's ice, which are not links to it."""
    shutil.rmtree(home.root / "ice")
    subprocess.run(["cp", "-a", "--sparse=always", template / "ice", home.root / "ice"], check=True)


def test_two_processes_start_the_first_machine_at_once(bare_home: VmHome) -> None:
    """Each opens the home anew; both machines run, and one of them made the ice."""

    def work(name: str) -> Callable[[], None]:
        def start() -> None:
            with VMM(bare_home.root) as vmm:
                machine = vmm.create("debian", wall="vm", name=name)
                machine.start()
                assert machine.exec(["uname", "-n"], timeout=BOUND).text == f"{name}\n"

        return start

    statuses: list[int] = []
    threads = [threading.Thread(target=lambda name=name: statuses.append(in_child(work(name)))) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert statuses == [0, 0]
    assert "blank" in ices(bare_home.root), "and there may be the image's, if one was up when the other looked"
    with VMM(bare_home.root) as vmm:
        assert {machine.name: machine.exec("echo up").text for machine in vmm.list()} == {"one": "up\n", "two": "up\n"}


def truncated(path: Path) -> None:
    os.chmod(path, 0o600)
    os.truncate(path, path.stat().st_size // 2)


def overwritten(path: Path) -> None:
    with path.open("r+b") as stream:
        stream.seek(path.stat().st_size // 2)
        stream.write(os.urandom(512))


@pytest.mark.parametrize(
    ("kind", "name", "harm"),
    [
        ("image", "ram", truncated),
        ("image", "state", overwritten),
        ("image", "disk.qcow2", overwritten),
        pytest.param("image", "disk.qcow2", Path.unlink, marks=pytest.mark.soak),
        ("image", "ice.json", Path.unlink),
        ("blank", "ram", Path.unlink),
        pytest.param("blank", "ice.json", truncated, marks=pytest.mark.soak),
    ],
)
def test_damaged_ice_is_made_again(iced: VmHome, kind: str, name: str, harm: Callable[[Path], None]) -> None:
    """The start works all the same, and does not run on what is broken."""
    broken = ices(iced.root)[kind] / name
    harm(broken)
    with ExitStack() as stack, VMM(iced.root) as vmm:
        # Held open, so that its number is not given to another file.
        left = os.fstat(stack.enter_context(broken.open("rb")).fileno()) if broken.exists() else None
        for _ in range(2):
            with vmm.run("debian", wall="vm") as machine:
                assert machine.exec(["echo", "here"]).text == "here\n"
                last = way(machine)
        assert last == "from the image's ice"
        assert left is None or not os.path.samestat(left, broken.stat())


def test_ice_is_made_again_when_what_it_is_of_changes(iced: VmHome, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    before = ices(iced.root)
    with VMM(iced.root) as vmm:
        with vmm.run("debian", wall="vm", progress=said.append) as machine:
            assert (way(machine), said) == ("from the image's ice", [])
        # Another guest program is known by its digest.
        monkeypatch.setattr(tvinit, "digest", lambda: "0" * 64)
        with vmm.run("debian", wall="vm", progress=said.append) as machine:
            assert way(machine) == "from blank ice"
            assert "booting the machine that others are cloned from" in said
        monkeypatch.undo()
        with vmm.run("debian", wall="vm") as machine:
            assert way(machine) == "from the image's ice", "the old one is still right for the old program"
    assert set(before.values()) < {folder for folder in (iced.root / "ice").iterdir() if folder.is_dir()}


def test_ice_whose_kernel_changed_is_swept(bare_home: VmHome) -> None:
    with VMM(bare_home.root) as vmm, vmm.run("debian", wall="vm"):
        assert [*ices(bare_home.root)] == ["blank"]
    said: list[str] = []
    folder = micro(bare_home)
    kernel = folder / "kernel"
    fresh = kernel.with_name("fresh")
    shutil.copy2(kernel, fresh)
    os.utime(fresh, ns=(1, 1))
    fresh.rename(kernel)
    with VMM(bare_home.root) as vmm:
        assert ices(bare_home.root) == {}
        assert any("has changed" in event.detail for event in vmm.events() if event.kind == "swept")
        with vmm.run("debian", wall="vm", progress=said.append) as machine:
            assert machine.exec(["echo", "here"]).text == "here\n"
    assert "booting the machine that others are cloned from" in said


def test_a_link_to_qemu_is_the_qemu_it_leads_to(iced: VmHome, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It finds its parts beside the real file, and the ice is the same."""
    real = shutil.which(os.environ.get("TRIVISOR_QEMU") or "qemu-system-x86_64")
    assert real
    link = tmp_path / "qemu"
    link.symlink_to(real)
    monkeypatch.setenv("TRIVISOR_QEMU", str(link))
    with VMM(iced.root) as vmm, vmm.run("debian", wall="vm") as machine:
        assert way(machine) == "from the image's ice"


def test_another_qemu_has_ice_of_its_own(iced: VmHome, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was replaced in its place has another time and size, so another identity."""
    before = ices(iced.root)
    inspect = qemu.inspect
    monkeypatch.setattr(qemu, "inspect", lambda path, home: dataclasses.replace(inspect(path, home), identity="replaced"))
    with VMM(iced.root) as vmm, vmm.run("debian", wall="vm") as machine:
        assert way(machine) == "from blank ice"
    assert set(before.values()) < {folder for folder in (iced.root / "ice").iterdir() if folder.is_dir()}


def test_no_ice_wanted(iced: VmHome, monkeypatch: pytest.MonkeyPatch) -> None:
    """None is used, and none is made."""
    before = ices(iced.root)
    monkeypatch.setenv("TRIVISOR_ICE", "off")
    with VMM(iced.root) as vmm:
        machine = vmm.create("debian", wall="vm")
        machine.start()
        assert way(machine) == "booted"
        machine.exec("echo kept >/root/file", check=True)
        machine.stop()
        monkeypatch.delenv("TRIVISOR_ICE")
        assert ices(iced.root) == before
    with VMM(iced.root) as vmm:
        machine = vmm.get(machine.id)
        machine.start()
        assert way(machine) == "from blank ice", "an image's ice has a disk of its own"
        assert machine.files.read_text("/root/file") == "kept\n"


def test_no_qemu_installed(wall_home: VmHome, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("TRIVISOR_QEMU", raising=False)
    with VMM(wall_home.root) as vmm:
        before = len(vmm.list())
        with pytest.raises(HostLacks) as caught:
            vmm.create("debian", wall="vm")
        assert "qemu-system-x86" in caught.value.hint
        report = next(report for report in vmm.walls() if report.wall == "vm")
        assert (report.available, bool(report.why), "qemu" in report.remedy) == (False, True, True)
        assert len(vmm.list()) == before


def test_a_kernel_of_ones_own(wall_home: VmHome, make: Make, tmp_path: Path) -> None:
    """A bzImage as a distribution lays it out, its modules beside it."""
    own = micro(wall_home)
    facts = msgspec.json.decode((own / "kit.json").read_bytes())
    (tmp_path / "boot").mkdir()
    shutil.copy(own / "original", tmp_path / "boot/vmlinuz")
    tree = tmp_path / "lib/modules" / facts["release"]
    tree.mkdir(parents=True)
    for module in (own / "modules").iterdir():
        shutil.copy(module, tree)
    (tree / "modules.builtin").write_text("".join(f"kernel/{name}.ko\n" for name in ("ext4", "jbd2", "crc16", "mbcache", "crc32c_generic")))
    machine = make(kernel=tmp_path / "boot/vmlinuz", disk="ram")
    assert machine.exec(["uname", "-r"]).text.strip() == facts["release"] == machine.info()["facts"]["kernel"]
    assert machine.spec.kernel == str(tmp_path / "boot/vmlinuz")
