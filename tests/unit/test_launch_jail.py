"""The jail, looked at from inside, in each of its three shapes."""

from __future__ import annotations

import ctypes
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from launch_support import in_child, launch

from trivisor.launch import jail as jails
from trivisor.launch import seccomp, tvinit
from trivisor.launch.jail import Bind, JailReport, jail, own_id, probe
from trivisor.launch.plan import render

PLAIN_UID = 65432
SYSTEM = [Bind(Path(path), path, "ro,exec") for path in ("/usr", "/bin", "/lib", "/lib64") if Path(path).exists()]


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that any user may use: pytest's own belong to one."""
    folder = Path(tempfile.mkdtemp(prefix="trivisor-test-"))
    folder.chmod(0o777)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def public_tvinit(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """tvinit where any user may run it."""
    copy = place / "tvinit"
    shutil.copy(tvinit.path(), copy)
    copy.chmod(0o755)
    monkeypatch.setattr(tvinit, "path", lambda: copy)
    return copy


def shell(
    code: str, place: Path, *, binds: list[Bind] | None = None, report: JailReport | None = None, slot: int = 5, network: str = "none"
) -> str:
    """Run a shell in a jail and return what it and its errors said."""
    root = Path(tempfile.mkdtemp(dir=place))
    plan = jail(
        ["/bin/sh", "-c", code],
        binds=[*SYSTEM, *(binds or [])],
        env={"PATH": "/usr/bin:/bin"},
        fds={},
        root=root,
        slot=slot,
        network="host" if network == "host" else "none",
        report=report,
    )
    done = launch(plan)
    return (done.stdout + done.stderr).decode()


def needs_namespaces() -> None:
    if not probe().namespaces:
        pytest.skip(f"needs namespaces: {probe().why}")


def needs_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to become another user")


def check_confined(said: str) -> None:
    """`said` is the status of a process: no capability in any set, no new privileges, a filter."""
    status = dict(line.split(":\t") for line in said.splitlines() if ":\t" in line)
    for kind in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(status[kind], 16) == 0, kind
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"


def check_jail(place: Path) -> None:
    """What both shapes with namespaces hold."""
    secret = place / "secret"
    secret.write_text("secret")
    shared = place / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    # The jail has no /proc: where the status has to be read, the host's is bound, which the probe of a jail may do.
    said = shell(f"cat {secret}; ls {place}; cat /etc/passwd; echo $$; exec 2>&1; ls -d /proc/1", place)
    assert said.count("No such file") == 4, said
    assert "\n1\n" in "\n" + said  # PID 1 of its own namespace
    check_confined(shell("cat /host/self/status", place, binds=[Bind(Path("/proc"), "/host", "ro")], report=_without_pid()))
    writable, read_only = Bind(shared, "/shared", "rw"), Bind(shared, "/fixed")
    said = shell(
        "echo x > /shared/new; echo y > /fixed/other; echo z > /usr/z; echo w > /w; /shared/tool", place, binds=[writable, read_only]
    )
    assert (shared / "new").read_text() == "x\n"
    assert os.listdir(shared) == ["new"]
    assert "/fixed/other" in said and "/usr/z" in said and "cannot create /w" in said
    tool = shared / "tool"
    tool.write_text("#!/bin/sh\necho ran\n")
    tool.chmod(0o755)
    assert "ran" not in shell("/shared/tool; /fixed/tool", place, binds=[writable, read_only])  # noexec unless it is said
    check_network(place)


def _without_pid() -> JailReport:
    report = probe()
    return JailReport(tuple(name for name in report.namespaces if name != "pid"), report.own_id, report.landlock)


def check_network(place: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as abstract:
        name = f"\0trivisor-{os.getpid()}"
        abstract.bind(name)
        abstract.listen()
        code = f"""
import socket
for family, address in ((2, ("127.0.0.1", {server.getsockname()[1]})), (1, {name!r})):
    try:
        socket.socket(family).connect(address)
        print("reached", family)
    except OSError as error:
        print("refused", family, error.errno)
"""
        said = shell(f"/usr/bin/python3 -S -c '{code.replace(chr(39), chr(34))}'", place)
    assert "reached" not in said
    assert "refused 2 1\n" in said, said  # EPERM: not even a socket
    assert "refused 1 " in said, said


def test_as_root(place: Path) -> None:
    needs_root()
    needs_namespaces()
    if not probe().own_id:
        pytest.skip(f"needs namespaces as root: {probe().why}")
    check_jail(place)
    assert own_id(5) == 2_000_000_005
    assert shell("id -u; id -g; id -G", place).split() == ["2000000005"] * 3
    assert probe().lacks == () or probe().lacks == ("Landlock",)


def test_rootless(place: Path, public_tvinit: Path) -> None:
    needs_namespaces()

    def work() -> str:
        report = probe()
        if not report.namespaces:
            return f"skip: {report.why}"
        check_jail(place)
        assert report.namespaces[0] == "user"
        assert not report.own_id and own_id(5) is None
        assert "an id of its own" in report.lacks
        uids = shell("id -u; id -g", place).split()
        assert uids == [str(os.getuid()), str(os.getgid())], uids
        return "done"

    said = in_child(work, PLAIN_UID if os.geteuid() == 0 else None)
    if said.startswith("skip"):
        pytest.skip(f"needs user namespaces: {said}")


def _forbid_namespaces() -> None:
    """Filter this process as a container's host would: clone and unshare get no namespace."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    program = seccomp.default_profile()
    buffer = ctypes.create_string_buffer(program, len(program))

    class Program(ctypes.Structure):
        _fields_ = [("len", ctypes.c_ushort), ("filter", ctypes.c_void_p)]

    pointer = ctypes.byref(Program(len(program) // 8, ctypes.addressof(buffer)))
    assert prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
    assert prctl(22, 2, pointer, 0, 0) == 0  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


@pytest.mark.parametrize("plain", [True, False])
def test_where_the_host_forbids_namespaces(place: Path, public_tvinit: Path, plain: bool) -> None:
    if plain:
        needs_root()
    secret = place / "secret"
    secret.write_text("secret")
    secret.chmod(0o666)

    def work() -> str:
        _forbid_namespaces()
        jails._probe.cache_clear()
        report = probe()
        assert report.namespaces == () and not report.own_id
        assert "namespaces" in report.lacks and "namespaces" in str(report)
        assert "Operation not permitted" in report.why and report.remedy
        said = shell("cat /proc/self/status", place, binds=[Bind(Path("/proc"), "/proc")])
        status = dict(line.split(":\t") for line in said.splitlines() if ":\t" in line)
        assert status["NoNewPrivs"] == "1" and status["Seccomp"] == "2" and int(status["CapEff"], 16) == 0, said
        said = shell(f"cat {secret} /etc/passwd; echo x > {secret}; head -c1 /dev/zero | wc -c", place)
        if report.landlock:
            assert "secret\n" not in said.replace(str(secret), "") and "root:" not in said, said
            assert secret.read_text() == "secret"
        assert "1" in said.split()
        check_network(place)
        return "done"

    in_child(work, PLAIN_UID if plain else None)


def test_descriptors_of_the_host_do_not_leak(place: Path) -> None:
    needs_namespaces()
    with open("/etc/passwd", "rb") as leak:
        os.set_inheritable(leak.fileno(), True)
        root = Path(tempfile.mkdtemp(dir=place))
        code = """
import os
for fd in range(3, 1024):
    try:
        print(fd, os.read(fd, 99).decode())
    except OSError:
        pass
"""
        reader, writer = os.pipe()
        os.write(writer, b"given")
        os.close(writer)
        argv = ["/usr/bin/python3", "-S", "-c", code]
        plan = jail(argv, binds=SYSTEM, env={}, fds={reader: 9}, root=root, slot=1, network="none")
        done = launch(plan, fds=(leak.fileno(), reader))
        os.close(reader)
    assert done.stdout == b"9 given\n", done


def test_targets_do_not_follow_links_out_of_the_root(place: Path) -> None:
    """A folder that is bound may hold a link to anywhere: a later target below it stays in the new root."""
    needs_namespaces()
    outside = place / "outside"
    outside.mkdir()
    evil = place / "evil"
    evil.mkdir()
    (evil / "way").symlink_to(outside)
    tree, data = Bind(evil, "/evil", "rw"), Bind(Path("/etc/hostname"), "/evil/way/planted")
    said = shell("ls -R /evil", place, binds=[tree, data], report=probe())
    assert os.listdir(outside) == []
    assert "operation" in said or "planted" not in said, said


def test_dev_nodes_only_where_said(place: Path) -> None:
    needs_root()
    needs_namespaces()
    devices = place / "devices"
    devices.mkdir()
    try:
        os.mknod(devices / "zero", 0o20666, os.makedev(1, 5))
    except PermissionError:
        pytest.skip("needs mknod")
    os.chmod(devices / "zero", 0o666)
    assert "Permission denied" in shell("head -c1 /devices/zero", place, binds=[Bind(devices, "/devices")])
    assert "denied" not in shell("head -c1 /devices/zero >/dev/null", place, binds=[Bind(devices, "/devices", "ro,dev")])


def test_the_plan_is_printable_and_starts_nothing(place: Path) -> None:
    report = JailReport(("mount", "pid", "net", "ipc", "uts", "cgroup"), True, 3)
    plan = jail(
        ["/q", "-S"],
        binds=[Bind(Path("/a"), "/a")],
        env={"K": "v"},
        fds={7: 3},
        root=place,
        slot=9,
        network="host",
        groups=[104],
        report=report,
    )
    lines = render(plan).splitlines()
    assert lines[0] == "namespaces mount pid ipc uts cgroup"  # the host's network was asked for
    assert "groups 104" in lines and "user 2000000009 2000000009" in lines
    assert lines[-3:] == ["env K=v", "fd 7 3", "exec /q -S"]
    assert [line for line in lines if line.startswith("landlock /a")] == ["landlock /a r"]


def test_shapes_say_what_they_lack() -> None:
    assert JailReport(("mount",), True, 1).lacks == ()
    assert JailReport((), False, 0).lacks == ("namespaces", "an id of its own", "Landlock")
    assert jails.own_id(3, JailReport((), False, 0)) is None
