"""Rules about system calls, behind each wall: what the kernel answers, what is answered outside, paths, and what a wall cannot do.

One table of programs, one answer from all walls. What a wall cannot do is no difference in the answer, but an error before
anything has run.
"""

from __future__ import annotations

import errno
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from machine_home import VmHome

from trivisor import VMM, GuestError, InvalidSpec, InvalidState, Machine, UnsupportedByWall
from trivisor.core.spec import Wall
from trivisor.launch import syscalls
from trivisor.vos.syscalls.call import Call
from trivisor.vos.syscalls.policy import Policy

Make = Callable[..., Machine]

ERRNO = """
import os
def errno_of(call, *args):
    try:
        result = call(*args)
    except OSError as error:
        return -error.errno
    return result if isinstance(result, int) else 0
"""


def python(machine: Machine, code: str, policy: Policy | None = None, **options: object) -> str:
    """Run Python in the machine and return what it printed."""
    done = machine.exec(["python3", "-c", ERRNO + code], policy=policy, timeout=60, **options)  # type: ignore[arg-type]
    assert done.ok, (done.exit_code, done.error_text)
    return done.text.strip()


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A static program that makes calls by number."""
    if shutil.which("cc") is None:
        pytest.skip("needs cc")
    made = tmp_path_factory.mktemp("raw") / "raw_call"
    source = Path(__file__).with_name("raw_call.c")
    subprocess.run(["cc", "-static", "-O1", "-Wall", "-Werror", "-D_GNU_SOURCE", "-o", str(made), str(source)], check=True, timeout=60)
    return made


def calls(machine: Machine, raw: Path, policy: Policy | None, *words: str) -> list[int]:
    """Make calls, each NAME,ARG,..., in the machine and return what they returned, or minus their errno."""
    machine.files.upload(raw, "/tmp/raw_call")
    numbered = [",".join([str(syscalls.table()[name]), *args]) for name, *args in (word.split(",") for word in words)]
    return [int(word) for word in machine.exec(["/tmp/raw_call", *numbered], policy=policy, timeout=60, check=True).text.split()]


def needs(machine: Machine, feature: str) -> None:
    """Skip, once it has been seen that the wall says itself that it cannot."""
    if feature in machine.syscalls.features:
        return
    policy = Policy()
    if feature == "notify":
        policy.fail("write", "EIO", after=1)
    elif feature == "log":
        policy.log("getppid")
    else:
        policy.paths(write=["/tmp"])
    with pytest.raises(UnsupportedByWall) as refused:
        machine.exec(["true"], policy=policy)
    assert refused.value.wall == machine.wall
    assert refused.value.machine == machine.name
    assert machine.wall not in refused.value.walls
    pytest.skip(f"the {machine.wall} wall has no {feature}, and says so")


# -- by the kernel ---------------------------------------------------------------------------------


def test_a_call_fails_with_the_errno_that_the_rule_has(running: Machine) -> None:
    assert (
        python(running, "print(errno_of(os.sync), errno_of(os.mkdir, '/tmp/rules-a'))", Policy("mkdir+mkdirat:ENOSPC"))
        == f"0 {-errno.ENOSPC}"
    )
    assert python(running, "print(errno_of(os.rmdir, '/tmp/rules-a'))") == str(-errno.ENOENT)


def test_a_call_that_returns_zero_is_not_made(running: Machine) -> None:
    policy = Policy("mkdir+mkdirat:return=0")
    assert python(running, "print(errno_of(os.mkdir, '/tmp/rules-b'), os.path.exists('/tmp/rules-b'))", policy) == "0 False"


def test_a_call_kills(running: Machine) -> None:
    done = running.exec(["python3", "-c", "import os; print(1, flush=True); os.sync(); print(2)"], policy=Policy("sync:kill"), timeout=60)
    assert (done.exit_code, done.signal, done.text) == (128 + signal.SIGSYS, signal.SIGSYS, "1\n")


def test_the_kernel_logs_and_makes_the_call(running: Machine) -> None:
    needs(running, "log")
    assert int(python(running, "print(os.getppid())", Policy("getppid:log"))) >= 0


@pytest.mark.parametrize(
    ("condition", "expected"),
    [("arg1==7", {7}), ("arg1!=7", {5, 6, 8, 1 << 33}), ("arg1<7", {5, 6}), ("arg1<=7", {5, 6, 7}), ("arg1>7", {8, 1 << 33}),
     ("arg1>=7", {7, 8, 1 << 33}), ("arg1&0x4==0x4", {5, 6, 7}), ("arg1>=0x100000000", {1 << 33})],
)  # fmt: skip
def test_conditions_on_arguments(running: Machine, condition: str, expected: set[int]) -> None:
    code = "f = os.memfd_create('f'); print(*[n for n in (5, 6, 7, 8, 1 << 33) if errno_of(os.lseek, f, n, 0) == -28])"
    assert {int(word) for word in python(running, code, Policy(f"lseek:ENOSPC,{condition}")).split()} == expected


def test_the_upper_half_of_an_int_evades_no_rule(running: Machine, raw: Path) -> None:
    policy = Policy()
    rule = policy.deny("socket", args={"domain": 2})
    assert rule.enforces
    assert calls(running, raw, policy, "socket,2,1,0", f"socket,{2 | 1 << 40},1,0") == [-errno.EPERM] * 2
    assert calls(running, raw, policy, "socket,1,1,0")[0] > 0


def test_connect_is_denied(running: Machine) -> None:
    code = "import socket; s = socket.socket(socket.AF_UNIX); print(errno_of(s.connect, '/nowhere'))"
    policy = Policy()
    policy.deny("connect")
    assert python(running, code) == str(-errno.ENOENT)
    assert python(running, code, policy) == str(-errno.EPERM)


def test_the_first_rule_that_matches_decides(running: Machine) -> None:
    policy = Policy("lseek:EIO,arg1==5", "lseek:allow,arg1<10", "lseek:ENOSPC")
    code = "f = os.memfd_create('f'); print(*[errno_of(os.lseek, f, n, 0) for n in (5, 6, 11)])"
    assert python(running, code, policy) == f"{-errno.EIO} 6 {-errno.ENOSPC}"


def test_a_policy_is_inherited_and_is_nobody_elses(running: Machine) -> None:
    policy = Policy("mkdir+mkdirat:ENOSPC")
    done = running.exec("sh -c 'mkdir /tmp/rules-c; (mkdir /tmp/rules-d) & wait'", policy=policy, timeout=60)
    assert done.error_text.count("No space left") == 2
    assert running.exec(["mkdir", "-p", "/tmp/rules-c"]).ok


def test_other_users_and_terminals_have_it_too(running: Machine) -> None:
    policy = Policy("mkdir+mkdirat:ENOSPC")
    assert python(running, "print(os.getuid(), errno_of(os.mkdir, '/tmp/rules-e'))", policy, user="nobody").endswith(f" {-errno.ENOSPC}")
    with running.spawn(["mkdir", "/tmp/rules-e"], policy=policy, pty=True) as process:
        assert process.wait(60) == 1
        assert b"No space left" in process.stdout.read()


def test_forty_rules(running: Machine) -> None:
    policy = Policy(*(f"lseek:{code},arg1=={at}" for at, code in enumerate(range(1, 41))))
    code = "f = os.memfd_create('f'); print(*[errno_of(os.lseek, f, n, 0) for n in range(42)])"
    assert python(running, code, policy) == " ".join(map(str, [*range(-1, -41, -1), 40, 41]))


def test_what_does_not_go_is_said_before_anything_runs(running: Machine) -> None:
    with pytest.raises(InvalidSpec, match="contradicts"):
        Policy("write:EIO", "write:ENOSPC")
    with pytest.raises(InvalidSpec) as refused:
        running.exec(["true"], policy=Policy("opennat:EIO"))
    assert refused.value.hint == "did you mean openat?"
    with pytest.raises(GuestError, match="no-such-user"):
        running.exec(["true"], user="no-such-user", policy=Policy("sync:EIO"))
    assert running.exec(["no-such-program"], policy=Policy("sync:EIO")).exit_code == 127


# -- outside of the program ------------------------------------------------------------------------


def test_faults_by_path_and_count(running: Machine) -> None:
    needs(running, "notify")
    code = """
os.makedirs('/tmp/rules-f', exist_ok=True)
inside, beside = (os.open(p, os.O_WRONLY | os.O_CREAT) for p in ('/tmp/rules-f/in', '/tmp/rules-beside'))
print(*[errno_of(os.write, inside, b'x') for _ in range(9)], *[errno_of(os.write, beside, b'x') for _ in range(3)])
"""
    policy = Policy("write:ENOSPC,path=/tmp/rules-f/*,after=2,every=3,times=2")
    assert python(running, code, policy) == " ".join(map(str, [1, 1, -28, 1, 1, -28, 1, 1, 1, 1, 1, 1]))
    assert not policy.rules[0].enforces


def test_paths_of_opens_are_made_absolute_by_their_words(running: Machine) -> None:
    needs(running, "notify")
    code = """
os.chdir('/etc')
folder = os.open('/etc', os.O_RDONLY)
print(*[errno_of(os.open, path, os.O_RDONLY, 0) < 0 for path in ('/etc/passwd', 'passwd', '../etc/./passwd', '/etc/group')],
      errno_of(lambda: os.open('passwd', os.O_RDONLY, dir_fd=folder)) < 0)
"""
    assert python(running, code, Policy("open+openat:EACCES,path=/etc/passwd")) == "True True True False True"


def test_calls_of_one_rule_count_together(running: Machine) -> None:
    needs(running, "notify")
    policy = Policy("write+pwrite64+access+faccessat:EIO,path=/dev/null,after=2,times=2")
    code = """
f = os.open('/dev/null', os.O_WRONLY)
print(errno_of(os.write, f, b'x'), errno_of(os.pwrite, f, b'x', 0), os.access('/dev/null', 0),
      errno_of(os.write, f, b'x'), os.access('/dev/null', 0))
"""
    assert python(running, code, policy) == f"1 1 False {-errno.EIO} True"


def test_a_value_is_returned(running: Machine) -> None:
    needs(running, "notify")
    assert python(running, "print(os.getppid())", Policy("getppid:return=4711")) == "4711"


def test_a_delay_only_delays(running: Machine) -> None:
    needs(running, "notify")
    code = "import time; t = time.monotonic(); os.sync(); print(time.monotonic() - t > 0.3)"
    assert python(running, code, Policy("sync:delay=0.4s")) == "True"


def test_the_same_seed_gives_the_same_draws(running: Machine) -> None:
    needs(running, "notify")
    code = "f = os.memfd_create('f'); print(''.join('x' if errno_of(os.lseek, f, n, 0) < 0 else '.' for n in range(64)))"
    first, again, other = (python(running, code, Policy(f"lseek:EIO,probability=0.5,seed={seed}")) for seed in (1, 1, 2))
    assert first == again != other
    assert 12 < first.count("x") < 52


def test_what_a_rule_outside_does_not_take_goes_on_to_the_next(running: Machine) -> None:
    needs(running, "notify")
    policy = Policy("ftruncate:EIO,after=1,times=1", "ftruncate:ENOSPC,arg1>=3")
    code = "f = os.memfd_create('f'); print(*[errno_of(os.ftruncate, f, n) for n in range(5)])"
    assert python(running, code, policy) == f"0 {-errno.EIO} 0 {-errno.ENOSPC} {-errno.ENOSPC}"


@pytest.mark.walls("container")
def test_what_the_profile_refuses_is_refused_though_a_rule_names_it(running: Machine, raw: Path) -> None:
    policy = Policy("mount:delay=10ms", "unshare:EIO,times=1")
    words = ("mount,0,0,0,0,0", *["unshare,0x10000000"] * 3)
    assert calls(running, raw, policy, *words) == [-errno.EPERM, -errno.EIO, -errno.EPERM, -errno.EPERM]
    assert calls(running, raw, None, *words) == [-errno.EPERM] * 4


# -- paths -----------------------------------------------------------------------------------------


def test_files_are_written_only_under_one_folder(running: Machine) -> None:
    needs(running, "landlock")
    running.exec("mkdir -p /tmp/rules-in; rm -rf /tmp/rules-in/* /tmp/rules-out; ln -s /tmp /tmp/rules-in/up", check=True)
    code = """
def made(path): return errno_of(os.open, path, os.O_WRONLY | os.O_CREAT, 0o644) > 0
print(made('/tmp/rules-in/a'), made('/tmp/rules-out'), made('/tmp/rules-in/up/rules-out'), made('/tmp/rules-in/../rules-out'),
      made('/dev/null'), errno_of(os.mkdir, '/tmp/rules-dir'),
      errno_of(os.rename, '/tmp/rules-in/a', '/tmp/rules-out'), errno_of(os.unlink, '/etc/passwd'),
      len(open('/etc/passwd').read()) > 0)
"""
    policy = Policy()
    policy.paths(write=["/tmp/rules-in"])
    opened, outside, link, dots, null, mkdir, rename, unlink, read = python(running, code, policy).split()
    assert (opened, outside, link, dots, null, read) == ("True", "False", "False", "False", "True", "True")
    assert {int(mkdir), int(unlink)} == {-errno.EACCES}
    assert int(rename) in (-errno.EACCES, -errno.EXDEV)
    assert running.exec("touch /tmp/rules-out && rm /tmp/rules-out").ok


def test_programs_are_executed_only_from_where_it_is_allowed(running: Machine) -> None:
    needs(running, "landlock")
    running.exec("cp /bin/true /tmp/rules-true", check=True)
    policy = Policy()
    policy.paths(execute=["/usr", "/bin", "/lib"])
    assert running.exec(["/bin/true"], policy=policy).ok
    assert not running.exec("/tmp/rules-true", policy=policy).ok
    assert running.exec("/tmp/rules-true").ok


def test_files_are_read_only_where_it_is_allowed(running: Machine) -> None:
    needs(running, "landlock")
    code = (
        "print(*[errno_of(lambda: len(open(path, 'rb').read(1)) and 0) for path in ('/etc/passwd', '/usr/bin/env', '/etc/../etc/passwd')])"
    )
    policy = Policy()
    policy.paths(read=["/usr", "/lib", "/lib64", "/bin", "/proc"])
    assert python(running, code, policy) == f"{-errno.EACCES} 0 {-errno.EACCES}"
    assert python(running, "print(errno_of(os.unlink, '/tmp/rules-no') == -2, os.path.exists('/etc/passwd'))", policy) == "True True"


def test_an_open_on_behalf_is_bound_by_the_paths_too(running: Machine) -> None:
    needs(running, "notify")
    needs(running, "landlock")
    running.exec("mkdir -p /tmp/rules-in && rm -f /tmp/rules-out /tmp/rules-in/b", check=True)
    policy = Policy()
    policy.paths(write=["/tmp/rules-in"])

    @policy.on("open", "openat", enforces=True)
    def opened(call: Call) -> None:
        call.open()

    code = "print(*[errno_of(os.open, path, os.O_WRONLY | os.O_CREAT) > 0 for path in ('/tmp/rules-in/b', '/tmp/rules-out')])"
    assert python(running, code, policy) == "True False"
    assert not running.files.exists("/tmp/rules-out")


# -- handlers --------------------------------------------------------------------------------------


def test_handlers_of_a_machine_answer_the_commands_of_this_process(wall_vmm: VMM, wall: Wall) -> None:
    seen: list[str] = []
    policy = Policy("mkdir+mkdirat:ENOSPC")

    @policy.on("getppid")
    def parent(call: Call) -> None:
        seen.append(call.name)
        call.returns(4711)

    if wall == "gvisor":
        with pytest.raises(UnsupportedByWall):
            wall_vmm.create("debian", wall=wall, syscalls=policy)
        return
    machine = wall_vmm.create("debian", wall=wall, syscalls=policy)
    machine.start()
    assert machine.spec.syscalls == policy.spec
    code = "print(os.getppid(), errno_of(os.mkdir, '/tmp/rules-i'))"
    assert python(machine, code) == python(wall_vmm.get(machine.id), code) == f"4711 {-errno.ENOSPC}"
    assert python(machine, code, Policy("getpid:EPERM")) == f"4711 {-errno.ENOSPC}"
    assert seen == ["getppid"] * 3
    machine.stop()
    machine.start()
    assert python(machine, code) == f"4711 {-errno.ENOSPC}"
    with pytest.raises(InvalidState):
        machine.delete()
    assert python(machine, code) == f"4711 {-errno.ENOSPC}"  # it is still there, and so are they
    machine.syscalls.use(None)
    assert python(machine, code) != f"4711 {-errno.ENOSPC}"
    machine.delete(force=True)


def test_a_handler_answers_what_no_rule_takes(running: Machine) -> None:
    needs(running, "notify")
    policy = Policy("getppid:return=1,times=1", "getppid:return=2,after=1,times=1")

    @policy.on("getppid")
    def parent(call: Call) -> None:
        call.returns(3)

    assert python(running, "print(*[os.getppid() for _ in range(5)])", policy) == "1 3 2 3 3"


def test_a_command_that_cannot_start_is_told_apart_from_handlers_that_cannot(running: Machine) -> None:
    needs(running, "notify")
    policy = Policy()
    policy.on("getppid")(lambda call: call.returns(1))
    with pytest.raises(GuestError, match="no-such-user"):
        running.exec(["true"], user="no-such-user", policy=policy)
    assert running.exec(["no-such-program"], policy=policy).exit_code == 127
    assert running.exec(["true"], policy=policy).ok


def test_commands_that_end_before_their_handlers_come_leave_nothing_that_waits(running: Machine) -> None:
    needs(running, "notify")
    policy = Policy()
    policy.on("getppid")(lambda call: call.returns(1))
    before = set(threading.enumerate())
    for _ in range(20):
        assert running.exec(["true"], policy=policy).ok
    deadline = time.monotonic() + 30
    while any(thread.name.startswith("handlers of") for thread in set(threading.enumerate()) - before):
        assert time.monotonic() < deadline
        time.sleep(0.02)  # Python tells nobody of a thread's end but who joins it


# -- the machine's own -----------------------------------------------------------------------------

ELSEWHERE = """
import sys
from trivisor import VMM
with VMM(sys.argv[1]) as vmm:
    done = vmm.get(sys.argv[2]).exec(["mkdir", "/tmp/rules-g"], timeout=60)
    print(done.exit_code, done.error_text.strip())
"""


def test_rules_of_the_machine_hold_for_everybody_and_in_its_next_life(wall_home: VmHome, wall_vmm: VMM, wall: Wall, make: Make) -> None:
    machine = make(syscalls=["mkdir+mkdirat:ENOSPC"])
    code = "f = os.memfd_create('f'); print(errno_of(os.mkdir, '/tmp/rules-g'), errno_of(os.lseek, f, 7, 0))"
    assert python(machine, code) == f"{-errno.ENOSPC} 7"
    assert python(machine, code, Policy("lseek:EIO")) == f"{-errno.ENOSPC} {-errno.EIO}"
    with pytest.raises(InvalidSpec, match="contradicts"):
        machine.exec(["true"], policy=Policy("mkdir:EIO"))
    elsewhere = [sys.executable, "-c", ELSEWHERE, str(wall_home.root), machine.name]
    said = subprocess.run(elsewhere, capture_output=True, text=True, timeout=120, check=True).stdout
    assert said.startswith("1 ") and "No space left" in said
    machine.stop()
    assert wall_vmm.get(machine.id).spec.syscalls == machine.spec.syscalls
    machine.start()
    assert "No space left" in machine.exec(["mkdir", "/tmp/rules-g"], timeout=60).error_text
    machine.files.mkdir("/tmp/rules-h")  # the machine's own file operations are no commands
    machine.delete(force=True)


def test_what_the_wall_cannot_do_makes_no_machine(wall_vmm: VMM, wall: Wall) -> None:
    before = {machine.id for machine in wall_vmm.list()}
    with pytest.raises(InvalidSpec, match="opennat"):
        wall_vmm.create("debian", wall=wall, syscalls=["opennat:EIO"])
    if wall == "gvisor":
        for wish in (["write:EIO,path=/data/*"], ["write:EIO,after=3"], ["getpid:return=7"], ["read:delay=1s"], ["sync:log"]):
            with pytest.raises(UnsupportedByWall):
                wall_vmm.create("debian", wall=wall, syscalls=wish)
    assert {machine.id for machine in wall_vmm.list()} == before
