"""One machine's link: a veth pair whose other end lies in a network namespace of its own, or a tap.

Nothing here can be left behind. The namespace has no name, only descriptors; with its last one it goes, and the pair with it. A
tap goes with its descriptor.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from trivisor.core.errors import EngineError, HostLacks
from trivisor.launch.net import netlink
from trivisor.launch.net.netlink import Netlink
from trivisor.launch.net.pool import PREFIX, Block

INSIDE = "eth0"
_LOOPBACK, _INSIDE = 1, 2
"""Indexes of the interfaces of a namespace that we made."""
_CLONE_NEWNET = 0x40000000
_TUNSETIFF = 0x400454CA
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
_SIOCGIFMTU = 0x8921
_JOIN = 30.0


@dataclass(frozen=True)
class Link:
    """A link that has been made: the block that it got, and the descriptor (namespace or tap) that holds it."""

    block: Block
    fd: int


def veth(blocks: Iterable[Block], machine: str, mac: str) -> Link:
    """Make a network namespace with loopback and a configured eth0 and return its descriptor; the host's end is up.

    The namespace is of the initial user namespace, so what runs in it with a user namespace of its own cannot change it;
    low ports and pings are open to all in it.
    """
    mtu = uplink_mtu()

    def build(host: int) -> Link:
        _sysctl("net/ipv4/ip_unprivileged_port_start", "0")
        _sysctl("net/ipv4/ping_group_range", "0 2147483647")
        with Netlink() as inside:
            block = _take(blocks, lambda name: _pair(inside, name, host, mac, mtu))
            configured = netlink.address(_INSIDE, block.address, block.length)
            ready = [netlink.up(_LOOPBACK), configured, netlink.up(_INSIDE), netlink.default_route(_INSIDE, block.gateway)]
            inside.ask(ready)
        return Link(block, os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC))

    link = _in_new_namespace(build)
    try:
        _host_end(link.block, machine)
    except BaseException:
        os.close(link.fd)
        raise
    return link


def tap(blocks: Iterable[Block], machine: str) -> Link:
    """Make a tap whose host's end is up and return its descriptor, made for QEMU's `-netdev tap,fd=`."""
    held: list[int] = []

    try:
        block = _take(blocks, lambda name: held.append(_tun(name)))
        _host_end(block, machine)
    except BaseException:
        for fd in held:
            os.close(fd)
        raise
    return Link(block, held[0])


def bare_tap() -> int:
    """Make a tap that is down, without an address, under any name of ours, and return its descriptor."""
    try:
        return _tun(f"{PREFIX}-%d")
    except OSError as error:
        raise HostLacks(f"a tap cannot be made: {error.strerror}", hint="modprobe tun") from error


def loopback() -> int:
    """Make a network namespace with nothing but its loopback, which is up, and return its descriptor."""

    def build(_: int) -> Link:
        with Netlink() as inside:
            inside.ask([netlink.up(_LOOPBACK)])
        return Link(Block("0.0.0.0/0", 0), os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC))

    return _in_new_namespace(build).fd


def uplink_mtu() -> int:
    """Return the MTU of the interface with the host's default route: what goes through it must not be larger."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/net/route").read_text().splitlines()[1:]:
            interface, destination = line.split()[:2]
            if destination == "00000000":
                with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
                    request = fcntl.ioctl(any_socket, _SIOCGIFMTU, struct.pack("16si20x", interface.encode(), 0))
                return int(struct.unpack_from("=i", request, 16)[0])
    return 1500


def _tun(name: str) -> int:
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR))
    except BaseException:
        os.close(fd)
        raise
    return fd


def _pair(inside: Netlink, name: str, host: int, mac: str, mtu: int) -> None:
    inside.ask([netlink.new_veth(_INSIDE, INSIDE, mac, mtu, peer=name, peer_namespace=host)])


def _take(blocks: Iterable[Block], make: Callable[[str], None]) -> Block:
    """Make the interface of the first block that is free."""
    for block in blocks:
        try:
            make(block.interface)
            return block
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.EBUSY) or (error.errno == errno.EINVAL and _index(block.interface)):
                continue
            hint = "modprobe veth tun; root in a container needs CAP_NET_ADMIN"
            raise HostLacks(f"a network interface cannot be made: {error.strerror}", hint=hint) from error
    raise HostLacks("all addresses for machines are taken", hint="stop or delete a machine")


def _index(interface: str) -> int:
    try:
        return socket.if_nametoindex(interface)
    except OSError:
        return 0


def _host_end(block: Block, machine: str) -> None:
    name = block.interface
    try:
        # Before it is up: a machine may send no address but its own, and no IPv6.
        _sysctl(f"net/ipv4/conf/{name}/rp_filter", "1")
        _sysctl(f"net/ipv6/conf/{name}/disable_ipv6", "1")
        index = socket.if_nametoindex(name)
        with Netlink() as host:
            host.ask([netlink.address(index, block.gateway, block.length), netlink.up(index, alias=machine)])
    except OSError as error:
        raise EngineError(f"the interface {name} cannot be set up", output=str(error), machine=machine) from error


def _sysctl(name: str, value: str) -> None:
    path = Path("/proc/sys") / name
    try:
        path.write_text(value + "\n")
    except FileNotFoundError:  # a kernel without IPv6
        return


def _in_new_namespace(build: Callable[[int], Link]) -> Link:
    """Run `build` in a thread of its own in a network namespace of its own; it is given a descriptor of ours."""
    made: list[Link] = []
    failed: list[BaseException] = []

    def work() -> None:
        try:
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.unshare(_CLONE_NEWNET):
                code = ctypes.get_errno()
                raise HostLacks(f"a network namespace cannot be made: {os.strerror(code)}", hint="run as root")
            made.append(build(host))
        except BaseException as error:
            failed.append(error)

    host = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        thread = threading.Thread(target=work, name="trivisor-netns", daemon=True)
        thread.start()
        thread.join(_JOIN)
    finally:
        os.close(host)
    if failed:
        raise failed[0]
    if not made:
        raise EngineError(f"a network namespace was not ready within {_JOIN:g} s")
    return made[0]
