"""Runs in a machine, not on the host: sends frames to the host's loopback that no honest kernel would send.

    forge_frame.py TCP-PORT UDP-PORT OWN-ADDRESS

Prints "no answer" if nothing comes back for any of them.
"""

import fcntl
import itertools
import socket
import struct
import sys

SIOCGIFHWADDR = 0x8927


def checksum(data: bytes) -> int:
    data += b"\0" * (len(data) % 2)
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total >> 16) + (total & 0xFFFF)
    return ~total & 0xFFFF


def packet(source: str, target: str, protocol: int, body: bytes, at: int, options: bytes = b"") -> bytes:
    """An IPv4 packet whose checksums are right; the transport's lies at `at` in the body."""
    addresses = socket.inet_aton(source) + socket.inet_aton(target)
    whole = checksum(addresses + struct.pack("!BBH", 0, protocol, len(body)) + body)
    body = body[:at] + struct.pack("!H", whole) + body[at + 2 :]
    length = 20 + len(options)
    header = struct.pack("!BBHHHBBH", 0x40 | length // 4, 0, length + len(body), 1, 0, 64, protocol, 0) + addresses + options
    return header[:10] + struct.pack("!H", checksum(header)) + header[12:] + body


def main() -> None:
    tcp, udp = int(sys.argv[1]), int(sys.argv[2])
    wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0003))
    wire.bind(("eth0", 0))
    mine = fcntl.ioctl(wire, SIOCGIFHWADDR, struct.pack("40s", b"eth0"))[18:24]
    sport = 40000
    for target, source, options in itertools.product(
        ("127.0.0.1", "127.1.2.3", "0.0.0.0"), (sys.argv[3], "127.0.0.1", "127.0.0.9"), (b"", b"\1\1\1\0")
    ):
        sport += 1
        syn = struct.pack("!HHIIBBHHH", sport, tcp, 1, 0, 5 << 4, 2, 65535, 0, 0)
        data = struct.pack("!HHHH", sport, udp, 8 + 4, 0) + b"evil"
        for body, protocol, at in ((syn, 6, 16), (data, 17, 6)):
            forged = packet(source, target, protocol, body, at, options)
            wire.send(b"\xff" * 6 + mine + b"\x08\x00" + forged)
            wire.send(b"\xff" * 6 + mine + b"\x81\x00\x00\x01\x08\x00" + forged)
    wire.settimeout(1.5)
    try:
        while True:
            frame = wire.recv(2000)
            ours = frame[6:12] == mine or frame[12:14] != b"\x08\x00"
            # A reset is passt's own word that nobody is there; anything else came from the host's loopback.
            if not ours and not (frame[23] == 6 and frame[14 + (frame[14] & 15) * 4 + 13] & 4):
                print("an answer:", frame.hex())
                return
    except TimeoutError:
        print("no answer")


main()
