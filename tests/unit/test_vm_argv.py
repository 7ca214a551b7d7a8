"""The command line: what it must hold, that it stays the same, and that each QEMU here accepts it."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from trivisor.core.paths import Home
from trivisor.launch.cgroup_layout import Hierarchy
from trivisor.launch.net import passt
from trivisor.vmm.engines.vm import argv, limits, qemu
from trivisor.vmm.engines.vm.argv import Places, Shape

MIB = 1 << 20
SHAPE = Shape("tcg", 1, 256 * MIB, upper=True, network=False)
QEMUS = sorted(
    {
        path
        for path in (shutil.which("qemu-system-x86_64"), os.environ.get("TRIVISOR_QEMU"), "/opt/qemu10/usr/bin/qemu-system-x86_64")
        if path
    }
)


def command(shape: Shape = SHAPE, memory: argv.Memory = "ice", **given: bool) -> list[str]:
    return argv.command("/usr/bin/qemu", shape, memory, boot=given.get("boot", False), blank=given.get("blank", False))


def test_closed_in() -> None:
    words = command()
    assert "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny" in words
    assert {"-nodefaults", "-no-user-config", "-no-reboot"} <= set(words)


def test_one_shape_one_command() -> None:
    """A clone differs from what it was frozen from in its disks, its RAM and its start, and in nothing else."""
    frozen, clone = command(memory="file", boot=True, blank=True), command(memory="ice")
    assert [word for word in clone if word not in frozen and not word.startswith(("driver=", "memory-backend-file"))] == [
        "-incoming",
        "defer",
    ]
    assert command() == command()


def test_ice_is_never_mapped_for_writing() -> None:
    assert "share=off,readonly=on,rom=off" in " ".join(command(memory="ice"))
    assert "mem-path=/proc/self/fd/14,share=off" in " ".join(command(memory="sealed"))
    assert "share=on" not in " ".join(command(memory="copy"))


def test_disks() -> None:
    words = " ".join(command())
    assert "driver=raw,node-name=root,read-only=on,file.driver=file,file.filename=/machine/root.squashfs" in words
    assert "driver=qcow2,node-name=upper,read-only=off" in words
    assert "null-co" in " ".join(command(blank=True))
    assert "upper" not in " ".join(command(Shape("tcg", 1, 256 * MIB, upper=False, network=False)))


def test_network_only_if_asked() -> None:
    assert "netdev" not in " ".join(command())
    assert "stream,id=net,server=off,addr.type=fd,addr.str=13" in " ".join(command(Shape("tcg", 1, 256 * MIB, upper=True, network=True)))


def test_kernel_words() -> None:
    tcg, kvm = argv.append(SHAPE), argv.append(Shape("kvm", 1, 256 * MIB, upper=True, network=False))
    assert "mitigations=off" in tcg
    assert "mitigations" not in kvm
    assert "nokaslr" not in tcg
    assert "norandmaps" not in tcg
    assert "norandmaps" in argv.append(Shape("tcg", 1, 256 * MIB, upper=True, network=False, fixed_addresses=True))


def test_what_may_come_while_it_runs_is_left_room_for() -> None:
    """vCPUs that the guest does not bring up, and addresses without memory; a machine that can have neither is as it was."""
    roomy = Shape("tcg", 1, 256 * MIB, upper=True, network=False, spare_cpus=3, room=1 << 30)
    words = command(roomy)
    assert "cpus=4,sockets=1,cores=4,threads=1" in words and "size=256M,maxmem=1280M" in words
    assert "maxcpus=1" in argv.append(roomy) and "online_policy=auto-movable" in argv.append(roomy)
    assert "maxmem" not in " ".join(command()) and "maxcpus" not in argv.append(SHAPE) and "size=256M" in command()


def test_no_vcpus_to_spare_where_nothing_bounds_them(tmp_path: Path) -> None:
    assert not limits.shared_out(None)
    group = Hierarchy(tmp_path, frozenset({"cpu"}), unified=True)
    assert limits.shared_out(Hierarchy(tmp_path, frozenset({"cpu"}), unified=False)) and limits.shared_out(group), "the host's own root"
    (tmp_path / "cgroup.events").touch()
    for procs, controllers, expected in (("1\n", "memory", False), ("", "memory", True), ("1\n", "cpu memory", True)):
        (tmp_path / "cgroup.procs").write_text(procs)
        (tmp_path / "cgroup.subtree_control").write_text(controllers)
        assert limits.shared_out(group) is expected


def test_without_namespaces_the_places_are_the_hosts() -> None:
    words = argv.command("/q", SHAPE, "copy", boot=True, blank=False, places=Places("/h/r", "/h/d", "/h/m", "/h/k", "/h/i"))
    text = " ".join(words)
    assert "/machine" not in text
    assert "/kit" not in text
    assert "-kernel /h/k -initrd /h/i" in text


def test_passt_plan() -> None:
    plan = passt.plan("/usr/bin/passt", {8080: 80}, 9, 7)
    words = plan[-1]
    assert {"fence", "100.100.100.200", "168.63.129.16"} <= {*words[: words.index("--")]}
    assert words[0] == "exec"
    assert "--no-map-gw" in words
    assert words[words.index("-t") + 1] == "127.0.0.1/8080:80"
    assert ("fd", "9", "3") in plan


@pytest.mark.parametrize("binary", QEMUS)
@pytest.mark.parametrize("network", [False, True])
def test_this_qemu_accepts_it(tmp_path: Path, binary: str, network: bool) -> None:
    """Started with the disks' dummies it comes up, waits for a state, and is sent away."""
    if not Path(binary).exists():
        pytest.skip(f"needs {binary}")
    home = Home(tmp_path / "home")
    home.open()
    found = qemu.inspect(binary, home)
    ram = tmp_path / "ram"
    ram.write_bytes(b"")
    os.truncate(ram, 256 * MIB)
    shape = Shape("tcg", 2, 256 * MIB, upper=True, network=network, spare_cpus=2, room=1 << 30)
    words = argv.command(found.path, shape, "ice" if found.rom_option else "copy", boot=False, blank=True, places=Places(ram=str(ram)))
    numbers = (argv.QMP, argv.LINE, argv.SERIAL, argv.NET, argv.EVENTS)
    pairs = [socket.socketpair() for _ in numbers]
    given = {str(number): str(pair[1].fileno()) for number, pair in zip(numbers, pairs, strict=True)}
    # QMP over a connected socket here: what is listened on is the runner's affair.
    words = [word.replace(f"fd={argv.QMP},server=on,wait=off", f"fd={argv.QMP}") for word in words]
    words = [re.sub(r"(\bfd=|addr\.str=)(\d+)\b", lambda found: found[1] + given.get(found[2], found[2]), word) for word in words]
    process = subprocess.Popen(words, pass_fds=[pair[1].fileno() for pair in pairs], stderr=subprocess.PIPE)
    try:
        pairs[0][0].settimeout(30)
        pairs[0][0].sendall(b'{"execute": "qmp_capabilities"}\n{"execute": "query-status"}\n{"execute": "quit"}\n')
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors.decode()
        assert b"inmigrate" in pairs[0][0].recv(65536)
    finally:
        process.kill()
        process.wait()
        for pair in pairs:
            pair[0].close()
            pair[1].close()
