"""A Spec is checked once, when it is made, and survives its record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trivisor.core.errors import InvalidSpec
from trivisor.core.spec import Spec, decode, encode
from trivisor.core.units import MIB
from trivisor.core.wishes import IoLimits, Volume


def make(**wishes: Any) -> Spec:
    return Spec.make(**{"image": "debian", "name": "web", "wall": "vm", **wishes})


def test_defaults_and_none() -> None:
    assert make() == make(cpus=None, memory=None, env=None)
    assert make().memory == 256 * MIB


def test_what_people_write() -> None:
    spec = make(
        memory="512M", disk="ram", ttl="10m", idle=30, kernel=Path("/boot/vmlinuz"), network="nat", ports={8080: 80}, env={"A": "é\n"}
    )
    assert (spec.memory, spec.disk, spec.ttl, spec.idle, spec.kernel) == (512 * MIB, "ram", 600, 30, "/boot/vmlinuz")
    assert decode(encode(spec)) == spec


def test_limits_that_were_asked_for() -> None:
    assert make().asked == ()
    spec = make(wall="container", cpus=0.5, memory="64M", swap=0, cpuset="0-1,3", pids=64, io={"write_bps": "10M", "read_iops": 100})
    assert spec.asked == ("cpus", "memory", "swap", "cpuset", "pids", "io")
    assert (spec.cpus, spec.swap, spec.cpuset, spec.pids) == (0.5, 0, "0-1,3", 64)
    assert spec.io == IoLimits(write_bps=10 * MIB, read_iops=100)
    assert decode(encode(spec)) == spec
    whole = make(cpus=2.0)
    assert whole.cpus == 2 and isinstance(whole.cpus, int)


def test_networks() -> None:
    for name in ("none", "nat", "backend", "a-1"):
        assert make(network=name).network == name
    assert make(wall="container", network="host").network == "host"
    assert make(network="backend", ports={80: 80}).ports == {80: 80}


def test_volumes_as_people_write_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    spec = make(
        volumes={
            "/z//data/": Path("sub"),
            "/b": "cache:ro",
            Path("/c"): "/srv/a:b:ro",
            "/d": "/srv/x/../y",
            "/e": Volume("cache", True),
            "/f": {"source": "cache"},
        }
    )
    assert spec.volumes == {
        "/b": Volume("cache", True),
        "/c": Volume("/srv/a:b", True),
        "/d": Volume("/srv/y"),
        "/e": Volume("cache", True),
        "/f": Volume("cache"),
        "/z/data": Volume(str(tmp_path / "sub")),
    }
    assert list(spec.volumes) == sorted(spec.volumes)  # what lies in another comes after it
    assert [volume.named for volume in spec.volumes.values()] == [True, False, False, True, True, False]
    assert decode(encode(spec)) == spec


BAD: list[dict[str, Any]] = [
    {"name": name} for name in ("", "-a", "a-", "A", "a_b", "a" * 64, "a.b", "../x", "a\n", "ä", 7)
] + [
    {"memory": 0}, {"memory": -1}, {"memory": "lots"}, {"memory": "95M"}, {"memory": "1000T"},
    {"cpus": 0}, {"cpus": -1}, {"cpus": 1000}, {"cpus": True}, {"cpus": "two"}, {"cpus": 1.5},
    {"disk": "1M"}, {"disk": "17T"}, {"disk": "rom"}, {"disk": 0},
    {"wall": "chroot"}, {"lifetime": "for ever"}, {"network": "host"}, {"kernel": 5}, {"kernel": ""}, {"kernel": "a\0"},
    {"image": ""}, {"image": b"debian"}, {"image": "\udc80"},
    {"ports": {80: 80}}, {"ports": [80], "network": "nat"}, {"ports": {0: 80}, "network": "nat"}, {"ports": {80: 65536}, "network": "nat"},
    {"ports": {True: 80}, "network": "nat"}, {"ports": {"80": 80}, "network": "nat"},
    {"env": {"": "x"}}, {"env": {"A=B": "x"}}, {"env": {"A": "x\0"}}, {"env": {"A": 5}}, {"env": ["A=B"]}, {"env": {"A": "\udcff"}},
    {"labels": {"a": "\0"}}, {"labels": {"a": 1}},
    {"wall": "gvisor", "network": "host"}, {"wall": "container", "network": "host", "ports": {80: 80}},
    {"network": "a.b"}, {"network": "-"}, {"network": "A"}, {"network": 5}, {"network": ""},
    {"wall": "container", "cpus": 0.001}, {"wall": "container", "cpus": float("nan")}, {"wall": "container", "memory": "1M"},
    {"swap": -1}, {"swap": "some"}, {"swap": False}, {"pids": 0}, {"pids": True}, {"pids": 1 << 23}, {"pids": "many"},
    {"cpuset": ""}, {"cpuset": "1-0"}, {"cpuset": "all"}, {"cpuset": "0-"}, {"cpuset": 1}, {"cpuset": "9999"}, {"cpuset": "0,\n1"},
    {"io": {"bps": 1}}, {"io": {"read_bps": 0}}, {"io": "10M"}, {"io": {1: 2}},
    {"volumes": ["/data"]}, {"volumes": {"data": "a"}}, {"volumes": {"/": "a"}},
    {"volumes": {"/proc/x": "a"}}, {"volumes": {"/a/../b": "a"}},
    {"volumes": {"/a": "b/c"}}, {"volumes": {"/a": "../c"}}, {"volumes": {"/a": ""}}, {"volumes": {"/a": "x", "/a/": "y"}},
    {"volumes": {"/a": 5}}, {"volumes": {"/a": "/\0"}}, {"volumes": {"/a\0": "b"}},
    {"volumes": {"/a": {"src": "b"}}}, {"volumes": {"//": "a"}},
    {"asked": ("memory",)},
    {"ttl": 0}, {"ttl": "never"}, {"idle": -1}, {"colour": "red"},
]  # fmt: skip


@pytest.mark.parametrize("wishes", BAD, ids=repr)
def test_refused(wishes: dict[str, Any]) -> None:
    with pytest.raises(InvalidSpec):
        make(**wishes)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.dictionaries(
        st.sampled_from(Spec.__struct_fields__),
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats()
        | st.text()
        | st.dictionaries(st.text(), st.text())
        | st.lists(st.integers()),
    )
)
def test_a_spec_or_invalid(wishes: dict[str, Any]) -> None:
    try:
        spec = make(**wishes)
    except InvalidSpec:
        return
    assert decode(encode(spec)) == spec
