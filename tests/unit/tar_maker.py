"""Tar archives byte by byte, also those that no tar program would write."""

from __future__ import annotations

from collections.abc import Iterable

END = bytes(1024)


def number(value: int, width: int) -> bytes:
    if 0 <= value < 8 ** (width - 1):
        return b"%0*o\0" % (width - 1, value)
    return (value & ((1 << (8 * width)) - 1) | (1 << (8 * width - 1))).to_bytes(width, "big")


def block(
    name: str | bytes,
    kind: str = "0",
    *,
    size: int = 0,
    mode: int = 0o644,
    uid: int = 0,
    gid: int = 0,
    mtime: int = 1000,
    target: str | bytes = "",
    device: tuple[int, int] = (0, 0),
    prefix: bytes = b"",
    tail: bytes = b"",
    checksum: int | None = None,
) -> bytes:
    """One header. `tail` replaces what begins at byte 386 (GNU's sparse map)."""
    raw = name if isinstance(name, bytes) else name.encode()
    link = target if isinstance(target, bytes) else target.encode()
    magic = b"ustar  \0" if tail else b"ustar\x0000"
    body = b"".join(
        (
            raw[:100].ljust(100, b"\0"),
            number(mode, 8),
            number(uid, 8),
            number(gid, 8),
            number(size, 12),
            number(mtime, 12),
            b" " * 8,
            kind.encode(),
            link[:100].ljust(100, b"\0"),
            magic,
            bytes(64),
            number(device[0], 8),
            number(device[1], 8),
            prefix.ljust(155, b"\0"),
            bytes(12),
        )
    )
    if tail:
        body = body[:386] + tail.ljust(126, b"\0")
    total = sum(body) if checksum is None else checksum
    return body[:148] + b"%06o\0 " % total + body[156:]


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def file(name: str | bytes, data: bytes = b"", **fields: object) -> bytes:
    return block(name, size=len(data), **fields) + padded(data)  # type: ignore[arg-type]


def folder(name: str, **fields: object) -> bytes:
    return block(name, "5", **{"mode": 0o755, **fields})  # type: ignore[arg-type]


def symlink(name: str, target: str) -> bytes:
    return block(name, "2", target=target)


def hardlink(name: str, target: str) -> bytes:
    return block(name, "1", target=target)


def record(key: bytes, value: bytes) -> bytes:
    rest = len(key) + len(value) + 3
    length = rest + len(str(rest))
    length = rest + len(str(length))
    return b"%d %s=%s\n" % (length, key, value)


def pax(records: Iterable[tuple[bytes, bytes]], kind: str = "x") -> bytes:
    data = b"".join(record(key, value) for key, value in records)
    return block("pax", kind, size=len(data)) + padded(data)


def gnu_long(kind: str, name: bytes) -> bytes:
    return block("././@LongLink", kind, size=len(name) + 1) + padded(name + b"\0")
