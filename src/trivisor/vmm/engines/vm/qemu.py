"""The QEMU on this host: where it is, what it can, what of the host it needs to see.

What is asked of the binary is asked once and kept in home.cache under its identity (path, time, size), because even
`--version` costs more than a pause and a resume.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import msgspec

from trivisor.core.errors import EngineError, HostLacks
from trivisor.core.paths import Home
from trivisor.core.process import find, run
from trivisor.vmm import facts as kept

OLDEST = (7, 2)
PACKAGE = "qemu-system-x86"
_FORMAT = 2


@dataclass(frozen=True)
class Qemu:
    """One QEMU binary. `identity` changes when the binary does."""

    path: str
    identity: str
    version: str
    rom_option: bool
    """memory-backend-file has rom= (8.2 and later), so RAM can be mapped privately from a file that is only readable."""
    libraries: tuple[str, ...]
    """The folders that hold its loader and shared libraries."""
    data: tuple[str, ...]
    """Its firmware and option ROMs: the folders that it looks in."""

    @property
    def translates_by_address(self) -> bool:
        """Before 8.0, TCG knows a piece of code by its virtual address, not only by where it lies in a page."""
        return int(self.version.partition(".")[0]) < 8

    def modules(self) -> list[Path]:
        """The folders of the parts that distributions build apart, accelerators among them."""
        prefix = Path(self.path).parent.parent
        return [path for path in (prefix / "lib/qemu", *prefix.glob("lib/*-linux-gnu/qemu")) if path.is_dir()]


class _Facts(msgspec.Struct, frozen=True):
    version: str
    rom_option: bool
    libraries: list[str]
    data: list[str]


def locate(given: str | None = None) -> str:
    """Return the path of QEMU: `given`, else $TRIVISOR_QEMU, else the one in PATH. Raises HostLacks."""
    chosen = given or os.environ.get("TRIVISOR_QEMU")
    if not chosen:
        chosen = find("qemu-system-x86_64", PACKAGE)
    elif not os.access(chosen, os.X_OK) or not Path(chosen).is_file():
        raise HostLacks(f"{chosen} is not a program", hint="TRIVISOR_QEMU must be the path of qemu-system-x86_64")
    # It looks for its firmware and modules beside the file itself, so a link to it must be followed.
    return str(Path(chosen).resolve())


def inspect(path: str, home: Home) -> Qemu:
    """Return what is known of the binary at `path`. Raises HostLacks if it is too old or does not run."""
    identity = kept.identity(path, _FORMAT)
    place = home.cache / f"qemu-{identity}.json"
    facts = kept.known(place, _Facts)
    if facts is None:
        facts = _ask(path)
        kept.keep(place, facts)
    return Qemu(path, identity, facts.version, facts.rom_option, tuple(facts.libraries), tuple(facts.data))


def _ask(path: str) -> _Facts:
    try:
        text = run([path, "--version"], timeout=10).decode(errors="replace")
        looked = run([path, "-L", "help"], timeout=10).decode(errors="replace")
        options = run([path, "-object", "memory-backend-file,help"], timeout=10).decode(errors="replace")
    except EngineError as error:
        raise HostLacks(f"{path} does not run: {error}", hint=f"apt-get install --reinstall {PACKAGE}") from error
    match = re.search(r"version (\d+)\.(\d+)(\.\d+)*", text)
    if not match or (int(match[1]), int(match[2])) < OLDEST:
        raise HostLacks(
            f"{path} is not QEMU 7.2 or later: {text.splitlines()[0] if text else 'no version'}", hint=f"apt-get install {PACKAGE}"
        )
    data = [os.path.normpath(folder) for folder in looked.split("\n") if folder and Path(folder).is_dir()]
    rom = re.search(r"^\s*rom=", options, re.MULTILINE) is not None
    return _Facts(match[0].removeprefix("version "), rom, _libraries(path), data)


def _libraries(path: str) -> list[str]:
    """The folders of every library that ldd names, as the loader names them."""
    output = run([find("ldd", "libc-bin"), path], timeout=10).decode(errors="replace")
    found = re.findall(r"(?:=>\s+|^\s+)(/\S+) \(0x", output, re.MULTILINE)
    return sorted({str(Path(word).parent) for word in found})
