"""The benches as programs: which run, and what a row says of a peer. What they measure is nobody's test."""

from __future__ import annotations

import inspect

from bench import fork, fork_gvisor, pools
from bench.common import Series, row, table
from scripts import bench


def test_each_bench_answers_one_question_and_is_run_once() -> None:
    found = bench.benches()
    assert fork in found
    assert fork_gvisor not in found and pools not in found  # parts of it
    for one in found:
        assert one.NOTES.strip() and (one.__doc__ or "").splitlines()[0].endswith("?")
        assert list(inspect.signature(one.rows).parameters) == ["quick"]


def test_a_peer_that_did_not_run_is_not_named() -> None:
    ours, theirs = Series([10.0]), Series()
    assert (row("it", ours, "ms", peer="docker run", against=theirs).peer, row("it", ours, "ms", peer="itself").peer) == ("", "itself")
    assert "docker" not in table([row("it", ours, "ms", peer="docker run", against=theirs, share=1.2)])


def test_a_share_of_a_peer_is_a_bound() -> None:
    assert row("it", Series([10.0]), "ms", peer="docker run", against=Series([9.0]), share=1.2).holds
    assert row("it", Series([11.0]), "ms", peer="docker run", against=Series([9.0]), share=1.2).holds is False
