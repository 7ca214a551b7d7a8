"""The host's search for equal pages: begun and ended by name, and put back as it was, whoever ends it."""

from __future__ import annotations

from pathlib import Path

import pytest
from machine_home import TestHome

from trivisor import VMM, HostLacks, InvalidSpec
from trivisor.vmm import dedupe

BEFORE = {"run": "0\n", "smart_scan": "1\n", "pages_to_scan": "100\n", "sleep_millisecs": "200\n"}


@pytest.fixture
def ksm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What is in /sys/kernel/mm/ksm, in a folder of our own."""
    folder = tmp_path / "ksm"
    folder.mkdir()
    for name, value in {**BEFORE, "pages_shared": "10\n", "pages_sharing": "30\n", "full_scans": "2\n"}.items():
        (folder / name).write_text(value)
    monkeypatch.setattr(dedupe, "KSM", folder)
    return folder


def test_what_was_set_before_is_put_back_by_any_process(home: TestHome, vmm: VMM, ksm: Path) -> None:
    vmm.dedupe.start(pages=400, pause_ms=10)
    vmm.dedupe.start(pages=700)  # once more: what was before the first is what was before
    assert [(ksm / name).read_text() for name in ("run", "pages_to_scan", "smart_scan")] == ["1\n", "700\n", "0\n"]
    with home.open() as other:
        other.dedupe.stop()
    assert {name: (ksm / name).read_text() for name in BEFORE} == BEFORE
    (ksm / "run").write_text("1\n")  # somebody else's
    vmm.dedupe.stop()
    assert vmm.dedupe.report().scanning


def test_an_older_kernel_is_told_what_it_knows_alone(vmm: VMM, ksm: Path) -> None:
    (ksm / "smart_scan").unlink()
    vmm.dedupe.start()
    assert not (ksm / "smart_scan").exists()
    vmm.dedupe.stop()


def test_figures_are_bytes(vmm: VMM, ksm: Path) -> None:
    report = vmm.dedupe.report()
    assert (report.pages, report.saved, report.profit, report.scans) == (10 * 4096, 30 * 4096, None, 2)
    assert report.available and not report.scanning


def test_hosts_and_numbers_that_cannot(vmm: VMM, ksm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for pages, pause in ((0, 20), (1, -1), (1 << 21, 0)):
        with pytest.raises(InvalidSpec):
            vmm.dedupe.start(pages=pages, pause_ms=pause)
    monkeypatch.setattr(dedupe, "KSM", ksm / "none")
    with pytest.raises(HostLacks, match="cannot merge"):
        vmm.dedupe.start()
    assert not vmm.dedupe.report().available
