"""An image's own config, honoured behind every wall: what is run, as whom, where, how it is stopped, and whether it is well."""

from __future__ import annotations

import io
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from images_for_tests import layered_image
from machine_home import VmHome

from trivisor import VMM, GuestError, Machine, TrivisorError
from trivisor.cli import main
from trivisor.core.spec import Wall
from trivisor.images.model import Healthcheck
from trivisor.vmm import health
from trivisor.vmm.runconfig import Health

SERVE = """#!/bin/sh
echo "$0 $* as $(id -u):$(id -g) in $(pwd) with $A"
trap 'echo told; exit 7' USR1
trap 'echo not mine; exit 8' TERM
echo up >&2
while :; do sleep 0.02; done
"""
CONFIG: dict[str, object] = {
    "env": ["A=image"],
    "entrypoint": ["/bin/serve", "one"],
    "cmd": ["two", "three"],
    "user": "user:extra",
    "working_dir": "/srv/deep",
    "volumes": {"/data": {}},
    "exposed_ports": {"80/tcp": {}, "53/udp": {}},
    "stop_signal": "SIGUSR1",
    "healthcheck": Healthcheck(test=["CMD-SHELL", "test -e /tmp/well && echo well"], interval=10**8, timeout=30 * 10**9, retries=2),
    "labels": {"of": "image", "team": "image"},
}


@pytest.fixture(scope="module")
def image(wall_home: VmHome) -> Iterator[str]:
    """An image that says all that an image can say of how it wants to be run."""
    with VMM(wall_home.root) as vmm:
        data = io.BytesIO()
        with tarfile.open(fileobj=data, mode="w") as tar:
            found = tarfile.TarInfo("bin/serve")
            found.size, found.mode = len(SERVE), 0o755
            tar.addfile(found, io.BytesIO(SERVE.encode()))
        layered_image(vmm._context.home, "mini", [data.getvalue()], "wanting", **CONFIG)
        yield "wanting"
        vmm.images.remove("wanting")


@pytest.fixture(scope="module")
def wanting(wall_home: VmHome, wall: Wall, image: str) -> Iterator[Machine]:
    """One running machine of it, with nothing launched."""
    with VMM(wall_home.root) as vmm:
        machine = vmm.create(image, wall=wall, labels={"team": "mine"})
        machine.start()
        yield machine
        machine.delete(force=True)


def until(ready: Callable[[], object], seconds: float = 60) -> None:
    """Ask again: a log tells nobody that something was written."""
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.02)


def log(machine: Machine) -> str:
    return b"".join(machine.logs(source="program")).decode()


def test_commands_are_the_images_user_in_its_folder(wanting: Machine) -> None:
    assert wanting.exec("id -u; id -g; pwd; echo $A").text.split() == ["1000", "2000", "/srv/deep", "image"]
    assert wanting.exec("id -u; pwd", user="root", cwd="/").text.split() == ["0", "/"]
    with wanting.spawn(["id", "-u"]) as process:
        assert process.stdout.read() == b"1000\n"
    wanting.files.write("/root/ours", b"as root, as ever")


def test_what_is_run(wanting: Machine) -> None:
    assert wanting.command() == ["/bin/serve", "one", "two", "three"]
    assert wanting.command(["x"]) == ["/bin/serve", "one", "x"]
    assert wanting.command(entrypoint="sh") == ["sh"]
    assert wanting.command(["-c", "true"], ["/bin/sh"]) == ["/bin/sh", "-c", "true"]


def test_a_program_that_ends(wanting: Machine) -> None:
    assert wanting.program() is None and wanting.main_log == "serial"
    first = wanting.launch(["-c", "echo $0 $1; exit 3", "a", "b"], "sh", user="root")
    until(lambda: not (wanting.program() or first).running)
    assert (wanting.program() or first).exit_code == 3
    wanting.launch(["-c", "kill -9 $$"], "sh")
    until(lambda: (wanting.program() or first).exit_code == 137)
    until(lambda: log(wanting) == "a b\n")
    assert wanting.main_log == "program"


def test_what_the_machine_has_of_the_image(wanting: Machine) -> None:
    assert wanting.spec.labels == {"of": "image", "team": "mine"}
    assert wanting.files.exists("/data")


def test_health(wanting: Machine) -> None:
    first, second = wanting.health(), wanting.health()
    assert [(one.status, one.failing) for one in (first, second)] == [("starting", 1), ("unhealthy", 2)]
    with pytest.raises(GuestError, match="unhealthy"):
        wanting.wait_healthy(20)
    wanting.files.write("/tmp/well", b"")
    well = wanting.wait_healthy(20)
    assert (well.status, well.failing, well.checks[-1].output) == ("healthy", 0, "well\n")
    with VMM(wanting._context.home.root) as other:
        assert other.get(wanting.name).health(check=False) == well


def test_a_program_from_its_launch_to_its_stop_and_what_becomes_of_it(wall_vmm: VMM, make: Callable[..., Machine], image: str) -> None:
    machine = make(image, memory="128M")
    started = machine.launch()
    machine.files.write("/data/left", b"")
    machine.files.write("/kept", b"")
    until(lambda: "up\n" in log(machine))
    assert "/bin/serve one two three as 1000:2000 in /srv/deep with image\n" in log(machine)
    assert machine.program() == started and started.running
    with pytest.raises(GuestError, match="already"):
        machine.launch()
    machine.stop(timeout=20)
    assert log(machine).endswith("told\n")
    made = machine.commit("wanting-more")
    with tarfile.open(wall_vmm.images.store.path(made.layers[-1].digest)) as layer:
        names = {name.strip("./") for name in layer.getnames()}
    assert "kept" in names and not any(name.startswith("data") for name in names)
    assert made.config.run == wall_vmm.images.get(image).config.run
    wall_vmm.images.remove("wanting-more")


def test_a_check_that_takes_too_long_and_users_that_are_none(wanting: Machine) -> None:
    context, row = wanting._context, wanting._context.row(wanting.id)
    late = health.check(context, row, Health(("sleep", "60"), timeout=0.2), wanting._processes("exec"))
    assert late.checks[-1].exit_code is None and "killed after 0.2 s" in late.checks[-1].output
    with pytest.raises(GuestError, match="nobody-here"):
        wanting.launch(user="nobody-here")
    with pytest.raises(GuestError, match=r"/none: No such file or directory$"):
        wanting.launch(entrypoint="/none")


def test_exposed_ports_are_published(wall_vmm: VMM, wall: Wall, image: str) -> None:
    machine = wall_vmm.create(image, wall=wall, ports="exposed", network="nat")
    assert list(machine.spec.ports.values()) == [80]


RECIPE = """
FROM wanting
ENTRYPOINT ["/bin/serve"]
CMD ["built"]
STOPSIGNAL TERM
HEALTHCHECK --interval=100ms CMD test -e /tmp/well || exit 9
"""


@pytest.mark.walls("container")
def test_from_a_recipe_to_its_end_by_command_line(wall_home: VmHome, image: str, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def cli(*words: str, status: int = 0) -> str:
        capfd.readouterr()
        found = main.run(["--home", str(wall_home.root), *words])
        out, err = capfd.readouterr()
        assert found == status, err
        return err if status == 125 else out

    (tmp_path / "Containerfile").write_text(RECIPE)
    cli("build", "-q", "-t", "wanting-built", str(tmp_path))
    quick = ("--wall", "container", "--memory", "64M")
    assert cli("run", *quick, "--entrypoint", "id", "wanting-built", "--", "-u").endswith("1000\n")
    assert cli("run", *quick, "--entrypoint", "", "wanting-built", "pwd").endswith("/srv/deep\n")
    assert "/none: No such file" in cli("run", "-d", *quick, "--entrypoint", "/none", "wanting-built", status=125)
    name = cli("run", "-d", "-P", *quick, "wanting-built").strip()
    try:
        assert cli("health", name, status=1).startswith("starting")
        assert cli("exec", name, "id", "-un") == "user\n"
        cli("exec", name, "touch", "/tmp/well")
        assert cli("health", "--wait", "20", name) == "healthy\n"
        assert cli("health", "--last", "--json", name).startswith("{")
        until(lambda: "up\n" in cli("logs", name))
        assert "/bin/serve built as" in cli("logs", name)
        cli("stop", name)
        assert cli("logs", name).endswith("not mine\n")
    finally:
        cli("delete", "--force", name)
        cli("rmi", "wanting-built")


@pytest.mark.walls("container")
def test_its_stop_signal_comes_when_its_time_is_up(make: Callable[..., Machine], image: str) -> None:
    for ttl in (1, 5, 25):
        machine = make(image, memory="64M", ttl=ttl)
        with suppress(TrivisorError):  # its time was up before
            machine.launch()
        machine.wait(60)
        if "up\n" in log(machine):  # else it lived too short, on a host that was busy elsewhere
            break
    assert log(machine).endswith("told\n") and machine.info()["reason"] == "ttl"


@pytest.mark.walls("vm", "gvisor")
@pytest.mark.soak
def test_a_fork_has_it_too(wanting: Machine) -> None:
    started = wanting.launch()
    (other,) = wanting.fork()
    try:
        assert other.program() == wanting.program() == started
        other.stop(timeout=20)
        assert log(other).endswith("told\n")
        assert wanting.program() == started
    finally:
        other.delete(force=True)
