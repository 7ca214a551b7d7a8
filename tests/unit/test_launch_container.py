"""The container wall's plan: composed from values alone, printable, and in the order that tvinit asks for."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from pathlib import Path

import pytest

from trivisor.launch import container, ids, jail, seccomp
from trivisor.launch.container import Container, Ids, Layer
from trivisor.launch.ids import Shape
from trivisor.launch.jail import Bind, JailReport
from trivisor.launch.net import passt
from trivisor.launch.plan import Op, Plan, encode, render

OWN = Ids(((0, 2_100_065_536, 65536),), ((0, 2_100_065_536, 65536),), mapped=True)
SINGLE = Ids(((0, 1000, 1),), ((0, 1000, 1),))
PLAIN = Container(
    hostname="web",
    machine_id="0123456789abcdef0123456789abcdef",
    ids=OWN,
    layers=[Layer(Path("/store/tree"), Path("/machines/m/layers/root"))],
    line=7,
    answer=9,
    log=8,
    memory=256 << 20,
)
ORDER = [
    "cgroup",
    "namespaces",
    "netns",
    "map-user",
    "map-group",
    "hostname",
    "loopback",
    "root",
    "overlay",
    "mount",
    "bind",
    "link",
    "mask",
    "readonly",
    "text",
    "pivot",
    "rlimit",
    "caps",
    "apparmor",
    "no-new-privs",
    "landlock-domain",
    "seccomp",
    "exec-seccomp",
    "env",
    "hooks",
    "answer",
    "fd",
    "guest",
]
"""Operations in the order of their kinds (PROTOCOL.md)."""
RANKS = {"mount": "overlay", "bind": "overlay", "link": "overlay", "mask": "overlay", "readonly": "overlay", "text": "overlay"}


def plan(**changes: object) -> Plan:
    return container.plan(dataclasses.replace(PLAIN, **changes))  # type: ignore[arg-type]


def of(made: Plan, name: str) -> list[Op]:
    return [op for op in made if op[0] == name]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"ids": SINGLE},
        {"cgroups": (4, 5), "netns": 6, "env": {"A": "b"}, "apparmor": "docker-default", "dns": ("1.1.1.1",)},
        {"host_network": True, "hierarchies": (("", ""),)},
    ],
)
def test_operations_come_in_the_order_of_their_kinds(changes: dict[str, object]) -> None:
    made = plan(**changes)
    ranks = [ORDER.index(RANKS.get(op[0], op[0])) for op in made]
    assert ranks == sorted(ranks)
    assert made[-1] == ("guest", "7")
    assert encode(made)
    assert "guest 7" in render(made)


def test_every_namespace_unless_another_network_is_given() -> None:
    assert of(plan(), "namespaces") == [("namespaces", "user", "mount", "pid", "net", "ipc", "uts", "cgroup", "time")]
    assert of(plan(), "loopback")
    for other in ({"netns": 9}, {"host_network": True}):
        made = plan(**other)
        assert "net" not in of(made, "namespaces")[0]
        assert not of(made, "loopback")
    assert of(plan(netns=9), "netns") == [("netns", "9")]


def test_an_interface_made_in_its_own_network() -> None:
    made = plan(outward=passt.outward(8, "52:54:00:01:02:03"))
    names = [op[0] for op in made]
    assert names[names.index("loopback") + 1 :][:2] == ["uplink", "address"]
    assert not of(plan(host_network=True, outward=passt.outward(8, "52:54:00:01:02:03")), "uplink")


def test_sysfs_is_the_hosts_only_on_the_hosts_network() -> None:
    assert ("mount", "sysfs", "sysfs", "/sys", "ro", "") in plan(netns=9)
    assert ("bind", "/sys", "/sys", "ro,alone") in plan(host_network=True)


def test_ids_of_its_own_are_mapped_on_what_lies_on_a_disk() -> None:
    made = plan(binds=[Bind(Path("/data"), "/data", "rw,exec")])
    assert of(made, "map-user") == [("map-user", "0", "2100065536", "65536")]
    assert of(made, "overlay") == [("overlay", "/store/tree", "/machines/m/layers/root", "idmap,userxattr", "/")]
    assert ("bind", "/data", "/data", "rw,exec,idmap") in made
    made = plan(ids=SINGLE, binds=[Bind(Path("/data"), "/data", "ro")])
    assert of(made, "overlay")[0][3] == "userxattr"
    assert ("bind", "/data", "/data", "ro") in made
    # There is no group 5 to give terminals to.
    assert not any("gid=5" in op[-1] for op in of(made, "mount"))


def test_a_layer_in_memory_and_one_that_need_not_last() -> None:
    made = plan(layers=[Layer(Path("/t"), 64 << 20), Layer(Path("/usr"), Path("/m/usr"), "/usr")], volatile=True)
    assert [op[1:] for op in of(made, "overlay")] == [
        ("/t", f"ram:{64 << 20}", "idmap,userxattr,volatile", "/"),
        ("/usr", "/m/usr", "idmap,userxattr,volatile", "/usr"),
    ]


def test_a_layer_on_a_disk_of_its_own() -> None:
    made = plan(layers=[Layer(Path("/t"), Path("/root"), device=Path("/dev/loop7"))])
    assert of(made, "overlay") == [("overlay", "/t", "disk:/dev/loop7:/root", "idmap,userxattr", "/")]


def test_several_layers_are_named_below_one_folder() -> None:
    made = plan(layers=[Layer(Path("/t"), Path("/m/root"), names=("b/root", "a/root"))])
    assert of(made, "overlay") == [("overlay", "/t", "/m/root", "idmap,userxattr", "/", "b/root", "a/root")]


def test_what_docker_masks_is_masked() -> None:
    made = plan(hide=["/sys/devices/system/cpu/cpu0/thermal_throttle"])
    masked = of(made, "mask")[0]
    for path in ("/proc/kcore", "/proc/keys", "/proc/timer_list", "/proc/sched_debug", "/sys/firmware"):
        assert path in masked
    assert masked[-1].endswith("thermal_throttle")
    for path in ("/proc/sys", "/proc/sysrq-trigger", "/proc/irq", "/proc/bus", "/sys/fs/cgroup"):
        assert path in of(made, "readonly")[0]
    proc, masks = made.index(("mount", "proc", "proc", "/proc", "rw", "")), made.index(masked)
    assert proc < masks < made.index(of(made, "readonly")[0]) < made.index(("pivot", "rw"))


def test_power_is_given_up_and_the_filter_is_the_containers() -> None:
    made = plan()
    assert set(of(made, "caps")[0][1:]) == set(container.CAPS)
    assert {"sys_admin", "sys_ptrace", "sys_module", "net_admin", "dac_read_search", "sys_boot"}.isdisjoint(container.CAPS)
    assert of(made, "seccomp") == [("seccomp", seccomp.outer_profile().hex())]
    assert of(made, "exec-seccomp") == [("exec-seccomp", seccomp.container_profile().hex())], "of every command and builtin"
    assert of(made, "no-new-privs") and of(made, "landlock-domain")
    assert ("rlimit", "core", "0", "0") in made


def test_no_mount_gives_devices_but_the_devices() -> None:
    made = plan(binds=[Bind(Path("/data"), "/data", "rw,exec")])
    assert {op[2] for op in of(made, "bind") if "dev" in op[3].split(",")} == {f"/dev/{name}" for name in container.DEVICES}
    assert {op[3] for op in of(made, "mount") if "dev" in op[4].split(",")} == {"/dev/pts"}


def test_no_container_has_the_id_of_a_jail() -> None:
    """Whatever the slots are: a process of one must never be able to signal or trace one of the other."""
    shape = Shape("own", container.NAMESPACES)
    report = JailReport(("mount",), True, 0)
    slots = (0, 1, 2, 1525, 1526, 30517, 30518, jail.SLOTS - 1, jail.SLOTS, 2**31, 10**12)
    jails = [jail.own_id(slot, report) for slot in slots]
    ranges = [shape.ids(slot).users[0] for slot in slots]
    assert all(one is not None and not first <= one < first + size for one in jails for _, first, size in ranges)
    # Not only these: all single ids lie below all ranges.
    assert jail.FIRST_ID + jail.SLOTS <= ids.FIRST


def test_each_slot_has_a_range_of_its_own() -> None:
    shape = Shape("own", container.NAMESPACES)
    ranges = [shape.ids(slot).users[0] for slot in range(1, 200)]
    assert all(first + size <= other for (_, first, size), (_, other, _) in pairwise(ranges))
    assert all(first >= ids.FIRST and first + size < 2**32 for _, first, size in [*ranges, shape.ids(10**9).users[0]])
    assert shape.ids(3).owner == (ids.FIRST + 3 * ids.SIZE,) * 2


@pytest.mark.parametrize(
    ("text", "ranges"),
    [
        ("", ()),
        ("1000:100000:65536\n", ((1, 100000, 65535),)),
        ("other:1:2\nnonsense\n1000:x:1\n1000:300000:10\n1000:400000:99999\n", ((1, 300000, 10), (11, 400000, 65525))),
    ],
)
def test_subordinate_ids(tmp_path: Path, text: str, ranges: tuple[tuple[int, int, int], ...]) -> None:
    (tmp_path / "subuid").write_text(text)
    assert ids.subordinate(str(tmp_path / "subuid"), 1000) == ranges
    assert ids.subordinate(str(tmp_path / "missing"), 1000) == ()


def test_what_a_shape_lacks_is_said() -> None:
    assert Shape("own", container.NAMESPACES).lacks == ()
    assert "a time namespace" in Shape("same", ("user", "mount", "cgroup")).lacks
    assert "users other than root" in Shape("single", container.NAMESPACES).lacks
