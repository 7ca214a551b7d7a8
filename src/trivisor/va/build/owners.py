"""--chown: names of users and groups, as the image itself has them (passwd(5), group(5))."""

from __future__ import annotations

from trivisor.images.view import View, resolve
from trivisor.va.build.copy import CopyError

_MAX = 1 << 20
_MAX_ID = 0xFFFFFFFE


def find(text: str, root: View) -> tuple[int, int]:
    """Return the numbers of `user[:group]`; without a group it has the number of the user. Raises CopyError."""
    user, colon, group = text.partition(":")
    uid = _number(user, root, "etc/passwd", "user")
    return uid, _number(group, root, "etc/group", "group") if colon else uid


def _number(text: str, root: View, file: str, what: str) -> int:
    if text.isdecimal() and len(text) <= 10 and int(text) <= _MAX_ID:
        return int(text)
    node = resolve(root, file)
    lines = b""
    if node is not None and node.kind == "f":
        with node.open() as stream:
            lines = stream.read(_MAX)
    for line in lines.decode("utf-8", "surrogateescape").splitlines():
        fields = line.split(":")
        if len(fields) > 2 and fields[0] == text and fields[2].isdecimal() and int(fields[2]) <= _MAX_ID:
            return int(fields[2])
    raise CopyError(f"the image has no {what} {text[:60]!r}", f"give a number, or make the {what} in a RUN before")
