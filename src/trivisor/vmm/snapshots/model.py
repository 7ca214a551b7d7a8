"""What is known of a frozen machine, as the home writes it down and as a caller sees it."""

from __future__ import annotations

import re
from enum import StrEnum

import msgspec

from trivisor.core.errors import InvalidSpec
from trivisor.core.process import Who
from trivisor.core.spec import Spec, Wall

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
MOST_TAGS, MAX_TAG, MAX_NOTE = 64, 128, 4096


class Kind(StrEnum):
    """Whom a frozen machine is there for."""

    SNAPSHOT = "snapshot"
    """Whoever asks for it by its name."""
    SUSPEND = "suspend"
    """The machine that it is."""
    FORK = "fork"
    """The machines that were made from it. One that nobody needs any more is removed: so too with the two above it, and below."""
    LEFT = "left"
    """The same, of a snapshot that was removed."""
    GONE = "gone"
    """Nobody: it is being removed."""


class About(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is never asked for by value."""

    memory: bool = False
    note: str = ""
    tags: tuple[str, ...] = ()
    paused: float = 0.0
    quiesced: bool = False
    needs: dict[str, str] = {}
    facts: dict[str, str] = {}
    manifest: str = ""
    """Digest of what lists the pieces that it is kept in; "" for one that is kept in no pieces."""
    size: int = 0
    """Bytes that it was frozen in, holes not counted."""


class Kept(msgspec.Struct, frozen=True, kw_only=True):
    """One frozen machine as it is written down. Times are seconds since the epoch."""

    id: str
    kind: Kind
    machine: str
    """Id of the machine that it is of."""
    name: str
    """That machine's name, then."""
    ref: str | None = None
    """ "machine@name" of a snapshot."""
    maker: Who | None = None
    """Who makes or removes it, or forks machines from it, until that is done."""
    created: float
    used: float
    expires: float | None = None
    keep: bool = False
    parent: str = ""
    """The snapshot that its machine came from, or was last taken before."""
    digest: str
    """Of the machine's image."""
    spec: Spec
    about: About = About()

    @property
    def listed(self) -> bool:
        """Whether a caller can see it."""
        return self.kind is Kind.SNAPSHOT and self.maker is None


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot, as it is listed. Times are seconds since the epoch, sizes bytes."""

    id: str
    ref: str
    """ "machine@name": what `vmm.create(snapshot=...)` takes."""
    name: str
    machine: str
    """The name that its machine had."""
    machine_id: str
    wall: Wall
    memory: bool
    """Whether it goes on where it stood; else it starts anew, on the files as they were."""
    image: str
    created: float
    used: float
    """When a machine last came from it."""
    expires: float | None
    keep: bool
    """It is pruned by nobody."""
    note: str
    tags: tuple[str, ...]
    parent: str
    """The ref of the snapshot before it; "" if there is none."""
    paused: float
    """Seconds for which the machine stood still for it."""
    quiesced: bool
    needs: dict[str, str]
    """What a host must have to run it."""
    facts: dict[str, str]
    size: int


def public(kept: Kept, parent: str) -> Snapshot:
    """Return what a caller sees, `parent` being the ref of the one before."""
    about = kept.about
    return Snapshot(
        id=kept.id,
        ref=kept.ref or "",
        name=(kept.ref or "").rpartition("@")[2],
        machine=kept.name,
        machine_id=kept.machine,
        wall=kept.spec.wall,
        memory=about.memory,
        image=kept.spec.image,
        created=kept.created,
        used=kept.used,
        expires=kept.expires,
        keep=kept.keep,
        note=about.note,
        tags=about.tags,
        parent=parent,
        paused=about.paused,
        quiesced=about.quiesced,
        needs=about.needs,
        facts=about.facts,
        size=about.size,
    )


def check_name(name: str) -> str:
    """Return the name of a snapshot. Raises InvalidSpec."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise InvalidSpec(f"snapshot name {name!r} cannot be", hint="letters, digits, and . _ - after the first; 63 at most")
    return name


def check_words(note: str, tags: tuple[str, ...]) -> None:
    """Raise InvalidSpec for a note or tags that cannot be kept."""
    if not isinstance(note, str) or len(note) > MAX_NOTE or "\0" in note:
        raise InvalidSpec(f"a note is text of at most {MAX_NOTE} characters")
    if len(tags) > MOST_TAGS or not all(isinstance(tag, str) and 0 < len(tag) <= MAX_TAG and tag.isprintable() for tag in tags):
        raise InvalidSpec(f"tags are at most {MOST_TAGS} words of at most {MAX_TAG} characters")
