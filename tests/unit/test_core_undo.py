"""Undo takes steps back in reverse, all of them, whatever ended the work and whichever undo fails."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from trivisor.core import undo as module
from trivisor.core.undo import Undo


def fail(message: str) -> Callable[[], object]:
    def step() -> None:
        raise OSError(message)

    return step


def test_kept_work_stays() -> None:
    taken: list[int] = []
    with Undo() as undo:
        undo.add("one", lambda: taken.append(1))
        undo.keep()
    assert taken == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_reverse_order_on_any_failure(error: type[BaseException]) -> None:
    taken: list[int] = []
    with pytest.raises(error), Undo() as undo:
        undo.add("one", lambda: taken.append(1))
        undo.add("two", lambda: taken.append(2))
        raise error
    assert taken == [2, 1]


def test_work_not_kept_is_taken_back() -> None:
    taken: list[int] = []
    with Undo() as undo:
        undo.add("one", lambda: taken.append(1))
    assert taken == [1]


def test_a_failing_undo_stops_no_other_and_is_noted() -> None:
    taken: list[int] = []
    with pytest.raises(RuntimeError, match="work") as caught, Undo() as undo:
        undo.add("one", lambda: taken.append(1))
        undo.add("two", fail("two broke"))
        raise RuntimeError("work")
    assert taken == [1]
    assert caught.value.__notes__ == ["and undoing 'two' failed: two broke"]


def test_failing_undos_without_an_error_raise_the_first() -> None:
    taken: list[int] = []
    with pytest.raises(OSError, match="two broke") as caught, Undo() as undo:
        undo.add("zero", lambda: taken.append(0))
        undo.add("one", fail("one broke"))
        undo.add("two", fail("two broke"))
    assert taken == [0]
    assert caught.value.__notes__ == ["and undoing 'one' failed: one broke"]


def test_observer_sees_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(module, "observer", seen.append)
    with Undo() as undo:
        undo.add("one", lambda: None)
        undo.add("two", lambda: None)
        undo.keep()
    assert seen == ["one", "two"]
