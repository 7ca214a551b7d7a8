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
