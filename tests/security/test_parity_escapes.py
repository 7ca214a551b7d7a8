"""Root in a machine tries to get out (escape.c): by the kernel's files, devices, mounts, modules, other processes, and calls that
a container has no use for.

What must fail where depends on whose kernel is asked. Behind the container wall it is the host's, and everything is
refused. gVisor's own kernel, and a virtual machine's, may do to themselves what their root asks for; the host stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from host_sentinel import Sentinel
from machine_home import VmHome
from wall_fixtures import Make

from trivisor import VMM, GuestError, InvalidState, Machine, State
from trivisor.core.spec import Wall

BOUND = 60.0
PROGRAM = "/usr/local/bin/escape"
NAMES = re.findall(r"TRY\((\w+)\)", Path(__file__).with_name("escape.c").read_text().split("attempts[] = {")[1])
LAST = ("kill_init", "pivot", "umount_mask", "enter_init")
"""What a kernel that obeys its root may take down the machine by: tried when the rest has been."""
CLOSED = (
    "sysctl_vm", "sysctl_core", "sysctl_modprobe", "sysctl_panic", "sysrq", "sys_ksm", "sys_hugepages", "sys_uevent",
    "sys_cgroup", "dev_mem", "dev_kmsg", "dev_kvm", "dev_loop", "mknod_mem", "mknod_vda", "mknod_loop", "mknod_shm", "kcore",
    "kmsg", "fs_open", "open_tree_clone", "mount_attributes", "module", "module_file", "module_delete", "kexec",
    "reboot_off", "swap_on", "accounting", "quota", "clock_set", "clock_adjust", "fd_of_init", "key_add", "key_request",
    "bpf_map", "user_faults", "user_faults_own", "perf", "notify_all", "vm_socket", "by_handle", "call_32", "call_x32",
)  # fmt: skip
"""What gVisor's kernel has nothing to give for: these are the host's, or not made."""


@pytest.fixture(scope="module")
def attacker(wall_home: VmHome, wall: Wall, escape: Path) -> Iterator[Machine]:
    """A running machine that has the program."""
    with VMM(wall_home.root) as vmm:
        machine = vmm.create("debian", wall=wall)
        machine.start()
        machine.files.upload(escape, PROGRAM)
        yield machine
        machine.delete(force=True)


def attempt(machine: Machine, name: str) -> str:
    return machine.exec([PROGRAM, name], timeout=BOUND).text.strip()


def refused(outcome: str) -> bool:
    return re.fullmatch(r"E[A-Z0-9]+|signal \d+", outcome) is not None


@pytest.mark.walls("container")
@pytest.mark.parametrize("name", NAMES)
def test_the_hosts_kernel_refuses(attacker: Machine, sentinel: Sentinel, name: str) -> None:
    assert refused(outcome := attempt(attacker, name)), outcome
    assert attacker.exec(["echo", "here"]).text == "here\n", "PID 1 answers"


@pytest.mark.walls("container")
@pytest.mark.parametrize("name", NAMES)
def test_it_refuses_users_too(attacker: Machine, sentinel: Sentinel, name: str) -> None:
    outcome = attacker.exec([PROGRAM, name], user="nobody", timeout=BOUND).text.strip()
    assert refused(outcome), outcome


@pytest.mark.walls("gvisor")
@pytest.mark.parametrize("name", CLOSED)
def test_gvisors_kernel_refuses(attacker: Machine, sentinel: Sentinel, name: str) -> None:
    assert refused(outcome := attempt(attacker, name)), outcome


def test_whatever_it_tries_the_host_is_as_it_was(make: Make, sentinel: Sentinel, escape: Path) -> None:
    """All of it in one machine, which may break; then it can be stopped and used again."""
    machine = make()
    machine.files.upload(escape, PROGRAM)
    machine.exec("sync", check=True)
    for name in sorted(NAMES, key=LAST.__contains__):
        try:
            attempt(machine, name)
        except (GuestError, InvalidState):
            break
    sentinel.check()
    if machine.state is State.RUNNING:
        with suppress(InvalidState):  # it dies of the last one, this moment
            machine.stop(timeout=1)
    machine.start()
    assert machine.exec(["echo", "here"]).text == "here\n"


def test_nobody_of_the_host_can_be_signalled(make: Make, sentinel: Sentinel) -> None:
    """By number, the host's own or any other, and all at once."""
    machine = make()
    result = machine.exec(f"kill -9 {sentinel.process.pid}; for i in $(seq 2 400); do [ $i = $$ ] || kill -9 $i; done 2>/dev/null; echo on")
    assert result.stdout.endswith(b"on\n") or result.signal == 9
    try:
        machine.exec(["sh", "-c", "kill -9 -1"], timeout=BOUND)
    except GuestError:
        machine.wait(BOUND)  # gVisor's PID 1 has no protection from its own root
    sentinel.check()
    if machine.state is State.RUNNING:
        assert machine.exec(["echo", "here"]).text == "here\n"


@pytest.mark.walls("gvisor", "container")
def test_the_hosts_processes_cannot_be_seen(running: Machine, sentinel: Sentinel) -> None:
    seen = running.exec("cat /proc/[0-9]*/cmdline | tr '\\0' ' '").text
    assert "100000" not in seen
    assert "pytest" not in seen
    assert len(running.exec("ls -d /proc/[0-9]*").text.split()) < 6


def test_a_setuid_program_is_of_no_use(running: Machine, wall: Wall) -> None:
    """Behind the walls where a user could reach the kernel that root reaches; in a virtual machine it is the guest's own affair."""
    running.exec("cp /usr/bin/id /usr/local/bin/rootly; chmod 6755 /usr/local/bin/rootly", check=True)
    said = running.exec(["/usr/local/bin/rootly", "-u"], user="nobody").text.strip()
    assert said == ("0" if wall == "vm" else "65534")


@pytest.mark.walls("container")
def test_a_setuid_file_is_nobodys_on_the_host(running: Machine) -> None:
    """Were the home open to other users, what root in the machine left there would not be root's, or not be reachable."""
    running.exec("cp /usr/bin/id /usr/local/bin/rootly; chmod 6755 /usr/local/bin/rootly", check=True)
    folder = Path(running.info()["folder"])
    (found,) = folder.rglob("rootly")
    assert found.stat().st_uid != 0 or folder.stat().st_uid != 0
    assert folder.stat().st_mode & 0o077 == 0
