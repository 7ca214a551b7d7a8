"""The host's part of networks: the table, forwarding, and the book of named networks. As root only.

What must be one for all homes of the host lies in /run/trivisor, changed under one lock: which pool, whether it was we who switched
forwarding on, which number a named network has.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from trivisor.core.errors import HostLacks, StorageError
from trivisor.launch.net import netlink, pool, rules
from trivisor.launch.net.netlink import Netlink

RUN = Path("/run/trivisor")
WAIT = 30.0
_TRIES = 10
_INET = 1
_FORWARD = Path("/proc/sys/net/ipv4/ip_forward")


def ready() -> str:
    """Make the host ready for machines with a network, if it is not; return the pool. Takes a millisecond when it is.

    Raises HostLacks.
    """
    if (chosen := _ready()) is not None:
        return chosen
    with _locked():
        return _prepare()


@contextlib.contextmanager
def held(place: Path | None = None) -> Iterator[tuple[str, int | None]]:
    """Have the host ready for the link that is made within; yield the pool, and the number of the network whose folder is `place`.

    Another home's `sweep` waits until this ends, and then sees the link. Raises HostLacks.
    """
    for _ in range(_TRIES):
        chosen = ready()
        number = None if place is None else network(place)
        with _locked(fcntl.LOCK_SH):
            if _ready() == chosen and (number is None or _given(number) == place):  # no sweep came between
                yield chosen, number
                return
    raise HostLacks(
        f"what networks need of the host is taken back as soon as it is made, {_TRIES} times", hint="see who changes its nftables"
    )


def network(place: Path) -> int:
    """Return the number of the named network whose folder is `place`, given if it has none yet. Raises HostLacks when all are given."""
    with _locked():
        chosen = _ready() or _prepare()
        book = RUN / "networks"
        book.mkdir(mode=0o700, exist_ok=True)
        given = {int(entry.name): entry for entry in book.iterdir() if entry.name.isdecimal()}
        for number, entry in given.items():
            if entry.readlink() == place:
                return number
        for number, entry in sorted(given.items()):
            if not entry.readlink().exists():  # its network is gone
                entry.unlink()
                del given[number]
        free = next((number for number in range(pool.NETWORKS) if number not in given), None)
        if free is None:
            raise HostLacks(f"this host has {pool.NETWORKS} named networks already", hint="delete the machines of one")
        _allow(chosen, free)
        (book / str(free)).symlink_to(place)
        return free


def sweep() -> bool:
    """Take back what was done to the host when no interface of a machine is left, in any home. Return whether it was."""
    if os.geteuid() != 0 or not (RUN / "pool").exists() or _links():
        return False
    with _locked():
        if _links():
            return False
        from trivisor.launch.net import table

        table.remove()
        if (RUN / "forward").exists():
            _FORWARD.write_text("0\n")
        for name in ("pool", "forward"):
            (RUN / name).unlink(missing_ok=True)
        for folder in ("networks", "allowed"):
            for entry in (RUN / folder).iterdir() if (RUN / folder).is_dir() else ():
                entry.unlink()
    return True


def _ready() -> str | None:
    """Return the pool if all is there."""
    with contextlib.suppress(FileNotFoundError):
        chosen = (RUN / "pool").read_text().strip()
        if _forwards() and _whole():
            return chosen
    return None


def _given(number: int) -> Path | None:
    with contextlib.suppress(FileNotFoundError):
        return (RUN / "networks" / str(number)).readlink()
    return None


def _prepare() -> str:
    """The same under the lock. The table first: nothing is forwarded for a machine before its rules are there."""
    from trivisor.launch.net import table  # pyroute2 takes longer to import than a container to live, and is needed once a boot

    known = RUN / "pool"
    chosen = known.read_text().strip() if known.exists() else pool.choose(_routes())
    if chosen is None:
        raise HostLacks("the host has routes into every range of addresses that machines could have", hint=", ".join(pool.CANDIDATES))
    mark = RUN / "forward"
    if not _forwards():
        mark.write_text("\n".join(sorted(name for name in _interfaces() if not name.startswith(pool.PREFIX))))
    guarded = mark.read_text().split() if mark.exists() else []
    if not _whole():
        table.make(rules.rules(chosen, guarded=[name for name in guarded if name != "lo"]))
        for entry in (RUN / "allowed").iterdir() if (RUN / "allowed").is_dir() else ():
            entry.unlink()
        for number in (RUN / "networks").iterdir() if (RUN / "networks").is_dir() else ():
            _allow(chosen, int(number.name))
    known.write_text(chosen + "\n")
    if not _forwards():
        try:
            _FORWARD.write_text("1\n")
        except OSError as error:
            raise HostLacks(f"forwarding cannot be switched on: {error.strerror}", hint="sysctl -w net.ipv4.ip_forward=1") from error
    return chosen


def _allow(chosen: str, number: int) -> None:
    """Let the members of a network reach each other. Each rule is added once: a number that is given again has it."""
    mark = RUN / "allowed" / str(number)
    mark.parent.mkdir(mode=0o700, exist_ok=True)
    if not mark.exists():
        from trivisor.launch.net import table

        table.add(rules.network_rule(pool.subnet(chosen, number)))
        mark.touch()


def _whole() -> bool:
    """Whether the table is there as this version makes it: its last chain is."""
    with Netlink(netlink.NETFILTER) as kernel:
        try:
            kernel.ask([netlink.chain(_INET, rules.TABLE, rules.CHAINS[-1].name)])
        except OSError:
            return False
    return True


def _forwards() -> bool:
    return _FORWARD.read_text().strip() != "0"


def _interfaces() -> list[str]:
    return [name for _, name in socket.if_nameindex()]


def _links() -> bool:
    return any(name.startswith(pool.PREFIX) for name in _interfaces())


def _routes() -> Iterator[str]:
    """Yield where the host's routes lead (proc(5), /proc/net/route: hexadecimal, little-endian)."""
    for line in Path("/proc/net/route").read_text().splitlines()[1:]:
        interface, destination, _, _, _, _, _, mask = line.split()[:8]
        if not interface.startswith(pool.PREFIX):
            address = bytes.fromhex(destination)[::-1]
            yield f"{'.'.join(map(str, address))}/{bin(int(mask, 16)).count('1')}"


@contextlib.contextmanager
def _locked(how: int = fcntl.LOCK_EX) -> Iterator[None]:
    RUN.mkdir(mode=0o700, exist_ok=True)
    if RUN.stat().st_uid != os.geteuid():
        raise StorageError(f"{RUN} is not ours", hint="remove it")
    deadline = time.monotonic() + WAIT
    with open(RUN / "lock", "ab") as file:
        while True:
            try:
                fcntl.flock(file, how | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise StorageError(f"{RUN}/lock is held for over {WAIT:g} s", hint="end the process that holds it") from None
            time.sleep(0.002)  # flock has no wait with a bound
        yield
