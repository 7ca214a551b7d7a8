"""The pcap file format, with nanoseconds (draft-ietf-opsawg-pcap)."""

from __future__ import annotations

import struct

ETHERNET = 1
_MAGIC = 0xA1B23C4D
_HEADER = struct.Struct("<IHHiIII")
_RECORD = struct.Struct("<IIII")


def header(snaplen: int) -> bytes:
    """Return what a file begins with."""
    return _HEADER.pack(_MAGIC, 2, 4, 0, 0, snaplen, ETHERNET)


def record(time_ns: int, data: bytes, length: int) -> bytes:
    """Return one packet of `length` bytes, of which `data` was kept. `time_ns` is since the epoch."""
    return _RECORD.pack(time_ns // 1_000_000_000, time_ns % 1_000_000_000, len(data), length) + data
