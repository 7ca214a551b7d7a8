"""What is only the container wall's: who its root is outside, what PID 1 shows, what hostile layers can do to a start, rootless.

The parity and security suites try what all walls share.
"""

from __future__ import annotations

import os
import resource
import socket
from contextlib import suppress
from pathlib import Path

import pytest
from rootless_home import NOBODY, life_of_nobody
from wall_fixtures import Make

from trivisor import VMM, Machine
from trivisor.launch import container, ids, jail, keeper
from trivisor.launch.container import CAPS
from trivisor.vmm.engines.container import host
from trivisor.vmm.layers import layers

pytestmark = pytest.mark.walls("container")

PYTHON = "/usr/bin/python3"


def outside(machine: Machine) -> int:
    """PID 1 as the host knows it: the keeper's child."""
    folder = machine._context.folder(machine._first)
    pid = folder.keeper.read_text().split()[0]
    (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(child)


def layer(machine: Machine) -> Path:
    """What its programs wrote, on the host's disk."""
    upper = layers(machine._context.box(machine._first))[0].upper
    assert isinstance(upper, Path)
    return upper / "upper"


def said(machine: Machine, line: str) -> str:
    result = machine.exec(line)
    return result.text + result.stderr.decode()


def syscall(machine: Machine, number: int, *arguments: int) -> str:
    """Make a system call of x86-64 in the machine; return its result and errno. Perl is in every Debian."""
    if os.uname().machine != "x86_64":
        pytest.skip("needs x86-64: the numbers of system calls are its")
    words = ", ".join(str(argument) for argument in (number, *arguments))
    return machine.exec(["perl", "-e", f'my $r = syscall({words}); print $r, " ", $! + 0'], check=True).text


def test_root_is_nobody_outside(running: Machine) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root: only root gives machines ids of their own")
    running.exec("touch /made; chmod u+s /made; chown 1000:1000 /tmp", check=True)
    owner = ids.probe(running._context.home.root).ids(running._first.slot).owner[0]
    assert owner >= ids.FIRST
    assert os.stat(f"/proc/{outside(running)}").st_uid in (0, owner)
    assert f"\t{owner}\t{owner}\t{owner}\t{owner}\n" in Path(f"/proc/{outside(running)}/status").read_text()
    made = (layer(running) / "made").stat()
    assert (made.st_uid, (layer(running) / "tmp").stat().st_uid) == (owner, owner + 1000)
    # Inside, the image's files are root's.
    assert running.exec(["stat", "-c", "%u:%g", "/etc/passwd", "/made", "/"]).text == "0:0\n" * 3


def test_each_namespace_is_its_own(running: Machine) -> None:
    pid = outside(running)
    for name in ("user", "mnt", "pid", "net", "ipc", "uts", "cgroup", "time"):
        assert os.readlink(f"/proc/{pid}/ns/{name}") != os.readlink(f"/proc/self/ns/{name}"), name
    assert running.exec(["sh", "-c", "ls -d /proc/[0-9]* | wc -l"], check=True).text.strip() < "9", "of processes it sees its own"


def test_nothing_of_the_host_is_left_in_its_mounts(running: Machine) -> None:
    lines = running.exec(["cat", "/proc/self/mountinfo"], check=True).text.splitlines()
    points = [line.split()[4] for line in lines]
    assert points.count("/") == 1
    home = str(running._context.home.root)
    assert not any(home in line for line in lines)
    sources = {line.split(" - ")[1].split()[0] for line in lines}
    assert sources <= {"overlay", "tmpfs", "proc", "sysfs", "devpts", "mqueue", "devtmpfs", "cgroup", "cgroup2"}
    # Up from the root, and out of a chroot, lies the root.
    same = "import os; a = os.stat('/'); b = os.stat('/..'); assert (a.st_dev, a.st_ino) == (b.st_dev, b.st_ino)"
    running.exec([PYTHON, "-c", same], check=True)
    escape = (
        "import os; os.makedirs('/jail', exist_ok=True); fd = os.open('/', os.O_RDONLY); os.chroot('/jail'); os.fchdir(fd)\n"
        "for _ in range(64): os.chdir('..')\n"
        "os.chroot('.'); print(os.path.exists('/jail'), os.path.exists('" + home + "'))"
    )
    assert running.exec([PYTHON, "-c", escape], check=True).text == "True False\n"


def test_of_proc_and_sys_it_sees_and_writes_no_more_than_dockers(running: Machine) -> None:
    code = f"""
import os
def content(path): return os.listdir(path) if os.path.isdir(path) else open(path, 'rb').read()
def writable(path): return not os.statvfs(path).f_flag & os.ST_RDONLY
print([path for path in {(*container.MASKED, *host.hidden())} if os.path.exists(path) and content(path)])
print([path for path in {(*container.READONLY, "/sys")} if os.path.exists(path) and writable(path)])
"""
    assert running.exec([PYTHON, "-c", code], check=True).text == "[]\n[]\n"
    narrow = {"nosuid", "nodev", "noexec"}
    flags = {line.split()[4]: set(line.split()[5].split(",")) for line in running.exec(["cat", "/proc/self/mountinfo"]).text.splitlines()}
    for point in ("/proc", "/sys", "/dev/shm", "/dev/mqueue"):
        assert narrow <= flags[point], (point, flags[point])
    assert {"nosuid", "noexec"} <= flags["/dev"] and {"nosuid", "noexec"} <= flags["/dev/pts"] and {"nosuid", "nodev"} <= flags["/run"]


def test_limits_of_every_process(running: Machine) -> None:
    most = min(container.OPEN_FILES, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    for user in (None, "nobody"):
        said = running.exec(["bash", "-c", "ulimit -Sc; ulimit -Hc; ulimit -Sn; ulimit -Hn"], user=user, check=True).text
        assert said.split() == ["0", "0", str(min(4096, most)), str(most)]


def test_a_landlock_domain_is_around_it(running: Machine) -> None:
    """What Landlock alone holds is held by seccomp, too: the kernel counts domains, of which 16 fit around a process (landlock(7))."""
    if jail.probe().landlock < 2:
        pytest.skip("needs a kernel with Landlock")
    code = "my $a = pack('Q', 1); my $r = syscall(444, $a, 8, 0); my $n = 0; $n++ while syscall(446, $r, 0) == 0; print $n, ' ', $! + 0"
    assert running.exec(["perl", "-e", code], check=True).text == "15 7"  # then E2BIG


def test_pid_1_shows_nothing_and_holds_nothing(running: Machine) -> None:
    for link in ("exe", "root", "cwd"):
        assert "Permission denied" in said(running, f"readlink /proc/1/{link} || ls -l /proc/1/{link}")
    for file in ("mem", "environ", "maps", "fd", "map_files", "auxv", "syscall"):
        assert "Permission denied" in said(running, f"cat /proc/1/{file} || ls /proc/1/{file}"), file
    assert running.exec(["cat", "/proc/1/cmdline"]).stdout.rstrip(b"\0") == b"tvinit"
    assert syscall(running, 101, 16, 1, 0, 0) == "-1 1"  # ptrace(PTRACE_ATTACH, 1): EPERM
    assert syscall(running, 101, 0x4206, 1, 0, 0) == "-1 1"  # PTRACE_SEIZE
    # Its descriptors: its own null devices, the pipe of its log, the line, where it hands listeners over, and what the loop is made of.
    held = []
    for entry in Path(f"/proc/{outside(running)}/fd").iterdir():
        with suppress(FileNotFoundError):  # of a command that has just ended
            held.append(os.readlink(entry))
    assert all(what.startswith(("/dev/null", "pipe:", "socket:", "anon_inode:")) for what in held), held
    assert sum(what.startswith("socket:") for what in held) == 2
    # Nor do the commands that it starts hold any of these.
    assert running.exec([PYTHON, "-c", "import os; print(sorted(os.listdir('/proc/self/fd'))[:-1])"]).text.strip() in ("['0', '1', '2']",)


def test_power_is_gone_and_does_not_come_back(running: Machine) -> None:
    status = dict(line.split(":\t", 1) for line in running.exec(["cat", "/proc/self/status"]).text.splitlines() if ":\t" in line)
    assert status["CapEff"] == status["CapPrm"] == status["CapBnd"]
    assert int(status["CapBnd"], 16).bit_count() == len(CAPS)
    assert int(status["CapInh"], 16) == int(status["CapAmb"], 16) == 0
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    user = running.exec(["cat", "/proc/self/status"], user="1000:1000").text
    assert "CapEff:\t0000000000000000" in user and "CapInh:\t0000000000000000" in user
    running.exec("cp /usr/bin/id /id; chmod 4755 /id", check=True)
    assert running.exec(["/id", "-u"], user="1000").text == "1000\n"


@pytest.mark.parametrize(
    "line",
    [
        "mount -t tmpfs x /mnt",
        "mount --bind /etc /mnt",
        "umount /proc/sys",
        "mount -o remount,rw /sys",
        "unshare -U true",
        "unshare -m true",
        "nsenter -t 1 -m true",
        "mknod /sda b 8 0",
        "hostname other",
        "echo 1 > /proc/sys/kernel/core_pattern",
        "echo 1 > /proc/sys/net/ipv4/ip_forward",
        "echo b > /proc/sysrq-trigger",
        "echo 1 > /sys/kernel/mm/ksm/run",
        "echo $$ > /sys/fs/cgroup/cgroup.procs",
        "head -c 1 /proc/kcore | grep -q .",
        "cat /proc/keys | grep -q .",
        "dmesg",
        "swapoff -a && false",
    ],
)
def test_what_it_may_not(running: Machine, line: str) -> None:
    assert running.exec(line).exit_code != 0


def test_keys_are_out_of_reach(running: Machine) -> None:
    for number in (248, 249, 250):  # add_key, request_key, keyctl
        assert syscall(running, number, 0, 0, 0, 0) == "-1 1"


def test_its_clocks_begin_with_it(make: Make) -> None:
    up = float(make().exec(["cat", "/proc/uptime"]).text.split()[0])
    assert up < min(60.0, float(Path("/proc/uptime").read_text().split()[0]))


def test_devices_and_terminals(running: Machine) -> None:
    assert running.exec(": > /dev/mqueue/made && cat /dev/mqueue/made && rm /dev/mqueue/made").text.startswith("QSIZE:0 ")
    assert running.exec("echo x > /dev/shm/made && cat /dev/shm/made && rm /dev/shm/made").text == "x\n"
    assert running.exec("head -c 3 /dev/zero | od -An -tx1; echo x >/dev/null; head -c 1 /dev/urandom | wc -c").text == " 00 00 00\n1\n"
    assert running.exec([PYTHON, "-c", "import os; os.write(os.open('/dev/full', os.O_WRONLY), b'x')"]).exit_code != 0
    assert running.exec("ls /dev | tr '\\n' ' '").text == "fd full mqueue null ptmx pts random shm stderr stdin stdout tty urandom zero "
    with running.spawn(["tty"], pty=True, stdin=False) as process:
        assert process.stdout.read().strip() == b"/dev/pts/0"


def test_hostile_layers_do_not_lead_out(make: Make, tmp_path: Path) -> None:
    """Whatever links a machine leaves where its next start mounts, they are followed within it."""
    bait = tmp_path / "bait"
    bait.write_text("host\n")
    machine = make()
    machine.stop()
    upper = layer(machine)
    (upper / "etc").mkdir(exist_ok=True)
    os.chown(upper / "etc", upper.stat().st_uid, upper.stat().st_gid)
    for name, target in {
        "etc/resolv.conf": "/nowhere/at/all",
        "etc/hosts": "../" * 30 + str(bait).lstrip("/"),
        "etc/hostname": "/proc/self/root/etc/passwd",
        "run": str(tmp_path),
        "sys": "/proc",
    }.items():
        (upper / name).unlink(missing_ok=True)
        (upper / name).symlink_to(target)
    machine.start()
    assert bait.read_text() == "host\n" and sorted(os.listdir(tmp_path)) == ["bait"]
    assert machine.exec(["cat", "/etc/resolv.conf"]).exit_code == 0
    assert machine.exec("echo 1 > /proc/sys/kernel/core_pattern").exit_code != 0
    assert machine.exec(["head", "-n", "1", "/etc/hosts"]).text == "127.0.0.1\tlocalhost\n"


def test_a_file_where_a_folder_is_needed_is_an_error(make: Make) -> None:
    machine = make()
    machine.stop()
    upper = layer(machine)
    (upper / "proc").write_text("no folder")
    with pytest.raises(Exception, match="proc"):
        machine.start()
    assert not keeper.alive(machine._context.folder(machine._first))
    machine.delete()


def test_a_tree_without_end_and_closed_folders_are_deleted(make: Make) -> None:
    machine = make()
    deep = "import os\nos.chdir('/root')\nfor _ in range(3000):\n os.mkdir('d'); os.chdir('d')"
    machine.exec([PYTHON, "-c", deep], check=True)
    machine.exec("mkdir /closed && touch /closed/x && chmod 0 /closed", check=True)
    folder = machine._context.folder(machine._first).root
    machine.delete(force=True)
    assert not folder.exists()


def test_a_machine_of_this_process_starts_again(wall_vmm: VMM) -> None:
    """Its layer is mounted volatile, which overlayfs takes only once unless told otherwise."""
    with wall_vmm.run("debian", wall="container") as machine:
        machine.exec("echo kept > /kept", check=True)
        machine.stop()
        machine.start()
        assert machine.exec(["cat", "/kept"]).text == "kept\n"


def test_the_hosts_own_root(wall_vmm: VMM) -> None:
    with wall_vmm.run("host", wall="container") as machine:
        assert machine.exec("ls -A /home /root /run /tmp | grep -v :").text.strip() == ""
        assert machine.exec("test -e /etc/shadow").exit_code != 0
        machine.exec("touch /usr/made && test -e /usr/made", check=True)
        assert not Path("/usr/made").exists()


def test_the_hosts_own_network(make: Make) -> None:
    """By name only: its interfaces and its loopback are the host's."""
    machine = make(network="host")
    for _ in range(100):
        before = set(os.listdir("/sys/class/net"))
        seen = set(machine.exec(["ls", "/sys/class/net"], check=True).text.split())
        after = set(os.listdir("/sys/class/net"))
        if before & after <= seen <= before | after:  # others come and go, some within an instant
            break
    else:
        pytest.fail(f"{seen} is neither {before} nor {after}")
    assert os.readlink(f"/proc/{outside(machine)}/ns/net") == os.readlink("/proc/self/ns/net")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        machine.exec([PYTHON, "-c", f"import socket; socket.create_connection(('127.0.0.1', {port}), 5)"], check=True)
        server.settimeout(5)
        server.accept()[0].close()
    assert machine.exec("echo 1 > /proc/sys/net/ipv4/ip_forward").exit_code != 0


def test_rootless_with_one_id() -> None:
    """As a user without subordinate ids: root is the only user there is, and all that is root's works."""

    def live(machine: Machine) -> str:
        machine.exec("mkdir -p /a/b && chmod 0 /a && touch /usr/made", check=True)
        assert machine.stats().private > 0  # whether or not this user has control groups
        machine.stop()
        machine.start()
        return machine.exec("id -u; cat /proc/self/uid_map; test -e /usr/made && echo kept").text

    assert life_of_nobody("container", live).split() == ["0", "0", str(NOBODY), "1", "kept"]
