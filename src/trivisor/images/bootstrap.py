"""A Debian root from the distribution itself, by mmdebstrap(1): as root, or in a user namespace.

Documentation, manuals and translations are left out, as in Debian's slim container images; copyright files
stay. Nothing is synced while packages are unpacked: the tar is all that is kept.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from trivisor.core.errors import EngineError, ImageError, InvalidSpec
from trivisor.core.process import TAIL, find
from trivisor.images.limits import Limits
from trivisor.store.faults import translated

TIMEOUT = 1800.0
"""Seconds for the whole; a slow mirror gives a minbase in a few minutes."""
SILENCE = 600.0
"""Seconds without a word, or a byte of output."""
GRACE = 30.0
"""Seconds that mmdebstrap may take to remove its folder when it is told to end."""
_SUITE = re.compile(r"[a-z0-9][a-z0-9.-]*")
_PACKAGE = re.compile(r"[a-z0-9][a-z0-9.+-]+(?::[a-z0-9]+)?(?:[=/][A-Za-z0-9.+:~-]+)?")
_TRIM = (
    """rm -rf "$1"/usr/share/man/* "$1"/usr/share/info/*""",
    """find "$1"/usr/share/locale -mindepth 1 -maxdepth 1 ! -name locale.alias -exec rm -rf {} +""",
    """find "$1"/usr/share/doc -mindepth 2 ! -type d ! -name copyright -delete""",
    """find "$1"/usr/share/doc -mindepth 1 -type d -empty -delete""",
    # Packages that are installed later leave them out too.
    r"""printf 'path-exclude=%s\n' '/usr/share/man/*' '/usr/share/info/*' '/usr/share/locale/*' '/usr/share/doc/*' """
    r"""> "$1"/etc/dpkg/dpkg.cfg.d/docs""",
    r"""printf 'path-include=%s\n' /usr/share/locale/locale.alias '/usr/share/doc/*/copyright' >> "$1"/etc/dpkg/dpkg.cfg.d/docs""",
    # mmdebstrap copies these two from the host.
    """: > "$1"/etc/resolv.conf && echo localhost > "$1"/etc/hostname && chmod 644 "$1"/etc/resolv.conf "$1"/etc/hostname""",
)
"""After the packages: dpkg's own path-exclude would do it too, but makes mmdebstrap filter every file in Python (+10 s)."""
_OPTIONS = (
    "--variant=minbase",
    "--format=tar",
    '--aptopt=Acquire::Languages "none"',
    "--dpkgopt=force-unsafe-io",
    "--customize-hook=" + " && ".join(_TRIM),
)


def debian(target: Path, suite: str, packages: Sequence[str], limits: Limits, progress: Callable[[str], None]) -> None:
    """Write the root's tar to `target`. Raises HostLacks, InvalidSpec, EngineError, ImageError, StorageError."""
    argv = command(suite, packages, root=os.geteuid() == 0)
    argv[0] = find("mmdebstrap", "mmdebstrap")
    if setpriv := shutil.which("setpriv"):
        argv = [setpriv, "--pdeathsig", "TERM", *argv]  # it cleans up by itself when we are killed
    env = {**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
    if os.geteuid() == 0:
        # What a kill -9 leaves is then swept with the workspace. Rootless it must be where other ids may enter.
        env["TMPDIR"] = str(target.parent)
    with translated(target.parent):
        output = target.open("xb")
    with output:
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.PIPE, env=env, start_new_session=True)
        try:
            said = _follow(process, target, limits, progress)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
        finally:
            _end(process)
    if process.returncode:
        raise EngineError("mmdebstrap failed", command=argv, status=process.returncode, output=said, hint=_hint(said))


def command(suite: str, packages: Sequence[str], *, root: bool) -> list[str]:
    """Return mmdebstrap's argv. Raises InvalidSpec for what is not a suite or a package."""
    if not _SUITE.fullmatch(suite):
        raise InvalidSpec(f"{suite[:80]!r} is not a Debian suite", hint="for example bookworm or trixie")
    for package in packages:
        if not _PACKAGE.fullmatch(package):
            raise InvalidSpec(f"{package[:80]!r} is not a Debian package")
    include = [f"--include={','.join(packages)}"] if packages else []
    return ["mmdebstrap", f"--mode={'root' if root else 'unshare'}", *_OPTIONS, *include, suite, "-"]


def _follow(process: subprocess.Popen[bytes], target: Path, limits: Limits, progress: Callable[[str], None]) -> str:
    """Pass its words on until it closes stderr; return the last of them."""
    assert process.stderr is not None
    fd = process.stderr.fileno()
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    said = rest = b""
    size = 0
    deadline = time.monotonic() + TIMEOUT
    silence = time.monotonic() + SILENCE
    while time.monotonic() < min(deadline, silence):
        data = os.read(fd, 65536) if poll.poll(1000) else None
        if data == b"":
            return said.decode(errors="replace")
        grown = target.stat().st_size
        if grown > limits.total:
            raise ImageError(f"mmdebstrap: the image is larger than the limit of {limits.total} bytes")
        if data or grown > size:
            silence, size = time.monotonic() + SILENCE, grown
        said = (said + (data or b""))[-TAIL:]
        *lines, rest = (rest + (data or b"")).split(b"\n")
        rest = rest[-TAIL:]
        for line in lines:
            if line.startswith(b"I: running --customize-hook"):
                progress("leaving out documentation and translations")
            elif line.startswith(b"I: "):
                progress(line[3:].decode(errors="replace").strip())
    raise EngineError("mmdebstrap takes too long", command=[str(word) for word in process.args], output=said.decode(errors="replace"))  # type: ignore[union-attr]


def _end(process: subprocess.Popen[bytes]) -> None:
    """See to it that it has ended: asked first, so that it removes its folder."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
    assert process.stderr is not None
    process.stderr.close()


def _hint(said: str) -> str:
    if "newuidmap" in said or "subuid" in said or "unshare" in said:
        return "apt-get install uidmap, and give your user subordinate ids in /etc/subuid and /etc/subgid"
    if "apt-get update" in said or "Could not resolve" in said or "Failed to fetch" in said:
        return "look at the host's network and /etc/apt/sources.list"
    return ""
