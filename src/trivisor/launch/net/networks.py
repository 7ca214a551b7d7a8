"""Named networks of a home: a folder each, in it a file for each machine on it, named like the machine, with its address.

The relay of each member looks names up there (guest/src/names.c), so whoever comes later is known at once. A network is there as long as
a machine names it in its spec; its folder is made with the first start.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from trivisor.core.errors import StorageError
from trivisor.core.paths import Home

UNNAMED = ("none", "nat", "host")


def named(network: str) -> bool:
    """Whether `network` of a spec is the name of a network."""
    return network not in UNNAMED


def place(home: Home, network: str) -> Path:
    """Return the folder of a network, made if it is not there. Others than its owner may read it: relays have ids of their own."""
    folder = home.networks / network
    try:
        home.networks.mkdir(mode=0o700, exist_ok=True)
        folder.mkdir(exist_ok=True)
        folder.chmod(0o755)
    except OSError as error:
        raise StorageError(f"{folder} cannot be made: {error.strerror}") from error
    return folder


def join(home: Home, network: str, name: str, address: str) -> None:
    """Make a machine known on a network."""
    folder = place(home, network)
    aside = folder / f".{name}.{os.getpid()}"
    try:
        aside.write_text(address + "\n")
        aside.chmod(0o644)
        aside.rename(folder / name)
    except OSError as error:
        raise StorageError(f"{folder} cannot be written: {error.strerror}") from error


def leave(home: Home, network: str, name: str) -> None:
    """Forget a machine on a network; that it is not known is no error."""
    if named(network):
        (home.networks / network / name).unlink(missing_ok=True)


def sweep(home: Home, members: Callable[[], Mapping[str, set[str]]]) -> list[str]:
    """Remove what stands for no machine. `members` gives the names of the live machines by network, and every network in use.

    It is asked after looking what is there: what comes meanwhile is of no concern.
    """
    if not home.networks.is_dir():
        return []
    there = {folder: [*folder.iterdir()] for folder in sorted(home.networks.iterdir())}
    alive = members() if there else {}
    said = []
    for folder, entries in there.items():
        for entry in entries:
            if entry.name not in alive.get(folder.name, ()) and not entry.name.startswith("."):
                entry.unlink(missing_ok=True)
                said.append(f"network {folder.name}: {entry.name} removed, it does not run")
        if folder.name not in alive:
            for entry in folder.glob(".*"):
                entry.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # somebody joined
                folder.rmdir()
    return said
