"""Volumes of virtual machines without virtiofsd: 9p, by a QEMU that has an id of its own and no capability."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from wall_fixtures import Make

from trivisor import VMM, HostLacks
from trivisor.va.build.build import build
from trivisor.va.build.options import Options
from trivisor.vmm.engines.vm import kit, sharing

BOUND = 120.0
USER = 61234
"""An id that no account has."""
RACE = """\
import os, time
os.chdir('/data')
end = time.monotonic() + 1.5
won = 0
while time.monotonic() < end:
    os.mkdir('swap'); os.rmdir('swap'); os.symlink('/etc', 'swap')
    for path in ('swap/shadow', 'swap/../../etc/shadow'):
        try:
            open(path).close()
        except OSError:
            pass
    os.unlink('swap')
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: without it there never is a virtiofsd"),
]


@pytest.fixture(autouse=True)
def without_virtiofsd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "_daemon", lambda: None)


@pytest.fixture(scope="module", autouse=True)
def full_kernel(image_home: Path) -> None:
    """Its kit stays in the home that set-up made, since it has to be fetched."""
    with VMM(image_home) as vmm:
        try:
            kit.get(vmm._context.home, "full", lambda _: None)
        except HostLacks as error:
            pytest.skip(f"needs the network once: {error}")


def shared_folder(place: Path, owner: int) -> Path:
    place.mkdir()
    (place / "host").write_text("from the host\n")
    for path in (place, place / "host"):
        os.chown(path, owner, owner)
    return place


@pytest.mark.parametrize("owner", [USER, pytest.param(0, marks=pytest.mark.soak)])
def test_a_volume(make: Make, tmp_path: Path, owner: int) -> None:
    shared, readonly = shared_folder(tmp_path / "shared", owner), shared_folder(tmp_path / "readonly", owner)
    (shared / "others").write_text("not for everybody\n")
    (shared / "others").chmod(0o600)
    os.chown(shared / "others", USER + 1, USER + 1)
    (tmp_path / "secret").write_text("secret")
    (shared / "out").symlink_to(tmp_path / "secret")
    machine = make(kernel="full", volumes={"/data": shared, "/ro": f"{readonly}:ro", "/kept": "kept"})
    assert machine.exec("cat /data/host /ro/host", timeout=BOUND).text == "from the host\n" * 2
    machine.exec("echo from inside >/data/inside; mkdir -p /data/a/b; mv /data/inside /data/a/b/inside; echo kept >/kept/file", check=True)
    assert (shared / "a/b/inside").read_text() == "from inside\n"
    assert (shared / "a/b/inside").stat().st_uid == (shared / "a").stat().st_uid == owner
    machine.exec("chown 12:34 /data/a/b/inside; chmod 4755 /data/a/b/inside", check=True)
    assert machine.exec("stat -c %u:%g:%a /data/a/b/inside", check=True).text == "12:34:4755\n"
    about = (shared / "a/b/inside").stat()
    assert (about.st_uid, about.st_gid, about.st_mode & 0o7111) == (owner, owner, 0), "what the guest believes is not what the host has"
    refused = machine.exec("echo no >/ro/inside", timeout=BOUND)
    assert not refused.ok
    assert "ead-only" in refused.error_text
    assert not machine.exec("cat /data/others", timeout=BOUND).ok, "the host's root is not at its service"
    assert not machine.exec("cat /data/out", timeout=BOUND).ok
    (shared / "later").write_text("later\n")
    assert machine.exec("ls /data", timeout=BOUND).text.split() == ["a", "host", "later", "others", "out"]
    machine.stop()
    machine.start()
    assert machine.exec("stat -c %u /data/a/b/inside; cat /kept/file", check=True, timeout=BOUND).text == "12\nkept\n"


def test_links_are_none_outside(make: Make, tmp_path: Path) -> None:
    """They work in the machine. On the host they are plain files, so that no program there follows them; devices are refused."""
    shared = shared_folder(tmp_path / "shared", 0)
    machine = make(kernel="full", volumes={"/data": shared})
    inside = machine.exec("cd /data; ln -s /etc/hostname link; readlink link; cat link", check=True, timeout=BOUND)
    assert inside.text.startswith("/etc/hostname\n")
    for words in ("mknod disk b 254 0", "mkfifo pipe"):
        assert b"not permitted" in machine.exec(f"cd /data; {words}", timeout=BOUND).stderr
    machine.exec(["python3", "-c", RACE], check=True, timeout=BOUND)
    for path in shared.rglob("*"):
        assert stat.S_IFMT(path.lstat().st_mode) in (stat.S_IFREG, stat.S_IFDIR), path


def test_the_micro_kernel_has_none(wall_vmm: VMM, tmp_path: Path) -> None:
    with pytest.raises(
        HostLacks, match="virtiofsd is not installed: then folders are shared by 9p, which the micro kernel has not"
    ) as caught:
        wall_vmm.create("debian", wall="vm", volumes={"/data": tmp_path})
    assert 'kernel="full"' in caught.value.hint


@pytest.mark.soak
def test_a_step_of_a_build_has_its_cache(wall_vmm: VMM, tmp_path: Path) -> None:
    text = "FROM mini\nRUN --mount=type=cache,target=/kept echo x > /kept/x\nRUN --mount=type=cache,target=/kept cp /kept/x /x"
    (tmp_path / "Containerfile").write_text(text)
    image = build(wall_vmm, tmp_path, options=Options(wall="vm", network="none", memory="128M", use_cache=False))
    with wall_vmm.run(image.digest, wall="container", memory="128M") as machine:
        assert machine.exec(["cat", "/x"], check=True).text == "x\n"
