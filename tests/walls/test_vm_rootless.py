"""A whole life without root: an ordinary user with a home of its own, QEMU jailed in a user namespace, nothing left at the end."""

from __future__ import annotations

import os
import shutil
import socket
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import rootless_home
from images_for_tests import mini_root
from rootless_home import home_of

from trivisor import VMM, HostLacks, Machine, StorageError
from trivisor.core.paths import Home, MachineDir
from trivisor.launch import jail
from trivisor.va.build.build import build
from trivisor.va.build.options import Options
from trivisor.vmm.engines.vm import runner

USER = rootless_home.NOBODY
SERVE = """\
import socket
server = socket.create_server(("0.0.0.0", 80))
print("up", flush=True)
client = server.accept()[0]
client.sendall(client.recv(100))
client.recv(1)
"""

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else"),
    pytest.mark.timeout(300),
]


@pytest.fixture
def user_home(iced_home: Path) -> Iterator[Path]:
    """A home that belongs to USER, with the kit and the image and no ice."""
    with home_of(USER, iced_home) as home:
        yield home


def as_user(work: Callable[[], object]) -> None:
    rootless_home.as_user(USER, work)


def copied_while_it_runs(machine: Machine) -> None:
    """What runs in it goes on in a copy, in a copy of that, and after it was nothing but files."""
    machine.exec(
        "mkdir -p /run/kept && (while :; do date +%N > /run/kept/new; mv /run/kept/new /run/kept/now; sleep 0.1; done) > /dev/null 2>&1 &",
        check=True,
    )
    child = machine.fork()[0]
    grandchild = child.fork()[0]
    machine.suspend()
    machine.resume()
    for each in (machine, child, grandchild):
        # A round of its loop takes as long as three programs do: in an emulated guest on a host that is busy, a second.
        each.exec('was=$(cat /run/kept/now) && while [ "$(cat /run/kept/now)" = $was ]; do sleep 0.1; done', check=True, timeout=60)
        assert each.files.read_text("/root/file") == "kept\n"
    assert len({each.exec("head -c 16 /dev/urandom; hostname").stdout for each in (machine, child, grandchild)}) == 3
    for each in (child, grandchild):
        each.delete(force=True)


def test_the_whole_life(user_home: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    network = "nat" if shutil.which("passt") else "none"

    def life() -> None:
        with VMM(user_home) as vmm:
            report = jail.probe()
            assert not report.own_id
            machine = vmm.create("debian", wall="vm", network=network, ports={port: 80} if network == "nat" else {})
            machine.start()
            folder = MachineDir(Path(machine.info()["folder"]))
            status = Path(f"/proc/{runner.engine(folder)}/status").read_text()
            assert f"Uid:\t{USER}\t{USER}" in status
            if report.namespaces:
                for name in ("user", "mnt", "pid", "net", "ipc", "uts"):
                    assert os.readlink(f"/proc/{runner.engine(folder)}/ns/{name}") != os.readlink(f"/proc/self/ns/{name}")
            assert "Seccomp:\t2" in status
            assert machine.exec(["id", "-u"], check=True).text == "0\n", "who is root in there is nobody's business here"
            machine.exec("echo kept >/root/file; chown 12:34 /root/file", check=True)
            if network == "nat":
                with machine.spawn(["python3", "-c", SERVE]) as server:
                    assert server.stdout.readline(timeout=60) == b"up\n"
                    with socket.socket() as client:
                        client.connect(("127.0.0.1", port))
                        client.sendall(b"hello")
                        assert client.recv(100) == b"hello"
                with pytest.raises(HostLacks, match="links of their own need root"):
                    machine.network.restrict()
                with pytest.raises(HostLacks, match="links of their own need root"):
                    vmm.create("debian", wall="vm", network="nat", egress=[])
            machine.pause()
            machine.resume()
            machine.stop()
            machine.start()
            assert machine.files.read_text("/root/file") == "kept\n"
            assert machine.files.stat("/root/file").uid == 12
            with vmm.run("debian", wall="vm") as second:
                assert second.exec(["echo", "two"]).text == "two\n"
            copied_while_it_runs(machine)
            machine.stop()
            machine.delete()
            assert vmm.list() == []

    as_user(life)


def test_an_image_is_made_without_root(user_home: Path) -> None:
    """And run, and built on: owners that this user could not give are in the layers all the same."""
    mini_root(user_home.parent / "root")
    context = user_home.parent / "context"
    context.mkdir(mode=0o755)
    (context / "Containerfile").write_text("FROM mini\nRUN rm -r /home; echo x > /x; chown 12:34 /x\nRUN mkdir /y; stat -c %u:%g /x > /y/z")

    def life() -> None:
        with VMM(user_home) as vmm:
            vmm.images.import_(user_home.parent / "root", "mini")
            with vmm.run("mini", wall="vm", disk="ram") as machine:
                assert machine.exec(["id", "-u"]).text == "0\n"
                assert machine.exec("echo $HOME", user="user").text == "/home/user\n"
            image = build(vmm, context, ["built"], options=Options(wall="vm", network="none", memory="128M"))
            with tarfile.open(vmm.images.store.path(image.layers[1].digest)) as layer:
                assert (layer.getmember("x").uid, layer.getmember("x").gid) == (12, 34) and ".wh.home" in layer.getnames()
            with tarfile.open(vmm.images.store.path(image.layers[2].digest)) as layer, layer.extractfile("y/z") as file:
                assert file.read() == b"12:34\n"

    as_user(life)


def test_another_users_home_is_refused(user_home: Path) -> None:
    """sudo keeps HOME: root must not fill a user's home with files of root's."""
    with pytest.raises(StorageError, match=f"belongs to user {USER}") as caught:
        VMM(user_home)
    assert "TRIVISOR_HOME" in caught.value.hint


def test_a_home_that_cannot_be_written(user_home: Path) -> None:
    """Read-only for its own user."""
    home, said = user_home.parent / "read-only", user_home.parent / "said"
    Home(home).open()
    said.touch()
    os.chmod(home, 0o500)
    for path in (home, said):
        os.chown(path, USER, USER)

    def attempt() -> None:
        try:
            VMM(home)
        except StorageError as error:
            said.write_text(f"{error}; {error.hint}")

    as_user(attempt)
    assert "TRIVISOR_HOME" in said.read_text()
    assert "read-only" in said.read_text() or "cannot be used" in said.read_text()
