"""Paths that come from a machine are resolved in it, whatever it swaps under the host's feet; the host's files stay the host's."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from pathlib import Path

import pytest
from wall_fixtures import Make

from trivisor import VMM, FileError, GuestError, HostError
from trivisor.core.spec import Wall

BOUND = 60.0
SECRET = "the host's secret"
READ = """\
for _ in range(1000):
    try:
        text = open("/data/link/file").read()
    except OSError:
        continue
    assert text == "shared\\n", text
"""
SWAP = "cd {place}; while :; do ln -sfn {target} here; ln -sfn real here; done"


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A folder of the host with a file that no machine may read or write."""
    folder = tmp_path / "secret"
    folder.mkdir()
    (folder / "file").write_text(SECRET)
    return folder


def unharmed(secret: Path) -> None:
    assert [path.name for path in secret.iterdir()] == ["file"]
    assert (secret / "file").read_text() == SECRET


def test_files_of_a_machine_are_never_the_hosts(make: Make, secret: Path) -> None:
    """A link to a path of the host leads to that path in the machine, and up from its root there is nothing."""
    machine = make()
    up = "/".join([".."] * 40)
    for number, before in enumerate(("", up, "/proc/1/root", "/proc/self/root")):
        target = f"{before}{secret}/file"
        machine.files.symlink(target, f"/root/link{number}")
        for path in (f"/root/link{number}", target if target.startswith("/") else f"/{target}"):
            with pytest.raises(FileError):
                machine.files.read(path)
            with suppress(FileError):  # a folder of that name may be made in the machine
                machine.files.write(path, b"overwritten")
    with suppress(GuestError):
        machine.files.remove(str(secret), recursive=True)
    unharmed(secret)


def test_a_race_of_links_under_the_hosts_calls(make: Make, secret: Path, tmp_path: Path) -> None:
    """While a program swaps a link between its own folder and a path of the host, reads, writes and copies go on."""
    machine = make()
    machine.exec("mkdir -p /srv/race/real; echo mine >/srv/race/real/file", check=True)
    swapper = machine.spawn(SWAP.format(place="/srv/race", target=secret), detach=True)
    for number in range(40):
        with suppress(FileError):
            assert machine.files.read("/srv/race/here/file") == b"mine\n"
        with suppress(FileError):
            machine.files.write(f"/srv/race/here/new{number}", b"from the host")
        with suppress(FileError):
            machine.files.remove(f"/srv/race/here/new{number}")
    (tmp_path / "up").mkdir()
    (tmp_path / "up/file").write_text("mine\n")
    for _ in range(5):
        with suppress(GuestError, HostError):  # what was a link here may be a folder there by now
            machine.files.download("/srv/race", tmp_path / "down")
        with suppress(GuestError, HostError):
            machine.files.upload(tmp_path / "up", "/srv/race/here")
    swapper.close()
    unharmed(secret)
    for path in (tmp_path / "down").rglob("*"):
        if not path.is_symlink() and path.is_file():
            assert SECRET not in path.read_text()


def test_a_race_of_links_in_a_volume(make: Make, secret: Path, tmp_path: Path) -> None:
    """The same in a folder that host and machine share: the machine never gets at what lies beside it."""
    shared = tmp_path / "shared"
    (shared / "real").mkdir(parents=True)
    (shared / "real/file").write_text("shared\n")
    machine = make(volumes={"/data": shared})
    machine.exec("cd /data; ln -s real here || exit 1", check=True, timeout=BOUND)
    stop = threading.Event()

    def swap() -> None:
        """The host's side swaps too, as another program of the user might."""
        while not stop.is_set():
            for target in ("../secret", "real", str(secret)):
                link = shared / "link"
                link.unlink(missing_ok=True)
                link.symlink_to(target)

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        result = machine.exec(["python3", "-c", READ], timeout=BOUND)
        assert result.ok, result.stderr
        for _ in range(40):
            with suppress(FileError):
                assert machine.files.read("/data/link/file") == b"shared\n"
            with suppress(FileError):
                machine.files.write("/data/link/new", b"x")
    finally:
        stop.set()
        thread.join()
    unharmed(secret)


def test_a_volume_within_a_hostile_volume(make: Make, wall: Wall, secret: Path, tmp_path: Path) -> None:
    """What a machine left in one volume does not decide where on the host the next is mounted."""
    shared, inner = tmp_path / "shared", tmp_path / "inner"
    for folder in (shared, inner):
        folder.mkdir()
    (inner / "mark").write_text("inner")
    targets = (str(secret), "../secret", "/etc", "../../../../../../../../../../etc")
    for target in targets[:2] if wall == "vm" else targets:  # where the launcher mounts it is the same for all
        link = shared / "in"
        if link.is_dir() and not link.is_symlink():
            link.rmdir()  # where the link led nowhere in the machine, a folder to mount on has taken its place
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        before = Path("/etc/new").exists()
        with suppress(HostError, GuestError):  # refused, or mounted within the machine
            machine = make(volumes={"/data": shared, "/data/in": inner})
            machine.exec("echo x >/data/in/new", timeout=BOUND)
            machine.delete(force=True)
        assert Path("/etc/new").exists() == before
        assert not any(f" {path} " in line for line in Path("/proc/self/mountinfo").read_text().splitlines() for path in (secret, "/etc"))
        unharmed(secret)


@pytest.mark.walls("gvisor", "container")
def test_an_image_whose_folders_are_links(wall_vmm: VMM, wall: Wall, secret: Path, tmp_path: Path) -> None:
    """Where the launcher mounts in a root, the links of that root lead nowhere else."""
    root = tmp_path / "root"
    for name in ("bin", "etc"):
        (root / name).mkdir(parents=True)
    for name in ("proc", "sys", "dev", "run", "tmp", "data"):
        (root / name).symlink_to(secret)
    (root / "etc/hosts").symlink_to(secret / "file")
    (root / "etc/resolv.conf").symlink_to("/" + "../" * 30 + str(secret / "file").lstrip("/"))
    wall_vmm.images.import_(root, f"hostile-{wall}")
    machine = wall_vmm.create(f"hostile-{wall}", wall=wall, volumes={"/data": "aside"})
    with suppress(HostError, GuestError):
        machine.start()
    unharmed(secret)
    machine.delete(force=True)
    unharmed(secret)


@pytest.mark.walls("gvisor", "container")
def test_the_hosts_root_is_an_allow_list(wall_vmm: VMM, wall: Wall, tmp_path: Path) -> None:
    """image="host": programs and libraries, and nothing of who uses the host."""
    (tmp_path / "key").write_text(SECRET)
    home = Path.home() / f".trivisor-test-secret-{os.getpid()}"
    home.write_text(SECRET)
    try:
        machine = wall_vmm.create("host", wall=wall)
        machine.start()
        private = ("/etc/shadow", "/etc/gshadow", "/etc/sudoers", "/etc/ssh/ssh_host_rsa_key", wall_vmm.home / "trivisor.db")
        for path in (tmp_path / "key", home, *private):
            result = machine.exec(["cat", str(path)], timeout=BOUND)
            assert not result.ok, path
            assert SECRET.encode() not in result.stdout
        for folder in ("/root", "/home", "/tmp", "/var/tmp", "/run"):
            assert machine.exec(f"find {folder} -xdev -type f 2>/dev/null", timeout=BOUND).text == "", folder
        machine.exec("rm -rf /usr/share/doc; echo broken >/usr/bin/env; touch /etc/made", timeout=BOUND)
        assert Path("/usr/bin/env").stat().st_size > 1000
        assert not Path("/etc/made").exists()
        machine.stop()
        machine.delete()
    finally:
        home.unlink()
