"""What a device needs of the host before it is plugged, and of the guest after: a card's link, a port's socket, a folder's daemon.

All of it lives as long as QEMU holds its end: a tap goes with its descriptor, a daemon with its connection.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from trivisor.core.devices import Device, NetworkCard, PciPassthrough, SerialSocket, SharedFolder, UsbPassthrough, Watchdog
from trivisor.core.errors import GuestError, InvalidSpec
from trivisor.core.wishes import Volume
from trivisor.launch.net import cards, networks
from trivisor.vmm import shares
from trivisor.vmm.context import Context
from trivisor.vmm.plugged import Entry, Link, links
from trivisor.vmm.records import Row
from trivisor.vos import guest
from trivisor.vos.devices import endpoint, place
from trivisor.vos.devices.hostpci import check_pci
from trivisor.vos.devices.hostusb import find_usb
from trivisor.vos.files import Files
from trivisor.vos.line import Line
from trivisor.vos.processes import Processes

SEEN = 10.0
_STEPS = 30.0
_POLL = 0.01


@dataclass(frozen=True)
class Given:
    """What a device is plugged with."""

    fd: int | None = None
    link: Link | None = None
    card: cards.Card | None = None


def check(context: Context, row: Row, known: Mapping[str, Entry], device: Device) -> Device:
    """Return the device as it is plugged: a folder by its real path. Raises InvalidSpec, NotFound, HostLacks."""
    others = [found.device for found in known.values()]
    if isinstance(device, UsbPassthrough | PciPassthrough):
        if device in others:
            raise InvalidSpec(f"it has {device} already", machine=row.name, hint="a device of the host's is attached once")
        find_usb(device) if isinstance(device, UsbPassthrough) else check_pci(device)
    if isinstance(device, Watchdog) and any(isinstance(other, Watchdog) for other in others):
        raise InvalidSpec("a machine has one watchdog", machine=row.name, hint="detach the other first")
    if isinstance(device, SharedFolder):
        if device.target in {*row.spec.volumes, *(other.target for other in others if isinstance(other, SharedFolder))}:
            raise InvalidSpec(f"there is a folder at {device.target} already", machine=row.name, hint="give another target")
        settled = shares.settle(context.home, {device.target: Volume(str(device.path), device.readonly)})
        return SharedFolder(settled[device.target].source, device.target, device.readonly)
    if isinstance(device, NetworkCard):
        cards.check()
        if row.spec.egress is not None:
            hint = "lift the policy: vm.network.unrestrict()"
            raise InvalidSpec("a machine with an egress policy has one network card", machine=row.name, hint=hint)
        there = {row.spec.network, *(other.network for other in others if isinstance(other, NetworkCard))}
        if networks.named(device.network) and device.network in there:
            raise InvalidSpec(f"the machine is on {device.network} already", machine=row.name, hint="a machine has one card on a network")
    return device


@contextmanager
def prepare(context: Context, row: Row, name: str, device: Device, fd: int | None) -> Iterator[Given]:
    """Make the host's side of a device. What is given is closed at the end: QEMU has it by then. Raises as an attach does."""
    with ExitStack() as stack:
        if isinstance(device, NetworkCard):
            card = stack.enter_context(cards.make(context.home, f"{row.id} {name}", device.network))
            yield Given(card.fd, Link(card.interface, card.address, device.network), card)
        elif isinstance(device, SerialSocket):
            listener = stack.enter_context(endpoint.listen(str(device.path)))
            try:
                yield Given(listener.fileno())
            except BaseException:
                endpoint.remove(str(device.path))
                raise
        else:
            yield Given(fd)


def finish(context: Context, row: Row, name: str, device: Device, given: Given, port: Callable[[str], str]) -> None:
    """Have the guest configure what has been plugged. Raises GuestError if it does not find it."""
    if isinstance(device, SharedFolder) and row.spec.wall == "vm":
        _wait(context, row, name, partial(place.bound, port=port(name)))
        configure(context, row, [("share", f"hot-{name}", device.target, "virtiofs", "ro" if device.readonly else "rw")])
    if given.card is None:
        return
    interface = Path(_wait(context, row, name, partial(place.find, name=name, device=device, port=port(name)))).name
    if networks.named(given.card.network):
        networks.join(context.home, given.card.network, row.name, given.card.address)
    configure(context, row, given.card.steps(interface, alone=row.spec.network == "none"))


def release(context: Context, row: Row, device: Device) -> None:
    """Have the guest let go of a device before it is pulled out."""
    if isinstance(device, SharedFolder) and row.spec.wall == "vm":
        with suppress(GuestError):  # who attached it died before it was mounted, or the guest has unmounted it
            configure(context, row, [("unshare", device.target)])


def gone(device: Device) -> None:
    """Take away what a device that is no longer attached had on the host."""
    if isinstance(device, SerialSocket):
        endpoint.remove(str(device.path))


def forget(context: Context, row: Row, left: Mapping[str, Entry]) -> None:
    """Leave the named networks on which a machine has no card any more."""
    still = {row.spec.network} | {found.link.network for found in left.values() if found.link is not None}
    for link in links(context.folder(row).root):
        if link.network not in still:
            networks.leave(context.home, link.network, row.name)


def configure(context: Context, row: Row, steps: Sequence[Sequence[str]]) -> None:
    """Have the guest carry out steps. Raises GuestError."""
    line = Line.connect(context.folder(row).line, row.name)
    try:
        guest.configure(line, steps, timeout=_STEPS)
    finally:
        line.close()


def _wait(context: Context, row: Row, name: str, find: Callable[[Files], str | None]) -> str:
    """Wait until the guest has found a device; return where."""
    line = Line.connect(context.folder(row).line, row.name)
    try:
        files = Files(Processes(lambda: line, row.name))
        deadline = time.monotonic() + SEEN
        while (found := find(files)) is None:
            if time.monotonic() > deadline:
                raise GuestError(f"the guest has not found {name} in {SEEN:g} s", machine=row.name, hint="see logs(source='serial')")
            # The guest's kernel tells only its own programs.
            time.sleep(_POLL)
        return found
    finally:
        line.close()
