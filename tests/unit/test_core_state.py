"""The table of verbs and states, and the error that its guard raises."""

from __future__ import annotations

import pytest

from trivisor.core import errors
from trivisor.core.errors import InvalidState, TrivisorError
from trivisor.core.process import Who, start_time
from trivisor.core.state import LEGAL, State, check


@pytest.mark.parametrize("verb", LEGAL)
@pytest.mark.parametrize("state", State)
def test_guard_follows_the_table(verb: str, state: State) -> None:
    if state in LEGAL[verb]:
        check("web", state, verb)
        return
    with pytest.raises(InvalidState) as caught:
        check("web", state, verb)
    assert (caught.value.machine, caught.value.state, caught.value.verb) == ("web", state, verb)
    assert caught.value.legal == tuple(legal.value for legal in LEGAL[verb])
    assert all(legal in caught.value.hint for legal in caught.value.legal)


def test_every_state_can_be_left() -> None:
    for state in State:
        assert any(state in legal for legal in LEGAL.values()), state


def test_the_tree_of_errors_is_the_one_that_is_drawn() -> None:
    drawn = {
        line.split()[1 + line.split().index("├──") if "├──" in line else line.split().index("└──") + 1]
        for line in (errors.__doc__ or "").splitlines()
        if "──" in line
    }
    defined = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, TrivisorError)}
    assert drawn | {"TrivisorError"} == defined


def test_errors_name_the_machine_once() -> None:
    assert str(TrivisorError("it broke", machine="web")) == "web: it broke"
    assert str(TrivisorError("web broke", machine="web")) == "web broke"
    assert str(errors.EngineError("qemu failed", output="one\ntwo\n", machine="web")) == "web: qemu failed: two"


def test_who_is_one_process_and_not_its_pid() -> None:
    me = Who.me()
    assert me.alive()
    assert Who.parse(str(me)) == me
    assert not Who(me.pid, me.start - 1).alive()
    assert start_time(me.pid) == me.start


@pytest.mark.parametrize("text", ["", "1", "1 2 3", "-1 2", "a b", "1 ²"])
def test_who_refuses(text: str) -> None:
    assert Who.parse(text) is None
