"""What an image wants of its machines: read, bounded, refused; and how a machine is found well."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from trivisor.core.errors import ImageError, InvalidSpec
from trivisor.images.image import Image
from trivisor.images.model import Healthcheck, ImageConfig, RootFs, RunConfig
from trivisor.vmm import commit, runconfig
from trivisor.vmm.health import KEPT, Checked, HealthStatus, judge
from trivisor.vmm.runconfig import Health, Wanted, stop_signal


def image(**config: object) -> Image:
    return Image("app", "sha256:0", Path("/"), 0, 0.0, "a test", ImageConfig("amd64", "linux", RootFs("layers", []), RunConfig(**config)))  # type: ignore[arg-type]


def read(image: Image) -> Wanted:
    return runconfig.of(image.config, image.name)


def test_what_is_run() -> None:
    both = Wanted(entrypoint=("serve", "-x"), cmd=("on", "80"))
    assert both.argv() == ["serve", "-x", "on", "80"]
    assert both.argv([]) == ["serve", "-x"]
    assert both.argv(["off"]) == ["serve", "-x", "off"]
    assert both.argv(entrypoint="sh") == ["sh"]
    assert both.argv(["ls", "-l"], "") == ["ls", "-l"]
    assert Wanted(cmd=("bash",)).argv() == ["bash"]
    for nothing in (Wanted().argv, lambda: both.argv([], ""), lambda: both.argv(entrypoint=[])):
        with pytest.raises(InvalidSpec, match="what is to be run"):
            nothing()


def test_a_whole_config() -> None:
    check = Healthcheck(test=["CMD-SHELL", "true"], interval=2 * 10**9, start_period=10**9)
    found = read(
        image(
            user="app:web",
            working_dir="/srv/./x/../app/",
            volumes={"data": {}, "/b//c": {}},
            exposed_ports={"80": {}, "53/udp": {}, "9000-9001/tcp": {}},
            stop_signal="SIGRTMIN+3",
            healthcheck=check,
            shell=["/bin/ash", "-ec"],
        )
    )
    assert (found.user, found.cwd, found.volumes, found.stop_signal) == ("app:web", "/srv/app", ("/b/c", "/data"), 37)
    assert found.ports == ((53, "udp"), (80, "tcp"), (9000, "tcp"), (9001, "tcp"))
    assert found.health == Health(("/bin/ash", "-ec", "true"), 2.0, 30.0, 1.0, 5.0, 3)
    assert read(image()) == Wanted()
    assert read(image(healthcheck=Healthcheck(test=["NONE"]))).health is None


@pytest.mark.parametrize(("text", "number"), [("TERM", 15), ("sigquit", 3), ("9", 9), ("64", 64), ("RTMAX-1", 63), ("SIGRTMIN", 34)])
def test_stop_signals(text: str, number: int) -> None:
    assert stop_signal(text) == number


@pytest.mark.parametrize(
    "config",
    [
        {"stop_signal": "SIGNOT"},
        {"stop_signal": "0"},
        {"stop_signal": "65"},
        {"stop_signal": "RTMIN+31"},
        {"stop_signal": "RTMAX+1"},
        {"user": "a" * 300},
        {"user": "a\nb"},
        {"user": "a:b:c"},
        {"user": "\0"},
        {"working_dir": "srv"},
        {"working_dir": "/" + "a" * 5000},
        {"volumes": {"/": {}}},
        {"volumes": {"/a/..": {}}},
        {"volumes": {f"/{number}": {} for number in range(300)}},
        {"exposed_ports": {"99999/tcp": {}}},
        {"exposed_ports": {"80/quic": {}}},
        {"entrypoint": ["a\0b"]},
        {"labels": {"a": "b" * 70000}},
        {"healthcheck": Healthcheck(test=["CMD", "true"], interval=2**62)},
        {"healthcheck": Healthcheck(test=["CMD", "true"], timeout=-1)},
        {"healthcheck": Healthcheck(test=["CMD", "true"], retries=10**6)},
        {"healthcheck": Healthcheck(test=["CMD"])},
        {"healthcheck": Healthcheck(test=["RUN", "true"])},
    ],
)
def test_what_cannot_be_followed(config: dict[str, object]) -> None:
    with pytest.raises(ImageError, match="image app cannot be followed"):
        read(image(**config))


def test_exposed_ports() -> None:
    assert runconfig.exposed(image(exposed_ports={"80/tcp": {}, "53/udp": {}})) == [80]
    with pytest.raises(InvalidSpec, match="1001 ports"):
        runconfig.exposed(image(exposed_ports={"8000-9000/tcp": {}}))


def checked(at: float, code: int | None) -> Checked:
    return Checked(at=at, duration=0.1, exit_code=code, output="")


def test_judged_as_docker_does() -> None:
    asked = Health(("true",), start_period=10.0, retries=2)
    now = HealthStatus(status="starting", since=100.0)
    for at, code, status, failing in [
        (105.0, 1, "starting", 0),  # within its start period a failure is not counted
        (111.0, 1, "starting", 1),
        (112.0, 0, "healthy", 0),
        (113.0, None, "healthy", 1),
        (114.0, 7, "unhealthy", 2),
        (115.0, 0, "healthy", 0),
    ]:
        now = judge(asked, now, checked(at, code))
        assert (now.status, now.failing) == (status, failing)
    assert len(now.checks) == KEPT and now.since == 100.0
    early = judge(asked, HealthStatus(status="starting", since=100.0), checked(101.0, 0))
    assert judge(replace(asked, retries=1), early, checked(102.0, 1)).status == "unhealthy"  # once well, failures count


def test_what_a_commit_may_not_ask_for() -> None:
    assert commit.changed(RunConfig(), {"stop_signal": "QUIT"}).stop_signal == "QUIT"
    with pytest.raises(InvalidSpec, match="its stop signal 'NOT'"):
        commit.changed(RunConfig(), {"stop_signal": "NOT"})
