"""What QEMU says of a watchdog that fired is written down once, and believed as far as it may be."""

from __future__ import annotations

import json
import time

import pytest
from machine_home import TestHome

from trivisor import VMM, Machine
from trivisor.core.paths import MachineDir
from trivisor.vmm import fired


def said(at: float, action: object = "none", event: str = "WATCHDOG") -> bytes:
    stamp = {"seconds": int(at), "microseconds": round(at % 1 * 1e6)}
    return json.dumps({"timestamp": stamp, "event": event, "data": {"action": action}}).encode() + b"\r\n"


def log(home: TestHome, machine: Machine, content: bytes) -> MachineDir:
    folder = MachineDir(home.folder(machine))
    folder.log("events").parent.mkdir(exist_ok=True)
    folder.log("events").write_bytes(content)
    return folder


def noted(vmm: VMM) -> list[tuple[float, str]]:
    return [(event.time, event.detail) for event in vmm.events() if event.kind == "watchdog"]


def test_each_time_is_an_event_once(home: TestHome, vmm: VMM, running: Machine) -> None:
    now = time.time() // 1
    log(home, running, b'{"QMP": {}}\r\n' + said(now + 1.5) + said(now + 2, event="RTC_CHANGE") + said(now + 3))
    expected = [(now + 1.5, "its watchdog fired: none"), (now + 3, "its watchdog fired: none")]
    with home.open() as other:
        assert noted(vmm) == noted(other) == noted(vmm) == expected
    running.info()
    assert noted(vmm) == expected


def test_nothing_is_said_of_what_was_forgotten(home: TestHome, vmm: VMM, running: Machine) -> None:
    """Events before all that are kept were there once."""
    log(home, running, said(1000.0))
    assert noted(vmm) == []


@pytest.mark.parametrize(
    "line",
    [
        b'"WATCHDOG"\n',
        b'{"event": "WATCHDOG"}\n',
        b'{"event": "WATCHDOG", "timestamp": 5, "data": {"action": "none"}}\n',
        b'{"event": "WATCHDOG", "timestamp": {"seconds": "x", "microseconds": 0}, "data": {"action": "none"}}\n',
        b'{"event": "WATCHDOG", "timestamp": {"seconds": Infinity, "microseconds": 0}, "data": {"action": "none"}}\n',
        b'{"event": "WATCHDOG", "timestamp": {"seconds": 1' + b"0" * 400 + b', "microseconds": 0}, "data": {"action": "none"}}\n',
        b"[" * 60000 + b'"WATCHDOG"\n',
        said(time.time() + 10, "words that are no action\n"),
        said(time.time() + 10, ["reset"]),
    ],
    ids=["text", "bare", "number", "letters", "infinite", "huge", "deep", "words", "list"],
)
def test_what_is_no_event_of_qemu(home: TestHome, vmm: VMM, running: Machine, line: bytes) -> None:
    log(home, running, line)
    assert noted(vmm) == []


def test_a_flood_is_cut(home: TestHome, vmm: VMM, running: Machine) -> None:
    now = time.time() // 1
    log(home, running, b"".join(said(now + number) for number in range(2000)))
    assert len(noted(vmm)) == 16


def test_which_life_it_ended(home: TestHome, running: Machine) -> None:
    folder = log(home, running, said(50.0, "reset"))
    assert fired.killed(folder, 40.0) == "its watchdog fired: reset"
    assert fired.killed(folder, 60.0) == ""
    log(home, running, said(50.0, "reset") + said(51.0, "pause"))
    assert fired.killed(folder, 40.0) == "", "it was resumed"
