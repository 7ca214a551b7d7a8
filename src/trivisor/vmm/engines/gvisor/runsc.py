"""The runsc on this host: where it is, which version, which of the options that we would use it knows.

Nothing is concluded from the version: the options are asked of the binary (`runsc flags`), platforms are tried (probe.py).
The answer is kept in home.cache under the binary's identity.
"""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE, STDOUT

import msgspec

from trivisor.core.errors import HostLacks
from trivisor.core.paths import Home
from trivisor.core.process import find
from trivisor.vmm import facts

PACKAGE = "runsc"
PLATFORMS = ("systrap", "kvm", "ptrace")
"""The best first: kvm needs a /dev/kvm that works, ptrace is slow."""
_FORM = 1
_ASK_TIMEOUT = 10.0
_NEEDED = ("host-uds", "platform", "network", "ignore-cgroups", "root")


@dataclass(frozen=True)
class Runsc:
    """One runsc binary. `identity` changes when the binary does."""

    path: str
    identity: str
    version: str
    options: frozenset[str]
    """The options that it takes before its verb, as `runsc flags` lists them."""
    platforms: tuple[str, ...]
    """Those of PLATFORMS that it was built with, the best first."""


class _Facts(msgspec.Struct, frozen=True):
    version: str
    options: list[str]
    platforms: list[str]


def locate(given: str | None = None) -> str:
    """Return the path of runsc: `given`, else $TRIVISOR_RUNSC, else the one in PATH. Raises HostLacks."""
    chosen = given or os.environ.get("TRIVISOR_RUNSC")
    if not chosen:
        return find("runsc", PACKAGE)
    if not os.access(chosen, os.X_OK) or not Path(chosen).is_file():
        raise HostLacks(f"{chosen} is not a program", hint="TRIVISOR_RUNSC must be the path of runsc")
    return str(Path(chosen).absolute())


def inspect(path: str, home: Home) -> Runsc:
    """Return what is known of the binary at `path`. Raises HostLacks if it does not run or lacks what we cannot do without."""
    identity = facts.identity(path, _FORM)
    kept = home.cache / f"runsc-{identity}.json"
    found = facts.known(kept, _Facts)
    if found is None:
        found = parse(_ask(path, "--version"), _ask(path, "flags"))
        facts.keep(kept, found)
    missing = [name for name in _NEEDED if name not in found.options]
    if missing or not found.platforms:
        what = f"--{missing[0]}" if missing else "any platform that we know"
        raise HostLacks(f"{path} ({found.version}) does not have {what}", hint=f"install a newer one: apt-get install {PACKAGE}")
    return Runsc(path, identity, found.version, frozenset(found.options), tuple(found.platforms))


def parse(version: str, flags: str) -> _Facts:
    """Return the facts in what `runsc --version` and `runsc flags` print."""
    number = re.search(r"version\s+(\S+)", version)
    options = re.findall(r"^  -(\S+)", flags, re.MULTILINE)
    help_text = re.search(r"^  -platform .*\n\s+(.*)", flags, re.MULTILINE)
    words = set(re.findall(r"\w+", help_text[1])) if help_text else set()
    return _Facts(number[1] if number else "unknown", sorted(options), [name for name in PLATFORMS if name in words])


def _ask(path: str, word: str) -> str:
    """Return what `runsc WORD` prints, the options on stderr."""
    try:
        done = subprocess.run([path, word], stdin=subprocess.DEVNULL, stdout=PIPE, stderr=STDOUT, timeout=_ASK_TIMEOUT, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise HostLacks(f"{path} does not run: {error}", hint=f"apt-get install --reinstall {PACKAGE}") from error
    return done.stdout.decode(errors="replace")
