"""bootstrap: its command, and an mmdebstrap that fails in every way. (The real one runs in set-up: it needs the network.)"""

from __future__ import annotations

import os
import select
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from squash_support import contents, left, make_home
from tar_maker import END, file

from trivisor.core.errors import EngineError, HostLacks, ImageError, InvalidSpec
from trivisor.core.units import MIB
from trivisor.images import bootstrap
from trivisor.images.catalog import Images
from trivisor.images.limits import Limits


def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> Images:
    """Let `script` be the mmdebstrap that is found."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "mmdebstrap").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "mmdebstrap").chmod(0o755)
    (tmp_path / "root.tar").write_bytes(file("etc/issue", b"Debian") + END)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("ROOT_TAR", str(tmp_path / "root.tar"))
    return Images(make_home(tmp_path))


def test_command() -> None:
    argv = bootstrap.command("bookworm", ["python3-minimal", "nginx=1.2-3"], root=False)
    assert argv[0] == "mmdebstrap" and argv[-2:] == ["bookworm", "-"]
    assert "--mode=unshare" in argv and "--include=python3-minimal,nginx=1.2-3" in argv
    for suite, packages in (("-x", []), ("a b", []), ("", []), ("bookworm", ["--hook"]), ("bookworm", ["a,b"]), ("bookworm", [""])):
        with pytest.raises(InvalidSpec):
            bootstrap.command(suite, packages, root=True)


def test_its_tar_becomes_the_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = 'echo "I: running apt-get update..." >&2; echo noise >&2; echo "I: done" >&2; exec cat "$ROOT_TAR"'
    images = program(tmp_path, monkeypatch, script)
    said: list[str] = []
    image = images.bootstrap("debian", "bookworm", ["nginx"], progress=said.append)
    assert said[:2] == ["running apt-get update...", "done"]
    assert image.name == "debian:latest" and image.source == "mmdebstrap bookworm nginx"
    assert contents(image, "etc/issue") == b"Debian" and left(make_home(tmp_path)) == []


def test_its_failure_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = program(tmp_path, monkeypatch, 'echo "E: apt-get update failed" >&2; exit 25')
    with pytest.raises(EngineError, match="apt-get update failed") as caught:
        images.bootstrap()
    assert caught.value.status == 25 and "network" in caught.value.hint and "mmdebstrap" in " ".join(caught.value.command)
    assert left(make_home(tmp_path)) == [] and images.list() == []


def test_half_a_tar_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = program(tmp_path, monkeypatch, 'exec head -c 700 "$ROOT_TAR"')
    with pytest.raises(ImageError, match="truncated"):
        images.bootstrap()


@pytest.mark.parametrize("script", ["exec cat /dev/zero", "while :; do echo more >&2; cat /bin/sh; done"])
def test_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    images = program(tmp_path, monkeypatch, script)
    with pytest.raises(ImageError, match="larger than the limit"):
        images.bootstrap(limits=Limits(total=10 * MIB))
    assert left(make_home(tmp_path)) == []


def test_one_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = 'echo $$ > "${ROOT_TAR%/*}/pid"; trap \'\' TERM; echo I: begun >&2; until [ -e "${ROOT_TAR%/*}/go" ]; do sleep 0.02; done'
    images = program(tmp_path, monkeypatch, f"{script}; echo I: so far >&2; while :; do sleep 100; done")
    monkeypatch.setattr(bootstrap, "GRACE", 0.5)
    begun = time.monotonic()

    def said(words: str) -> None:
        if words == "begun":  # a busy host starts a shell late: its silence is measured from what it says next
            monkeypatch.setattr(bootstrap, "SILENCE", 0.5)
            (tmp_path / "go").touch()

    with pytest.raises(EngineError, match="takes too long"):
        images.bootstrap(progress=said)
    assert time.monotonic() - begun < 40
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_none_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda *args, **kwargs: None)
    with pytest.raises(HostLacks, match="mmdebstrap is not installed") as caught:
        Images(make_home(tmp_path)).bootstrap()
    assert "apt-get install mmdebstrap" in caught.value.hint


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv (util-linux)")
def test_it_ends_with_us(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kill -9 of the importing process takes mmdebstrap along, and the next collect what it had made."""
    images = program(
        tmp_path, monkeypatch, 'echo $$ > "${ROOT_TAR%/*}/pid.new"; mv "${ROOT_TAR%/*}/pid.new" "${ROOT_TAR%/*}/pid"; exec sleep 100'
    )
    importer = os.fork()
    if importer == 0:
        try:
            images.bootstrap()
        finally:
            os._exit(1)
    written = tmp_path / "pid"
    wait_until(written.exists)
    fd = os.pidfd_open(int(written.read_text()))
    os.kill(importer, signal.SIGKILL)
    os.waitpid(importer, 0)
    assert select.select([fd], [], [], 30)[0]
    os.close(fd)
    images.collect()
    assert left(make_home(tmp_path)) == []


def wait_until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)  # a file that another process makes: inotify would be more than this needs
