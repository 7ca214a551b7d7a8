"""What runsc is told, composed without running it: bundle, command line, plan, and what is read of a binary's own words."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from trivisor.core.errors import HostLacks
from trivisor.core.paths import Home
from trivisor.launch.container import Ids, Layer
from trivisor.launch.jail import Bind
from trivisor.launch.net import passt
from trivisor.launch.plan import Plan, encode
from trivisor.vmm.engines.gvisor import bundle, jailed, runsc
from trivisor.vmm.engines.gvisor.jailed import Link, Sandbox
from trivisor.vmm.engines.gvisor.runsc import Runsc

OLD = frozenset({"host-uds", "platform", "network", "ignore-cgroups", "root", "rootless", "net-raw", "overlay2"})
NEW = OLD | {"directfs"}
RANGE = ((0, 2_100_000_000, 65536),)
OWN, SINGLE = Ids(RANGE, RANGE, mapped=True), Ids(((0, 1000, 1),), ((0, 1000, 1),))
NAMESPACES = ("user", "mount", "pid", "net", "ipc", "uts", "cgroup", "time")

FLAGS = """Usage: runsc <flags> <subcommand> <subcommand args>
  -host-uds value
    \tcontrols permission to access host Unix-domain sockets. Values: none|open|create|all, default: none
  -platform string
    \tspecifies which platform to use: systrap (default), ptrace, kvm. (default "systrap")
  -root string
    \troot directory for storage of container state.
"""


def binary(options: frozenset[str] = NEW) -> Runsc:
    return Runsc("/usr/bin/runsc", "id", "0.0~20240729.0", options, ("systrap", "ptrace"))


def sandbox(**changes: object) -> Sandbox:
    config = bundle.config(hostname="web", memory=256 << 20)
    plain = Sandbox(
        runsc=binary(),
        platform="systrap",
        ids=OWN,
        namespaces=NAMESPACES,
        config=config,
        tvinit=Path("/lib/tvinit"),
        log=7,
        memory=256 << 20,
        door=Path("/srv/m/door"),
        layers=(Layer(Path("/srv/tree"), Path("/srv/m/layers/root")),),
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


def named(plan: Plan, name: str) -> list[tuple[str, ...]]:
    return [op for op in plan if op[0] == name]


def argv(plan: Plan) -> list[str]:
    return list(plan[-1][1:])


def test_config_says_nothing_of_the_host() -> None:
    config = bundle.config(hostname="web", memory=1 << 30, volumes=[bundle.Shared("/data", True), bundle.Shared("/rw", False)])
    assert config["process"]["args"] == ["/.trivisor/tvinit", "guest", "--connect", "/.trivisor/door/line"]
    assert config["hostname"] == "web"
    assert config["root"] == {"path": bundle.ROOT}
    mounts = {mount["destination"]: mount for mount in config["mounts"]}
    assert mounts["/data"]["source"] == f"{bundle.VOLUMES}/0"
    assert "ro" in mounts["/data"]["options"]
    assert mounts["/rw"]["source"] == f"{bundle.VOLUMES}/1"
    assert "rw" in mounts["/rw"]["options"]
    assert "ro" in mounts[bundle.INSIDE]["options"]
    assert f"size={512 << 20}" in mounts["/dev/shm"]["options"]
    binds = [mount["source"] for mount in config["mounts"] if mount["type"] == "bind"]
    assert all(source.startswith("/box/") for source in binds)
    assert {"type": "network", "path": "/proc/1/ns/net"} in config["linux"]["namespaces"]


def test_root_inside_has_what_root_has() -> None:
    caps = bundle.config(hostname="web", memory=0)["process"]["capabilities"]
    assert caps["bounding"] == caps["effective"] == caps["permitted"]
    assert {"CAP_SYS_ADMIN", "CAP_CHOWN", "CAP_NET_RAW"} <= set(caps["effective"])


def test_only_options_that_the_binary_has() -> None:
    new, old = jailed.command(binary(), "systrap", OWN), jailed.command(binary(OLD), "ptrace", OWN)
    assert "--directfs=false" in new
    assert "--overlay2=none" in new
    assert not any("directfs" in word for word in old)
    assert "--platform=ptrace" in old
    for words in (new, old):
        assert words[0] == jailed.PROGRAM
        assert {"--network=none", "--host-uds=open", "--ignore-cgroups=true", "--rootless=false"} <= set(words)


def test_rootless_where_there_is_one_id() -> None:
    assert "--rootless=true" in jailed.command(binary(), "systrap", SINGLE)
    several = Ids(((0, 1000, 1), (1, 100000, 65535)), ((0, 1000, 1), (1, 100000, 65535)))
    assert "--rootless=false" in jailed.command(binary(), "systrap", several)


def test_the_plan_jails() -> None:
    plan = jailed.plan(sandbox(cgroups=(5, 6)))
    assert plan[0] == ("cgroup", "5", "6")
    assert plan[1] == ("namespaces", "user", "mount", "pid", "net", "ipc", "uts", "cgroup")
    names = [op[0] for op in plan]
    assert names.index("pivot") < names.index("caps") < names.index("no-new-privs") < names.index("seccomp") < names.index("exec")
    assert argv(plan)[-4:] == ["run", "--bundle", "/box/bundle", jailed.NAME]
    shown = {op[1]: op[3] for op in named(plan, "bind")}
    assert shown == {
        **dict.fromkeys(("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom"), "rw,dev"),
        "/usr/bin/runsc": "ro,exec",
        "/lib/tvinit": "ro,exec",
        "/srv/m/door": "ro",
    }
    assert encode(plan)


def test_the_layer() -> None:
    assert named(jailed.plan(sandbox()), "overlay") == [("overlay", "/srv/tree", "/srv/m/layers/root", "idmap,userxattr", "/box/root")]
    ram = sandbox(layers=(Layer(Path("/t"), 4096), Layer(Path("/usr"), 4096, "/usr")), ids=SINGLE, volatile=True)
    assert named(jailed.plan(ram), "overlay") == [
        ("overlay", "/t", "ram:4096", "userxattr,volatile", "/box/root"),
        ("overlay", "/usr", "ram:4096", "userxattr,volatile", "/box/root/usr"),
    ]


def test_who_it_is_lies_over_its_root_and_no_other() -> None:
    plan = jailed.plan(sandbox(machine_id="f" * 32, dns=("10.0.0.1",)))
    texts = {op[1]: (op[2], op[3]) for op in named(plan, "text") if op[4:] == (bundle.ROOT,)}
    assert texts["/etc/hostname"] == ("0644", "web\n")
    assert texts["/etc/machine-id"] == ("0444", "f" * 32 + "\n")
    assert texts["/etc/resolv.conf"] == ("0644", "nameserver 10.0.0.1\n")
    assert set(texts) == {"/etc/hostname", "/etc/hosts", "/etc/machine-id", "/etc/resolv.conf"}
    env = bundle.config(hostname="web", memory=0, env={"A": "b=c", "PATH": "/x"})["process"]["env"]
    assert env == ["PATH=/x", "HOME=", "A=b=c"]


def test_volumes_are_shown_with_their_ids() -> None:
    volumes = (Bind(Path("/srv/data"), "/data", "ro,exec"),)
    assert ("bind", "/srv/data", "/box/volumes/0", "ro,exec,idmap") in jailed.plan(sandbox(volumes=volumes))
    assert ("bind", "/srv/data", "/box/volumes/0", "ro,exec") in jailed.plan(sandbox(volumes=volumes, ids=SINGLE))


def test_the_bundle_travels_in_the_plan() -> None:
    texts = {op[1]: op[3] for op in named(jailed.plan(sandbox()), "text")}
    assert json.loads(texts["/box/bundle/config.json"])["hostname"] == "web"
    assert texts["/proc/meminfo"].startswith("MemTotal: 262144 kB\n")


def test_a_link_is_moved_in_and_handed_to_the_sentry() -> None:
    plan = jailed.plan(sandbox(link=Link(9, "eth0", "10.0.0.2", "30", "10.0.0.1")))
    names = [op[0] for op in plan]
    assert plan[names.index("adopt")] == ("adopt", "9", "eth0")
    assert plan[names.index("address")] == ("address", "eth0", "10.0.0.2", "30", "10.0.0.1")
    assert "net" in plan[names.index("namespaces")]
    assert "--network=sandbox" in argv(plan)
    alone = jailed.plan(sandbox())
    assert not named(alone, "adopt")
    assert "--network=none" in argv(alone)


def test_without_root_the_interface_is_made_in_the_jail() -> None:
    outward = passt.outward(8, "52:54:00:01:02:03")
    plan = jailed.plan(sandbox(outward=outward))
    names = [op[0] for op in plan]
    assert names[names.index("loopback") + 1 :][:2] == ["uplink", "address"]
    assert plan[names.index("uplink")][1:4] == ("8", "eth0", "52:54:00:01:02:03")
    assert "--network=sandbox" in argv(plan)
    # runsc has no network stack of its own for who has no ids beside root.
    assert "--network=host" in argv(jailed.plan(sandbox(outward=outward, ids=SINGLE)))
    assert "--network=none" in argv(jailed.plan(sandbox(ids=SINGLE)))


def test_kvm_sees_its_device_and_no_other_platform_does() -> None:
    assert ("bind", "/dev/kvm", "/dev/kvm", "rw,dev") in jailed.plan(sandbox(platform="kvm"))
    assert not any("/dev/kvm" in op for op in jailed.plan(sandbox()))


def test_a_trial_has_no_layer_and_no_line() -> None:
    plan = jailed.plan(sandbox(layers=(), door=None))
    assert not named(plan, "overlay")
    assert not any("/srv/m/door" in word for op in plan for word in op)


def test_a_binarys_own_words() -> None:
    facts = runsc.parse("runsc version 0.0~20240729.0\nspec: 1.0.2-dev\n", FLAGS)
    assert facts.version == "0.0~20240729.0"
    assert facts.options == ["host-uds", "platform", "root"]
    assert facts.platforms == ["systrap", "kvm", "ptrace"]
    old = runsc.parse("runsc version 1", FLAGS.replace('systrap (default), ptrace, kvm. (default "systrap")', "ptrace (default), kvm."))
    assert old.platforms == ["kvm", "ptrace"]
    assert runsc.parse("", "").platforms == []


def test_a_program_that_is_not_runsc(tmp_path: Path) -> None:
    home = Home(tmp_path)
    home.open()
    with pytest.raises(HostLacks, match="--host-uds"):
        runsc.inspect("/bin/echo", home)
    with pytest.raises(HostLacks, match="does not run"):
        runsc.inspect("/bin/false", home)
    with pytest.raises(HostLacks, match="not a program"):
        runsc.locate(str(tmp_path))
