"""What a crash left is removed when a home is opened: processes, folders, sockets, rows, half-made files.

Cheap when there is nothing: one query, one listing of the machines' folder and one of tmp. Folders are
listed before the rows are read: a row is older than its folder and outlives it, so a folder without a row
in that order belongs to nobody. Whatever a live process holds is left alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from trivisor.core.errors import Busy, StorageError, TrivisorError
from trivisor.core.process import Who
from trivisor.launch import keeper
from trivisor.launch.net import host, networks
from trivisor.store import workspace
from trivisor.vmm import limits, locks, plugged, reconcile, removal
from trivisor.vmm.context import Context
from trivisor.vmm.records import Row
from trivisor.vmm.snapshots import keeping


def sweep(context: Context, *, deep: bool = False) -> list[str]:
    """Remove what no live process and no row stands for; return what was done, in words.

    `deep` also asks the engine of every live machine whether it is paused. What cannot be removed is said
    too, and stops nothing else.
    """
    said: list[str] = []
    folders = _names(context.home.machines)
    grouped = limits.stray(context)
    rows = context.records.rows()
    for row in rows:
        _try(said, f"machine {row.name}", partial(_row, context, row, deep=deep))
    for name in sorted(folders - {row.id for row in rows}):
        _try(said, f"folder {name}", partial(_folder, context, name))
    ids = {row.id for row in rows}
    for name in sorted(grouped - ids):
        _try(said, f"cgroup {name}", partial(limits.sweep, context, name))
    _try(said, "snapshots", partial(keeping.sweep, context))
    _try(said, "tmp", partial(_tmp, context.home.tmp))
    for engine in context.engines.values():
        _try(said, f"{engine.wall} engine", partial(engine.sweep, context.home, ids))
    _try(said, "networks", partial(networks.sweep, context.home, partial(_members, context)))
    if deep:
        _try(said, "host's network", _network)
        _try(said, "trees", partial(context.images.sweep, lambda: {row.digest for row in context.records.rows()}))
    _try(said, "store", partial(_store, context.home.store / "tmp"))
    _try(said, "disks", context.disks.sweep)
    for words in said:
        context.records.note("swept", words)
    return said


def _members(context: Context) -> dict[str, set[str]]:
    """Return the machines that run or start on each named network that a machine has."""
    found: dict[str, set[str]] = {}
    for row in context.records.rows():
        live = row.state in reconcile.LIVE or row.operation in (*reconcile.STARTING, "clone", "receive")
        for network in (row.spec.network, *(link.network for link in plugged.links(context.folder(row).root))):
            found.setdefault(network, set()).update({row.name} if live else ())
    return found


def _network() -> list[str]:
    host.sweep()  # the last machine leaves the table for the next one: no crash left it, so there is nothing to say
    return []


def _try(said: list[str], what: str, work: Callable[[], list[str]]) -> None:
    try:
        said += work()
    except (TrivisorError, OSError) as error:
        said.append(f"{what}: left as it is: {error}")


def _row(context: Context, row: Row, *, deep: bool) -> list[str]:
    before, settled = reconcile.settled(context, row)
    if before is None:
        return []
    if settled is None:
        return [f"machine {row.name}: removed, {before.operation or 'the process that it belonged to'} was cut short"]
    if settled.state is not before.state:
        return [f"machine {row.name}: {before.state} is {settled.state}" + (f", {settled.reason}" if settled.reason else "")]
    if before.operation and not settled.operation:
        return [f"machine {row.name}: {before.operation} was cut short, it is {settled.state}"]
    if deep and settled.state in reconcile.LIVE and not settled.operation:
        return _ask(context, settled)
    return []


def _ask(context: Context, row: Row) -> list[str]:
    """Compare running and paused with what the engine says."""
    try:
        with locks.hold(context.folder(row).lock, locks.SETTLE, row.name, make=False):
            fresh = reconcile.settle_held(context, row.id)
            if fresh is None or fresh.state not in reconcile.LIVE:
                return []
            state = reconcile.standing(context, fresh)
            if state is fresh.state:
                return []
            context.records.update(row.id, state=state, event=(state.value, "found so"))
    except (Busy, locks.FolderGone):  # somebody has begun something with it since, or taken it away
        return []
    return [f"machine {row.name}: {fresh.state} is {state}"]


def _folder(context: Context, name: str) -> list[str]:
    folder = context.home.machine(name)
    if folder.root.is_symlink() or not folder.root.is_dir():
        folder.root.unlink(missing_ok=True)
    elif locks.held(folder.lock):
        return []
    else:
        keeper.kill(folder)
        removal.remove_tree(folder.root)
    return [f"folder {name}: removed, no machine names it"]


def _tmp(tmp: Path) -> list[str]:
    said = []
    for name in _names(tmp):
        maker = Who.parse(" ".join(name.split("-", 2)[:2]))
        if maker is None or maker.alive():
            continue
        path = tmp / name
        if path.is_dir() and not path.is_symlink():
            removal.remove_tree(path)
        else:
            path.unlink(missing_ok=True)
        said.append(f"tmp {name}: removed, its maker ended")
    return said


def _store(tmp: Path) -> list[str]:
    if not tmp.is_dir():
        return []
    return [f"store {name}: removed, its maker ended" for name in workspace.sweep(tmp)]


def _names(folder: Path) -> set[str]:
    try:
        return {entry.name for entry in folder.iterdir()}
    except FileNotFoundError:
        return set()
    except OSError as error:
        raise StorageError(f"{folder} cannot be read: {error.strerror}") from error
