"""Policies: what is refused and why, what enforces, and the operations that a command's policy becomes."""

from __future__ import annotations

import errno
from pathlib import Path

import msgspec
import pytest

from trivisor.core import rules as core
from trivisor.core import spec as specs
from trivisor.core.errors import InvalidSpec, UnsupportedByWall
from trivisor.core.rules import Condition, Paths, Rule, SyscallSpec, parse
from trivisor.core.spec import Spec
from trivisor.launch import seccomp, syscalls
from trivisor.vos.ports import FEATURES, SyscallPort
from trivisor.vos.syscalls.compile import Compiled, compile_exec, path_argument, width
from trivisor.vos.syscalls.policy import Policy
from trivisor.vos.syscalls.service import Held, Syscalls

CONTAINER = SyscallPort("container", frozenset(FEATURES), seccomp.CONTAINER, answer=Path("/nowhere"), machine="x86_64")
VM = SyscallPort("vm", frozenset(FEATURES), seccomp.OPEN, machine="x86_64")
GVISOR = SyscallPort("gvisor", frozenset({"kernel", "trace", "no-vdso"}), seccomp.OPEN, machine="x86_64")
NR = syscalls.SYSCALLS["x86_64"]


def handler(call: object) -> None:
    """Answers nothing."""


def compiled(policy: Policy | None, spec: SyscallSpec | None = None, port: SyscallPort = CONTAINER) -> Compiled:
    made = compile_exec(port, spec, policy, "m")
    assert made is not None
    return made


def said(made: Compiled, name: str) -> list[tuple[str, ...]]:
    return [operation[1:] for operation in made.operations if operation[0] == name]


# -- what is written -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "write:ENOSPC,path=/data/*,after=5,every=3",
        "write+pwrite64:EIO,arg0==1,arg2>=4096,times=2",
        "ioctl:EPERM,arg1&0xff==0x12",
        "getpid:return=-7",
        "openat:delay=0.25s,path=*.so",
        "connect:kill",
        "getrandom:log",
        "socket:allow,arg0==2",
        "fsync:EIO,delay=1s,probability=0.5,seed=7",
        "write+pwrite64:tear=100,errno=EIO,path=/data/*,times=1",
        "write:tear=0",
    ],
)
def test_rules_are_written_as_they_are_read(text: str) -> None:
    rule = parse(text)
    assert str(rule) == text
    assert parse(str(rule)) == rule
    assert msgspec.json.decode(msgspec.json.encode(rule), type=Rule) == rule


@pytest.mark.parametrize(
    "text",
    ["write", "write:", ":EIO", "write:ENOPE", "write:EIO,after=x", "write:EIO,arg6=1", "write:EIO,what=1", "write:EIO,path=relative",
     "write:return=x", "write:EIO,probability=0", "write:EIO,every=0", "write:delay=0s", "write:kill,delay=1s", "write:EIO,arg0&1==2",
     "write:EIO,after=1,after=2", "read:tear=1", "write:tear=65537", "Write:EIO", "write:delay=2h"],
)  # fmt: skip
def test_what_is_no_rule_is_refused_with_a_hint_or_a_reason(text: str) -> None:
    with pytest.raises(InvalidSpec):
        parse(text)


def test_a_seed_is_drawn_once_and_kept() -> None:
    rule = Policy().fail("write", "EIO", probability=0.5)
    assert parse(str(rule)) == rule


def test_conditions_are_written_in_many_ways() -> None:
    made = core.conditions({0: 3, 1: (">=", 5), 2: ("==", 1, 3), 3: "!= 0x10", 4: -1, 5: ["> 1", "< 9"]})
    assert made == (
        Condition(0, "==", 3),
        Condition(1, ">=", 5),
        Condition(2, "==", 1, 3),
        Condition(3, "!=", 16),
        Condition(4, "==", 0xFFFFFFFF, 0xFFFFFFFF),
        Condition(5, ">", 1),
        Condition(5, "<", 9),
    )
    for wrong in ({6: 1}, {True: 1}, {0: "x"}, {0: None}, {0: 2**64}, "0=1", {0: ("~", 1)}):
        with pytest.raises(InvalidSpec):
            core.conditions(wrong)


# -- what is refused -------------------------------------------------------------------------------


def test_names_of_no_call_are_refused_with_the_nearest() -> None:
    policy = Policy()
    for wrong in (
        lambda: policy.deny("conect"),
        lambda: policy.on("conect")(handler),
        lambda: policy.trace("conect"),
        lambda: Policy("conect:EIO"),
        lambda: compile_exec(VM, SyscallSpec(rules=(Rule(calls=("conect",), action="kill"),)), None),
    ):
        with pytest.raises(InvalidSpec, match="conect") as refused:
            wrong()
        assert refused.value.hint == "did you mean connect?"


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("write:EIO", "write:ENOSPC"),
        ("write:EIO", "write:ENOSPC,path=/data/*,after=5"),
        ("write+read:EIO", "fsync+read:kill"),
        ("write:EIO,arg0>2", "write:kill,arg0==7"),
        ("write:EIO,arg0>=2", "write:kill,arg0>5"),
        ("write:EIO,arg0!=2", "write:kill,arg0==1,arg1==5"),
        ("write:EIO,arg0&0x1==0x1", "write:kill,arg0==3"),
        ("write:EIO,path=/data/*", "write:ENOSPC,path=/data/*,after=1"),
        ("write:delay=1s", "write:EIO,after=3"),
        ("write:allow", "write:EIO"),
    ],
)
def test_a_rule_that_could_never_be_asked_is_refused_and_both_are_named(first: str, second: str) -> None:
    with pytest.raises(InvalidSpec) as refused:
        Policy(first, second)
    assert first in str(refused.value)
    assert second in str(refused.value)
    # The same between a machine's rules and a command's.
    with pytest.raises(InvalidSpec, match="contradicts"):
        compile_exec(VM, Policy(first).spec, Policy(second))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("write:EIO", "write:EIO,arg0==1"),  # says nothing else
        ("write:EIO,after=5", "write:ENOSPC"),
        ("write:EIO,arg0==1", "write:ENOSPC"),
        ("write:EIO,arg0==1", "write:ENOSPC,arg0==2"),
        ("write:EIO,arg0<5", "write:kill,arg0<9"),
        ("write:EIO,path=/data/*", "write:ENOSPC"),
        ("write:EIO,times=2", "write:kill,after=1"),
        ("write:EIO", "read:kill"),
    ],
)
def test_rules_that_both_have_their_turn_are_taken(first: str, second: str) -> None:
    assert len(Policy(first, second).rules) == 2


def test_handlers_contradict_rules_that_take_all_and_each_other() -> None:
    policy = Policy("openat:EIO")
    with pytest.raises(InvalidSpec, match="handler handler of openat contradicts openat:EIO"):
        policy.on("openat")(handler)
    policy.on("connect", "bind")(handler)
    with pytest.raises(InvalidSpec, match="handler handler of bind contradicts handler handler of connect"):
        policy.on("bind")(handler)
    with pytest.raises(InvalidSpec, match="contradicts"):
        policy.deny("connect")
    assert policy.deny("connect", args={"addrlen": 16})
    for wrong in ({"timeout": 0}, {"timeout": float("nan")}, {"timeout": "1"}):
        with pytest.raises(InvalidSpec):
            policy.on("read", **wrong)
    with pytest.raises(InvalidSpec):
        policy.on()


def test_allow_and_deny_by_path_would_pretend() -> None:
    policy = Policy()
    for refused in (lambda: policy.deny("openat", path="/etc/*"), lambda: policy.allow("openat", path="/etc/*")):
        with pytest.raises(InvalidSpec, match="pretend") as error:
            refused()
        assert "paths(" in error.value.hint
    with pytest.raises(InvalidSpec, match="pretend"):
        parse("openat:allow,path=/etc/*")


def test_rules_say_whether_they_enforce() -> None:
    policy = Policy()
    assert policy.deny("connect").enforces
    assert policy.errno("socket", "EACCES", args={"domain": 2}).enforces
    assert policy.returns("fsync", 0).enforces
    assert policy.returns("getpid", 7).enforces
    assert policy.kill("ptrace").enforces
    assert not policy.fail("openat", "EIO", path="/data/*").enforces
    assert not policy.fail("write", "EIO", after=5).enforces
    assert not policy.delay("read", 0.1).enforces
    assert not policy.log("getrandom").enforces
    assert not policy.allow("sync").enforces


def test_arguments_go_by_the_name_in_the_man_page() -> None:
    assert Policy().deny("openat", args={"flags": "&0x40 == 0x40"}).args == (Condition(2, "==", 0x40, 0x40),)
    assert Policy().deny(["write", "pwrite64"], args={"fd": 1}).args == (Condition(0, "==", 1),)
    with pytest.raises(InvalidSpec, match="no argument 'flag'") as refused:
        Policy().deny("openat", args={"flag": 1})
    assert "flags" in refused.value.hint
    with pytest.raises(InvalidSpec, match="not the same"):
        Policy().deny(["open", "openat"], args={"flags": 1})


def test_paths_are_places() -> None:
    policy = Policy()
    assert policy.paths(write=["/build/", "/tmp"], read="/") == Paths(write=("/build", "/tmp"), read=("/",))
    with pytest.raises(InvalidSpec, match="contradict"):
        policy.paths(write=["/other"])
    for wrong in ("relative", "/a/../b", "/data/*", "/\0", "/" + "x" * 2000):
        with pytest.raises(InvalidSpec):
            Policy().paths(read=wrong)


# -- what it becomes -------------------------------------------------------------------------------


def test_what_the_kernel_can_answer_takes_no_listener() -> None:
    policy = Policy("connect:EACCES", "fsync:return=0", "ptrace:kill", "getrandom:log", "write:ENOSPC,arg0==1")
    made = compiled(policy)
    assert [operation[0] for operation in made.operations] == ["seccomp"]
    assert not made.token
    assert compile_exec(CONTAINER, None, None) is None
    assert compile_exec(CONTAINER, None, Policy()) is None


def test_what_counts_waits_or_has_a_path_is_answered_outside_with_what_comes_behind_it() -> None:
    policy = Policy("write:kill,arg0==9", "write:ENOSPC,path=/data/*,after=5,every=3,times=2", "write:EIO,arg0==1", "getpid:return=7")
    policy.delay(["open", "openat"], 0.5, path="*.so")
    policy.fail("read", "EIO", probability=0.25, seed=3)
    made = compiled(policy)
    assert len(made.token) == 16
    assert said(made, "token") == [(made.token.hex(),)]
    low = 0xFFFFFFFF
    assert said(made, "rule") == [
        ("2", "1", "errno=28", "path=/data/*", "on=0f", "after=5", "every=3", "times=2"),
        ("3", "1", "errno=5", f"arg=0:==:1:{low}"),
        ("4", "39", "return=7"),
        ("5", "2", "continue", "delay=500000000", "path=*.so", "on=0p"),
        ("5", "257", "continue", "delay=500000000", "path=*.so", "on=1p"),
        ("6", "0", "errno=5", f"probability={1 << 30}", "seed=3"),
    ]
    assert compiled(policy).token != made.token


def test_ints_are_compared_as_the_kernel_reads_them() -> None:
    """Of an int argument the upper half of the register is the program's to fill: a rule must not be evaded by it."""
    assert width("socket", 0) == width("ioctl", 1) == width("openat", 2) == 32
    assert width("write", 2) == width("write", 1) == width("prctl", 1) == width("lseek", 1) == 64
    program = bytes.fromhex(said(compiled(Policy().spec and Policy("socket:EACCES,arg0==2"), port=VM), "seccomp")[0][0])
    from test_seccomp_policy import verdict

    assert verdict(program, "socket", 2) == verdict(program, "socket", 2 | 1 << 40) == seccomp.refuse(errno.EACCES)
    assert verdict(program, "socket", 1) == seccomp.ALLOW
    with pytest.raises(InvalidSpec, match="32 bits"):
        compiled(Policy("socket:EACCES,arg0==0x100000002"))


def test_a_call_that_the_profile_refuses_is_never_made() -> None:
    policy = Policy()
    policy.delay("mount", 0.1)
    policy.fail("setns", "EIO", after=1)
    policy.on("umount2")(handler)
    made = compiled(policy)
    assert ("1", "165", f"errno={errno.EPERM}", "delay=100000000") in said(made, "rule")
    assert said(made, "rule")[-2:] == [("0", "165", f"errno={errno.EPERM}"), ("0", "308", f"errno={errno.EPERM}")]
    assert made.refused == {NR["umount2"]: errno.EPERM}
    assert compiled(policy, port=VM).refused == {}
    for text in ("mount:allow", "mount:log"):
        with pytest.raises(InvalidSpec, match="refuses mount"):
            compiled(Policy(text))
        assert compiled(Policy(text), port=VM)
    from test_seccomp_policy import verdict

    policy = Policy()
    policy.on("socket", "clone")(handler)
    program = bytes.fromhex(said(compiled(policy), "seccomp")[0][0])
    assert verdict(program, "socket", 2) == seccomp.NOTIFY
    assert verdict(program, "socket", 40) == seccomp.refuse(errno.EPERM)  # what it refuses by its arguments cannot be proceeded with
    assert verdict(program, "clone", 0x10000000) == seccomp.refuse(errno.EPERM)


def test_handlers_get_what_no_rule_decides() -> None:
    policy = Policy("openat:EIO,path=/data/*", "openat:kill,arg0==3", "read:delay=1s")
    policy.on("openat", "connect")(handler)
    made = compiled(policy)
    assert said(made, "handler") == [(f"{NR['connect']},{NR['openat']}",)]
    assert made.ruled == {NR["openat"]}
    assert made.policy is policy
    assert [words[1] for words in said(made, "rule")] == ["257", "257", "0"]


def test_a_path_needs_a_call_that_has_one() -> None:
    assert path_argument("openat") == "1p"
    assert path_argument("write") == "0f"
    assert path_argument("symlinkat") == "2p"
    assert path_argument("getpid") is None
    with pytest.raises(InvalidSpec, match="getpid is given no path"):
        compiled(Policy("getpid:EIO,path=/data/*"))


def test_paths_become_one_ruleset_of_what_machine_and_command_both_allow() -> None:
    spec = SyscallSpec(paths=Paths(write=("/build/out", "/tmp")))
    policy = Policy()
    policy.paths(write=["/build"], execute=["/usr"])
    places = dict(said(compiled(policy, spec), "landlock"))
    assert places.pop("/") == "r"
    assert places.pop("/usr") == "x"
    assert places.pop("/build/out") == "w"
    assert set(places.values()) == {"w"}
    assert all(place.startswith("/dev/") for place in places)
    nothing = Policy()
    nothing.paths(execute=[])
    assert said(compiled(nothing), "landlock") == [("/", "rw")]
    all_denied = Policy(paths=Paths(read=(), write=(), execute=()))
    assert {letters for _, letters in said(compiled(all_denied), "landlock")} == {"rw"}  # /dev/null and the like


def test_where_reads_are_bound_executing_is_too() -> None:
    """Executing takes reading, so that `x` on all files would let all be read."""
    places = dict(said(compiled(Policy(paths=Paths(read=("/usr", "/data")))), "landlock"))
    assert places["/usr"] == places["/data"] == "rx"
    assert places["/"] == "w"
    # Nor does what a command may execute widen what the machine lets it read.
    spec = SyscallSpec(paths=Paths(read=("/data",)))
    places = dict(said(compiled(Policy(paths=Paths(execute=("/usr",))), spec), "landlock"))
    assert "/usr" not in places
    assert places["/data"] == "r"


def test_a_command_cannot_lead_out_of_the_machines_places_by_a_link() -> None:
    spec = SyscallSpec(paths=Paths(write=("/data",)))
    with pytest.raises(InvalidSpec, match="could be a link") as refused:
        compiled(Policy(paths=Paths(write=("/data/out",))), spec)
    assert "/data/out" in str(refused.value)
    assert "paths(write=['/data'])" in str(refused.value)
    assert dict(said(compiled(Policy(paths=Paths(write=("/data",))), spec), "landlock"))["/data"] == "w"
    assert "/etc" not in dict(said(compiled(Policy(paths=Paths(write=("/etc",))), spec), "landlock"))
    assert dict(said(compiled(Policy(paths=Paths(write=("/a",))), SyscallSpec(paths=Paths(write=("/",)))), "landlock"))["/a"] == "w"


def test_a_trace_stops_in_the_filter_only_where_nothing_else_is_done_with_its_calls() -> None:
    policy = Policy("write:EIO")
    policy.trace("openat", "execve", no_vdso=True)
    made = compiled(policy)
    assert said(made, "trace") == [("filter", "bytes=64", f"{NR['execve']}:0s,1v", f"{NR['openat']}:1s")]
    assert said(made, "no-vdso") == [()]
    policy.trace("openat", "write")
    assert said(compiled(policy), "trace")[0][0] == "stops"
    policy.trace("openat", "mount")  # refused calls are to be seen, too
    assert said(compiled(policy), "trace")[0][0] == "stops"
    policy.trace("openat", "prctl")  # which is called before the tracer is there
    assert said(compiled(policy), "trace")[0][0] == "stops"
    policy.trace(buffer=9)
    assert said(compiled(policy), "trace")[0][:2] == ("all", "bytes=9")


def test_what_a_wall_cannot_do_is_an_error_that_names_those_that_can() -> None:
    for rule in ("write:EIO,path=/data/*", "write:EIO,after=1", "getpid:return=7", "read:delay=1s"):
        with pytest.raises(UnsupportedByWall) as refused:
            compile_exec(GVISOR, None, Policy(rule), "m")
        assert refused.value.walls == ("container", "vm")
        assert refused.value.machine == "m"
    landlocked = Policy()
    landlocked.paths(write=["/build"])
    handled = Policy()
    handled.on("openat")(handler)
    for policy in (landlocked, handled, Policy("write:log")):
        with pytest.raises(UnsupportedByWall):
            compile_exec(GVISOR, None, policy)
    assert compile_exec(GVISOR, None, Policy("write:EIO,arg0==1", "fsync:return=0", "ptrace:kill"))


# -- kept with a machine ---------------------------------------------------------------------------


def test_a_spec_keeps_rules_and_records_from_before_have_none() -> None:
    policy = Policy("write:ENOSPC,path=/data/*,after=5", "connect:EACCES,arg2>=16")
    policy.paths(write=["/data"])
    for wish in (policy, [*policy.rules, policy.places], ["write:ENOSPC,path=/data/*,after=5", "connect:EACCES,arg2>=16", policy.places]):
        spec = Spec.make(image="debian", name="m", wall="container", syscalls=wish)
        assert spec.syscalls == policy.spec
        assert specs.decode(specs.encode(spec)) == spec
    assert Spec.make(image="debian", name="m", wall="container", syscalls=Policy()).syscalls is None
    old = msgspec.to_builtins(Spec.make(image="debian", name="m", wall="container"))
    del old["syscalls"]
    assert specs.decode(msgspec.json.encode(old)).syscalls is None
    for wrong in (7, ["write"], [7], {"rules": [{"calls": ["write"], "action": "sing"}]}, [Paths(read=("/",)), Paths(read=("/a",))]):
        with pytest.raises(InvalidSpec):
            Spec.make(image="debian", name="m", wall="container", syscalls=wrong)


def test_what_this_process_holds_goes_with_each_command() -> None:
    spec = SyscallSpec(rules=(parse("connect:EACCES"),))
    service = Syscalls("m", spec, lambda: CONTAINER, Held(), lambda compiled: pytest.fail("attached"), lambda: pytest.fail("traced"))
    assert [operation[0] for operation in service.compiled().operations] == ["seccomp"]  # type: ignore[union-attr]
    policy = Policy()
    policy.on("openat")(handler)
    service.use(policy)
    assert len(service.handlers) == 1
    made = service.compiled(Policy("read:EIO,after=1"))
    assert made is not None
    assert said(made, "handler") == [("257",)]
    assert [words[1] for words in said(made, "rule")] == ["0"]
    with pytest.raises(InvalidSpec, match="contradicts"):
        service.compiled(policy)
    with pytest.raises(InvalidSpec, match="contradicts"):
        service.use(Policy("connect:EIO"))
    service.use(None)
    assert service.handlers == ()
    with pytest.raises(InvalidSpec, match="must be a Policy"):
        service.compiled("write:EIO")  # type: ignore[arg-type]
