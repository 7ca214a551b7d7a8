"""Whether KVM is believed: the probe's own binary under TCG, which runs anywhere, and the verdict on this host."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from trivisor.core.errors import HostLacks
from trivisor.core.paths import Home
from trivisor.vmm.engines.vm import probe, qemu


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(tmp_path / "home")
    home.open()
    return home


@pytest.fixture
def found(home: Home) -> qemu.Qemu:
    try:
        return qemu.inspect(qemu.locate(), home)
    except HostLacks as error:
        pytest.skip(str(error))


def test_the_probe_reaches_its_end(found: qemu.Qemu) -> None:
    assert probe.trial(found.path, "tcg", probe.firmware(), limit=20) == ""


def test_a_guest_that_crashes_is_not_believed(found: qemu.Qemu, tmp_path: Path) -> None:
    """lidt of an empty table, int3: a triple fault; QEMU leaves with 0."""
    image = tmp_path / "crash.bin"
    image.write_bytes(bytes(0xFFF0) + b"\x2e\x0f\x01\x1e\x00\x00\xcc" + bytes(9))
    assert "QEMU left with" in probe.trial(found.path, "tcg", image, limit=20)


def test_a_guest_that_crawls_is_not_believed(found: qemu.Qemu, tmp_path: Path) -> None:
    image = tmp_path / "loop.bin"
    image.write_bytes(bytes(0xFFF0) + b"\xeb\xfe" + bytes(14))
    begun = time.monotonic()
    assert "had not finished" in probe.trial(found.path, "tcg", image, limit=0.5)
    assert time.monotonic() - begun < 15


def test_an_exit_that_is_not_the_probes_is_not_believed(found: qemu.Qemu, tmp_path: Path) -> None:
    """mov al, 0x30; out 0xf4, al: what the probe writes when it counted wrong."""
    image = tmp_path / "wrong.bin"
    image.write_bytes(bytes(0xFFF0) + b"\xb0\x30\xe6\xf4\xf4" + bytes(11))
    assert "QEMU left with 97" in probe.trial(found.path, "tcg", image, limit=20)


def test_verdict_is_bounded_and_kept(found: qemu.Qemu, home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = time.monotonic()
    first = probe.verdict(found, home)
    assert time.monotonic() - begun < probe.LIMIT + 10
    assert first.accel in ("kvm", "tcg")
    assert first.why
    monkeypatch.setattr(probe, "trial", lambda *_: pytest.fail("asked again"))
    assert probe.verdict(found, home) == first


def test_another_boot_is_asked_again(found: qemu.Qemu, home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "unusable", lambda: "")
    asked: list[str] = []
    monkeypatch.setattr(probe, "trial", lambda path, *_: asked.append(path) or "it crawled")
    for boot in ("a", "a", "b"):
        monkeypatch.setattr(probe, "boot_id", lambda boot=boot: boot)
        assert probe.verdict(found, home).accel == "tcg"
    assert asked == [found.path] * 2
    assert len(list(home.cache.glob("kvm-*"))) == 1


def test_no_device(found: qemu.Qemu, home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_KVM", "/no/such/device")
    verdict = probe.verdict(found, home)
    assert (verdict.accel, verdict.why) == ("tcg", "KVM is not used: the host has no /dev/kvm")


def test_qemu_is_missing_or_too_old(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRIVISOR_QEMU", raising=False)
    with pytest.raises(HostLacks, match="not a program"):
        qemu.locate("/no/such/qemu")
    old = tmp_path / "qemu"
    old.write_text("#!/bin/sh\necho QEMU emulator version 5.2.0\n")
    old.chmod(0o755)
    with pytest.raises(HostLacks, match=r"not QEMU 7.2 or later"):
        qemu.inspect(str(old), home)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("trivisor.core.process.shutil.which", lambda *_, **__: None)
    with pytest.raises(HostLacks) as caught:
        qemu.locate()
    assert "qemu-system-x86" in caught.value.hint
