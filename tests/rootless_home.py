"""Homes of ordinary users, made for a test by root, which then becomes them: what works without root is tried without root."""

from __future__ import annotations

import contextlib
import encodings.idna  # noqa: F401 -- the user may not read Python's own files, and sockets want it
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import workers
from host_state import assert_nothing_left
from machine_home import VmHome, in_child

from trivisor import VMM, Machine
from trivisor.core.spec import Wall
from trivisor.launch import ids, tvinit

NOBODY = 61234 + 10 * workers.NUMBER
"""An id that no account has, so no subordinate ids either."""
ACCOUNT = 61235 + 10 * workers.NUMBER
"""The id of an account that is there for as long as a test."""
SUBORDINATE = 1_300_000_000 + 65536 * workers.NUMBER


def as_user(user: int, work: Callable[[], object]) -> None:
    """Become `user` for good, in a child, and assert that `work` raises nothing there."""

    def run() -> None:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
        os.environ["HOME"] = "/nonexistent"
        os.chdir("/")
        work()

    assert in_child(run) == 0


@contextlib.contextmanager
def account() -> Iterator[int]:
    """An account with subordinate ids."""
    missing = [name for name in ("useradd", "usermod", "userdel", "newuidmap", "newgidmap") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    name = f"trivisor-{os.getpid()}"
    ids = f"{SUBORDINATE}-{SUBORDINATE + 65535}"
    _run("groupadd", "--gid", str(ACCOUNT), name)
    try:
        _run("useradd", "--no-create-home", "--uid", str(ACCOUNT), "--gid", str(ACCOUNT), "--shell", "/usr/sbin/nologin", name)
        # Those that useradd may have given come first, and are as good.
        _run("usermod", "--add-subuids", ids, "--add-subgids", ids, name)
        yield ACCOUNT
    finally:
        subprocess.run(["userdel", "--force", name], check=False, capture_output=True)
        subprocess.run(["groupdel", name], check=False, capture_output=True)


@contextlib.contextmanager
def home_of(user: int, template: Path) -> Iterator[Path]:
    """A copy of `template` without ice that belongs to `user`, where it may go: pytest's own folders are closed.

    It must be left empty.
    """
    _reachable()
    base = Path(tempfile.mkdtemp(prefix="user-"))
    base.chmod(0o755)
    home = VmHome(base / "home", template).root
    shutil.rmtree(home / "ice", ignore_errors=True)
    for path in (home, *home.rglob("*")):
        if path.is_file() and path.stat().st_nlink > 1:
            own = path.with_name(f"{path.name}-own")  # not the shared file's owner, but a copy's
            shutil.copy2(path, own)
            own.rename(path)
        os.chown(path, user, user, follow_symlinks=False)

    def clear() -> None:
        with VMM(home) as vmm:
            for machine in vmm.list():
                machine.delete(force=True)

    try:
        yield home
    finally:
        as_user(user, clear)
        assert_nothing_left(home, set())
        shutil.rmtree(base)


def life_of_nobody(wall: Wall, live: Callable[[Machine], str]) -> str:
    """Have NOBODY, in a home of its own, run a machine of the host's own root behind `wall`; what `live` says of it. It leaves none."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to become somebody else")
    _reachable()
    base = Path(tempfile.mkdtemp(prefix="user-"))
    os.chown(base, NOBODY, NOBODY)
    said = base / "said"

    def work() -> None:
        with VMM(base / "home") as vmm:
            report = next(report for report in vmm.walls() if report.wall == wall)
            if not report.available:
                said.write_text(f"skip: needs the {wall} wall: {report.why}")
                return
            with vmm.run("host", wall=wall) as machine:
                said.write_text(live(machine))

    try:
        as_user(NOBODY, work)
        text = said.read_text()
        if text.startswith("skip: "):
            pytest.skip(text[6:])
        assert list((base / "home/machines").iterdir()) == []
        return text
    finally:
        ids.remove_tree(base)


def _reachable() -> None:
    for path in (tvinit.path(), *tvinit.path().parents):
        if not os.stat(path).st_mode & 0o005:
            pytest.skip(f"needs {path} to be readable to all")


def _run(*argv: str) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"needs accounts to be made: {done.stderr.strip()}")
