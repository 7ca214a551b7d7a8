"""How an image wants its machines to be run (OCI image-spec, config.md, "config"), read once a process and checked.

The config comes from whoever made the image: what it says is bounded here, before a machine is made of it.
"""

from __future__ import annotations

import posixpath
import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from trivisor.core.errors import ImageError, InvalidSpec
from trivisor.images import host
from trivisor.images.catalog import Image, Images
from trivisor.images.model import Healthcheck, ImageConfig, RunConfig

MAX_USER = 255
MAX_PATH = 4095
MAX_PLACES = 256
"""Volumes, and exposed ports, that one image may have."""
MAX_PUBLISHED = 64
MAX_TEXT = 64 << 10
"""Bytes of an image's labels, all together."""
LONGEST = 24 * 3600.0
"""Seconds that a time of a health check may be."""
MAX_RETRIES = 1000
STOP_SIGNAL = signal.SIGTERM.value
_NANO = 1e9
_REAL_TIME = re.compile(r"RT(MIN|MAX)(?:([+-])(\d{1,2}))?")
_PORT = re.compile(r"(\d{1,5})(?:-(\d{1,5}))?(?:/(tcp|udp|sctp))?")


class Refused(ValueError):
    """What an image wants cannot be done, in words that go on from "the config": "its user ... is"."""


@dataclass(frozen=True)
class Health:
    """How a machine of the image is found well or not. Times are seconds."""

    argv: tuple[str, ...]
    """A command; exit status 0: well."""
    interval: float = 30.0
    timeout: float = 30.0
    start_period: float = 0.0
    """So long after the program's start a failure is not counted, until the first that is well."""
    start_interval: float = 5.0
    retries: int = 3
    """So many failures in a row, and it is not well."""


@dataclass(frozen=True)
class Wanted:
    """A config that was checked; what it does not say is empty."""

    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    user: str = ""
    cwd: str = ""
    volumes: tuple[str, ...] = ()
    ports: tuple[tuple[int, str], ...] = ()
    """Exposed ports with their protocols."""
    stop_signal: int = STOP_SIGNAL
    health: Health | None = None

    def argv(self, args: Sequence[str] | None = None, entrypoint: Sequence[str] | str | None = None) -> list[str]:
        """Return what is run: the entrypoint with `args`, which are the image's own cmd if they are None.

        With another `entrypoint` (a text is one word, an empty one none) that cmd, which was meant for its own, is left out. Raises
        InvalidSpec if nothing is to be run.
        """
        if entrypoint is None:
            words = [*self.entrypoint, *(self.cmd if args is None else args)]
        else:
            words = [*([entrypoint] if isinstance(entrypoint, str) else entrypoint), *(args or ())]
        words = words[1:] if words[:1] == [""] else words
        if not words:
            raise InvalidSpec("the image does not say what is to be run", hint='say it: launch(["server", "--port", "80"])')
        return words


def wanted(images: Images, digest: str) -> Wanted:
    """Return what the image with this digest wants. Raises ImageError, NotFound, StorageError."""
    if digest.startswith(host.PREFIX):
        return Wanted()
    found = _known.get(digest)
    if found is None:
        if len(_known) >= 256:
            _known.clear()
        found = _known[digest] = of(images.config(digest), digest[:19])
    return found


def of(config: ImageConfig, image: str) -> Wanted:
    """Read a config. Raises ImageError for one that no machine can be run by."""
    try:
        return read(config.run)
    except Refused as error:
        hint = "`trivisor inspect` shows it; the image has to be made anew"
        raise ImageError(f"the config of image {image} cannot be followed: {error}", hint=hint) from None


def exposed(image: Image) -> list[int]:
    """Return the TCP ports that an image exposes. Raises ImageError, InvalidSpec if they are too many to be published all."""
    found = [port for port, protocol in of(image.config, image.name).ports if protocol == "tcp"]
    if len(found) > MAX_PUBLISHED:
        hint = "say which ones: {8080: 80}"
        raise InvalidSpec(f"image {image.name} exposes {len(found)} ports, at most {MAX_PUBLISHED} are published by themselves", hint=hint)
    return found


_known: dict[str, Wanted] = {}
"""By digest, which means one config for ever."""


def read(run: RunConfig) -> Wanted:
    """Read how an image wants to be run. Raises Refused, in words, for what cannot be followed."""
    labels = sum(len(key) + len(value) for key, value in (run.labels or {}).items())
    if labels > MAX_TEXT:
        raise Refused(f"its labels are {labels} bytes, {MAX_TEXT} are the most")
    for what, words in (("entrypoint", run.entrypoint), ("cmd", run.cmd)):
        if any("\0" in word for word in words or ()):
            raise Refused(f"a word of its {what} holds a NUL")
    return Wanted(
        entrypoint=tuple(run.entrypoint or ()),
        cmd=tuple(run.cmd or ()),
        user=_user(run.user or ""),
        cwd=_cwd(run.working_dir or ""),
        volumes=tuple(_volumes(run)),
        ports=tuple(_ports(run)),
        stop_signal=stop_signal(run.stop_signal) if run.stop_signal else STOP_SIGNAL,
        health=_health(run.healthcheck, run.shell or ["/bin/sh", "-c"]) if run.healthcheck else None,
    )


@lru_cache(maxsize=64)
def stop_signal(text: str) -> int:
    """Return the number of a signal: SIGTERM, TERM, 15, RTMIN+3. Raises Refused."""
    word = text.upper().removeprefix("SIG")
    if word.isdecimal() and len(word) < 4:
        number = int(word)
    elif match := _REAL_TIME.fullmatch(word):
        away = int(match[3] or 0) * (-1 if match[2] == "-" else 1)
        number = (34 if match[1] == "MIN" else 64) + away  # as every libc of Linux has them (signal(7)), whatever ours is
        number = number if 34 <= number <= 64 else 0
    else:
        number = next((one.value for one in signal.Signals if one.name == f"SIG{word}"), 0)
    if not 1 <= number <= 64:
        raise Refused(f"its stop signal {text[:40]!r} is no signal")
    return number


def _user(user: str) -> str:
    if len(user) > MAX_USER or not user.isprintable() or " " in user or user.count(":") > 1 or user.startswith(":"):
        raise Refused(f"its user {user[:40]!r} is neither a name nor a number, with or without a group")
    return user


def _cwd(path: str) -> str:
    if path and not path.startswith("/"):
        raise Refused(f"its working folder {path[:80]!r} does not begin with a slash")
    return _path(path, "working folder") if path else ""


def _path(path: str, what: str) -> str:
    if "\0" in path or len(path.encode("utf-8", "surrogateescape")) > MAX_PATH:
        raise Refused(f"its {what} {path[:80]!r} is no path")
    return "/" + posixpath.normpath(path).lstrip("/")


def _volumes(run: RunConfig) -> list[str]:
    found = sorted({_path("/" + volume, "volume") for volume in run.volumes or ()})
    if len(found) > MAX_PLACES or "/" in found or any(".." in path.split("/") for path in found):
        raise Refused(f"it has over {MAX_PLACES} volumes, or one that is its root")
    return found


def _ports(run: RunConfig) -> list[tuple[int, str]]:
    found: set[tuple[int, str]] = set()
    for text in run.exposed_ports or ():
        match = _PORT.fullmatch(text)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if match is None or not 1 <= first <= last <= 65535:
            raise Refused(f"its exposed port {text[:40]!r} is no port")
        found.update((port, match[3] or "tcp") for port in range(first, last + 1))
    return sorted(found)


def _health(check: Healthcheck, shell: Sequence[str]) -> Health | None:
    test = check.test or []
    if test[:1] in ([], ["NONE"]):
        return None
    kind, *words = test
    if kind not in ("CMD", "CMD-SHELL") or not words or (kind == "CMD-SHELL" and len(words) > 1) or any("\0" in word for word in words):
        raise Refused(f"its health check begins {kind[:40]!r}, or has no command")
    times = [getattr(check, name) / _NANO for name in ("interval", "timeout", "start_period", "start_interval")]
    if not all(0 <= time <= LONGEST for time in times) or not 0 <= check.retries <= MAX_RETRIES:
        raise Refused(f"a time of its health check is over {LONGEST / 3600:g} hours or under 0, or its retries are over {MAX_RETRIES}")
    interval, timeout, start_period, start_interval = times
    argv = tuple(words) if kind == "CMD" else (*shell, words[0])
    return Health(argv, interval or 30.0, timeout or 30.0, start_period, start_interval or 5.0, check.retries or 3)
