"""Where the members of a kernel's structures lie, from the types that it carries (BTF: Documentation/bpf/btf.rst). Pure."""

from __future__ import annotations

import struct
from collections.abc import Iterable

_MAGIC = 0xEB9F
_STRUCT, _UNION = 4, 5
_EACH = {3: (12, 0), 1: (4, 0), 4: (0, 12), 5: (0, 12), 6: (0, 8), 13: (0, 8), 14: (4, 0), 15: (0, 12), 17: (4, 0), 19: (0, 12)}
"""Kind, to the bytes that follow a type: always, and for each of its members."""
_KINDS = 20
_DEEP = 8


class NoTypes(ValueError):
    """These are no types, or they lack one that is needed."""


class Types:
    """The types in one .BTF section."""

    def __init__(self, data: bytes) -> None:
        try:
            magic, _, _, header, types, length, strings, size = struct.unpack_from("<HBBIIIII", data)
        except struct.error as error:
            raise NoTypes("the types are cut short") from error
        if magic != _MAGIC or header + types + length > len(data) or header + strings + size > len(data):
            raise NoTypes("these are no types")
        self._data = data
        self._strings = header + strings
        self._end = header + strings + size
        self._places = self._walk(header + types, header + types + length)

    def offsets(self, wanted: Iterable[str]) -> dict[str, int]:
        """Return the offsets in bytes of members, each named "structure.member"; what there is not is left out."""
        wishes: dict[bytes, dict[bytes, str]] = {}
        for name in wanted:
            structure, _, member = name.partition(".")
            wishes.setdefault(structure.encode(), {})[member.encode()] = name
        found: dict[str, int] = {}
        for place in self._places[1:]:
            name_at, info, _ = struct.unpack_from("<III", self._data, place)
            if info >> 24 & 0x1F == _STRUCT and info & 0xFFFF and (members := wishes.get(self._text(name_at))):
                for field, bits in self._members(place, 0, _DEEP):
                    if field in members:
                        found.setdefault(members[field], bits // 8)
        return found

    def _walk(self, at: int, end: int) -> list[int]:
        places = [0]  # type 0 is void
        while at < end:
            if at + 12 > end:
                raise NoTypes("the types are cut short")
            places.append(at)
            (info,) = struct.unpack_from("<I", self._data, at + 4)
            kind = info >> 24 & 0x1F
            if kind == 0 or kind >= _KINDS:
                raise NoTypes(f"a type is of an unknown kind, {kind}")
            always, each = _EACH.get(kind, (0, 0))
            at += 12 + always + each * (info & 0xFFFF)
        if at != end:
            raise NoTypes("the types are cut short")
        return places

    def _members(self, place: int, base: int, depth: int) -> Iterable[tuple[bytes, int]]:
        """Yield the members of a structure and those of the nameless ones in it, with offsets in bits."""
        _, info, _ = struct.unpack_from("<III", self._data, place)
        if info >> 24 & 0x1F not in (_STRUCT, _UNION) or depth == 0:
            return
        fields = info >> 31
        for name_at, kind, offset in struct.iter_unpack("<III", self._data[place + 12 : place + 12 + 12 * (info & 0xFFFF)]):
            bits = base + (offset & 0xFFFFFF if fields else offset)
            if name_at:
                yield self._text(name_at), bits
            elif 0 < kind < len(self._places):
                yield from self._members(self._places[kind], bits, depth - 1)

    def _text(self, at: int) -> bytes:
        begin = self._strings + at
        end = self._data.find(b"\0", begin, self._end)
        return self._data[begin:end] if end >= 0 else b""
