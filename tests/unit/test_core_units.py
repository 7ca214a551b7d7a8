"""Sizes and durations: what people write is understood, what is neither is refused, nothing else comes out."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trivisor.core.errors import InvalidSpec
from trivisor.core.units import GIB, KIB, MAX_SIZE, MIB, format_size, parse_duration, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("256M", 256 * MIB),
        ("1G", GIB),
        ("1.5g", 3 * GIB // 2),
        ("64KiB", 64 * KIB),
        ("64 kb", 64 * KIB),
        (" 17 ", 17),
        ("17B", 17),
        (4096, 4096),
    ],
)
def test_size(text: int | str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "value", ["lots", "", "-1", "1e3", "M", "1X", "0", "0G", "٣G", "1 2", "nan", 0, -1, True, 1.5, None, b"1", 10**30, "9" * 400 + "T"]
)
def test_not_a_size(value: object) -> None:
    with pytest.raises(InvalidSpec):
        parse_size(value)  # type: ignore[arg-type]


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.text() | st.integers())
def test_size_or_invalid(value: int | str) -> None:
    with contextlib.suppress(InvalidSpec):
        assert 0 < parse_size(value) <= MAX_SIZE


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(1, MAX_SIZE))
def test_format_is_close(size: int) -> None:
    assert abs(parse_size(format_size(size)) - size) <= size * 0.06


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("500ms", 0.5), ("10m", 600), ("2h", 7200), ("1d", 86400), (0.25, 0.25), (3, 3)])
def test_duration(text: float | str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("value", ["soon", "", "0", 0, -1, float("nan"), float("inf"), 10**400, "9" * 400, True, None, "1w", "1 h"])
def test_not_a_duration(value: object) -> None:
    with pytest.raises(InvalidSpec):
        parse_duration(value)  # type: ignore[arg-type]
