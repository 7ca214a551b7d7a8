"""Plans: what Python writes is what tvinit reads, and what tvinit refuses it refuses before it does anything."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from launch_support import launch

from trivisor.core.errors import InvalidSpec
from trivisor.launch.plan import MAX, Plan, encode, render

words = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)
plans = st.lists(st.lists(words, min_size=1, max_size=5).map(tuple), max_size=8).map(tuple)


def decode(data: bytes) -> Plan:
    at = 0

    def number() -> int:
        nonlocal at
        at += 4
        return int(struct.unpack_from("<I", data, at - 4)[0])

    def text() -> str:
        nonlocal at
        size = number()
        at += size
        return data[at - size : at].decode()

    plan = tuple(tuple(text() for _ in range(number())) for _ in range(number()))
    assert at == len(data)
    return plan


@given(plans)
def test_every_plan_comes_back(plan: Plan) -> None:
    assert decode(encode(plan)) == plan


def test_tvinit_reads_the_same_words() -> None:
    odd = ("", " ", "a b", "\n", "ü", "\udcff", "%s", "-n", "'\"\\$x")
    done = launch((("exec", "/usr/bin/printf", "%s|", *odd),))
    assert done.stdout == "".join(f"{word}|" for word in odd).encode(errors="surrogateescape")
    assert done.returncode == 0


def test_what_no_plan_can_hold_is_refused() -> None:
    with pytest.raises(InvalidSpec, match="NUL"):
        encode((("exec", "a\0b"),))
    with pytest.raises(InvalidSpec, match="more than"):
        encode((("exec", "x" * MAX),))
    assert len(encode((("exec", "x" * (MAX - 20)),))) <= MAX


def test_render_quotes_and_shortens() -> None:
    text = render((("bind", "/a b", "/c", "ro"), ("seccomp", "20" * 500), ("exec", "/bin/true")))
    assert text.splitlines()[0] == "bind '/a b' /c ro"
    assert "(1000)" in text
    assert len(text.splitlines()) == 3


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        ((), "does not end in exec"),
        ((("caps",), ("user", "0", "0"), ("exec", "/bin/true")), "out of order"),
        ((("explode",), ("exec", "/bin/true")), "not known"),
        ((("namespaces", "moon"), ("exec", "/bin/true")), "not known"),
        ((("chdir", "/nowhere/at/all"), ("exec", "/bin/true")), "operation 1 (chdir /nowhere/at/all): No such file"),
        ((("exec", "/nowhere/at/all"),), "operation 1 (exec /nowhere/at/all): No such file"),
        ((("exec", "/etc/passwd"),), "Permission denied"),
        ((("fd", "77", "3"), ("exec", "/bin/true")), "Bad file descriptor"),
        ((("seccomp", "zz"), ("exec", "/bin/true")), "operation 1 (seccomp): Invalid"),
        ((("rlimit", "core", "many", "0"), ("exec", "/bin/true")), "Invalid argument"),
    ],
)
def test_a_failure_names_its_operation(plan: Plan, says: str) -> None:
    done = launch(plan)
    assert done.returncode == 125
    assert says in done.stderr.decode()
    assert done.stderr.endswith(b"\n")


def test_the_program_gets_only_its_environment_and_descriptors() -> None:
    done = launch((("env", "A=b", "C=d"), ("fd", "1", "7"), ("exec", "/bin/sh", "-c", "env; echo fds /proc/self/fd/*")))
    assert b"A=b\n" in done.stdout
    assert b"HOME" not in done.stdout
    shown = done.stdout.decode().rpartition("fds ")[2].split()
    assert {fd.rpartition("/")[2] for fd in shown} <= {"0", "1", "2", "7", "3"}  # 3: the shell reads the folder through it


def test_descriptors_may_change_places() -> None:
    # 1 to 2 and 2 to 1: each is needed after the other was overwritten.
    done = launch((("fd", "1", "2"), ("fd", "2", "1"), ("exec", "/bin/sh", "-c", "echo out; echo err >&2")))
    assert (done.stdout, done.stderr) == (b"err\n", b"out\n")


def test_status_and_signal_pass_through() -> None:
    assert launch((("exec", "/bin/sh", "-c", "exit 7"),)).returncode == 7
    assert launch((("exec", "/bin/sh", "-c", "kill -9 $$"),)).returncode == -9
