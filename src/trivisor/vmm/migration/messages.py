"""What source and target say to each other, and its bounds. All of it is read as if the other were hostile."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from trivisor.core.errors import MigrationError

VERSION = 1
MAX_MESSAGE = 1 << 20
MAX_DATA = 256 << 10
_TEXT = 4000

Name = Annotated[str, msgspec.Meta(max_length=400)]
Text = Annotated[str, msgspec.Meta(max_length=_TEXT)]
Size = Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]


class Hardware(msgspec.Struct, frozen=True, kw_only=True):
    """What the guest believes to run on, and what runs it: the target must have the same. Sizes are bytes."""

    shape: dict[str, Any]
    """As the engine itself knows it, which made it (engines/vm/argv.py)."""
    needs: Annotated[dict[Name, Name], msgspec.Meta(max_length=40)]
    """What the target must be (vmm/freezer.py)."""
    words: Name
    """Digest of the engine's command line, without what differs between hosts."""
    root: Name
    """SHA-256 of the root's file, which the guest has mounted."""
    memory: Size
    disk: Size | None
    """Of the writable layer; None: it is in memory."""
    taken: Size
    """What that takes of the source's disk."""


class Hello(msgspec.Struct, frozen=True, kw_only=True, tag="hello"):
    """The source: what is to come."""

    version: int
    machine: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{12}$")]
    spec: dict[str, Any]
    image: Name
    """What the image is called there."""
    digest: Annotated[str, msgspec.Meta(pattern="^sha256:[0-9a-f]{64}$")]
    hardware: Hardware
    ttl: Annotated[float, msgspec.Meta(gt=0, lt=1e9)] | None
    """Seconds that it may still run."""


class Wants(msgspec.Struct, frozen=True, tag="wants"):
    """The target: whether the image is to be sent before."""

    image: bool


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The target waits for disk and memory."""


class Loaded(msgspec.Struct, frozen=True, tag="loaded"):
    """The target has all of it, and it does not run."""


class Go(msgspec.Struct, frozen=True, tag="go"):
    """The source gives the machine up."""


class Running(msgspec.Struct, frozen=True, kw_only=True, tag="running"):
    """The target runs it, for so many seconds."""

    seconds: Annotated[float, msgspec.Meta(ge=0, lt=1e6)]


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """Either: it is over, and nothing of the machine is or will be run here that was not before."""

    why: Text
    hint: Text = ""


Message = Hello | Wants | Ready | Loaded | Go | Running | Failed
_ENCODER = msgspec.json.Encoder()
_DECODER: msgspec.json.Decoder[Message] = msgspec.json.Decoder(Message)


def encode(message: Message) -> bytes:
    """Return the bytes of a message."""
    return _ENCODER.encode(message)


def decode(data: bytes) -> Message:
    """Return the message in `data`. Raises MigrationError for what is none."""
    try:
        return _DECODER.decode(data)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise MigrationError(f"the other side said what is no message: {str(error)[:200]}", hint="is it the same version?") from error


def failed(error: BaseException) -> Failed:
    """Return what the other side is told of an error."""
    said, hint = str(error) or type(error).__name__, str(getattr(error, "hint", ""))
    return Failed(_plain(said), _plain(hint))


def _plain(text: str) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in text)[: _TEXT // 2]
