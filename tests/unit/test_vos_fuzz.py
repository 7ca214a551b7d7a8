"""Random bytes from a guest: nothing but GuestProtocolError and GuestGone comes out, and soon."""

from __future__ import annotations

import os
import random
import socket
import struct
import time
from pathlib import Path

import pytest

from trivisor.core.errors import FileError, GuestError, GuestGone, GuestProtocolError
from trivisor.vos import capture, command, wire
from trivisor.vos.files import Files
from trivisor.vos.line import Line
from trivisor.vos.processes import Processes
from trivisor.vos.wire import Type

SECONDS = float(os.environ.get("FUZZ_SECONDS", "6"))
STAT = struct.pack("<IQIIQ", 0o100644, 5, 0, 0, 0) + wire.string("")
TREE = b"d" + wire.string("") + bytes(20) + b"f" + wire.string("name") + bytes(20) + struct.pack("<Q", 4) + b"four" + b"e"


def conversation(stream: int) -> list[bytes]:
    """Frames that a good guest sends, the stuff that is mutated."""
    return [
        wire.frame(Type.STARTED, stream, struct.pack("<I", 7)),
        wire.frame(Type.DATA, stream, b"\1" + b"some output\n"),
        wire.frame(Type.DATA, stream, b"\1" + wire.string("name") + STAT),
        wire.frame(Type.DATA, stream, b"\1" + STAT),
        wire.frame(Type.DATA, stream, b"\1" + TREE),
        wire.frame(Type.DATA, stream, b"\2" + b"an error\n"),
        wire.frame(Type.WINDOW, stream, struct.pack("<BI", 0, 1000)),
        wire.frame(Type.DATA, stream, b"\1"),
        wire.frame(Type.OK, stream, b"fine"),
        wire.frame(Type.ERROR, stream, struct.pack("<I", 2) + wire.string("no")),
        wire.frame(Type.EXITED, stream, struct.pack("<BIQQQ", 0, 0, 1, 1, 1)),
        bytes(30),
    ]


def mutated(chance: random.Random) -> bytes:
    parts = conversation(1) + conversation(chance.randrange(4))
    data = bytearray(b"".join(chance.choices(parts, k=chance.randrange(1, 12))))
    for _ in range(chance.choice((0, 0, 1, 1, 2, 8))):
        at = chance.randrange(len(data))
        if (what := chance.randrange(4)) == 0:
            data[at] ^= 1 << chance.randrange(8)
        elif what == 1:
            data[at] = chance.choice((0, 1, 0x54, 0x7F, 0xFF))
        elif what == 2:
            del data[at : at + chance.randrange(1, 20)]
        else:
            data[at:at] = chance.randbytes(chance.randrange(1, 20))
        if not data:
            return b"\0"
    return bytes(data)


def attack(seed: int, folder: Path) -> bool:
    """Let one random guest answer one verb; say whether the line broke."""
    chance = random.Random(seed)
    ours, theirs = socket.socketpair()
    line = Line(ours, "test")
    processes = Processes(lambda: line, "test")
    files = Files(processes, timeout=20)
    verbs = (
        lambda: processes.exec(["x"], stdin=b"y" * chance.randrange(1000), timeout=20),
        lambda: processes.spawn(["x"]).wait(20),
        lambda: files.stat("/x"),
        lambda: files.list("/x"),
        lambda: files.read("/x", timeout=20),
        lambda: files.download("/x", folder / "x", max_size=1 << 20, timeout=20),
        lambda: line.request(Type.PING, timeout=20),
    )
    with theirs:
        theirs.sendall(mutated(chance))
        # All that the guest will say has been said and it leaves: no verb may take longer than to notice.
        theirs.shutdown(socket.SHUT_WR)
        try:
            chance.choice(verbs)()
        except (GuestProtocolError, GuestGone):
            return True
        except FileError as error:
            assert error.errno
        except GuestError as error:
            assert type(error) is GuestError  # not ExecTimeout: the end of the line is noticed at once
        finally:
            line.close()
    return False


@pytest.mark.fuzz
def test_random_guests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "KILL_WAIT", 0.05)
    monkeypatch.setattr(capture, "KILL_WAIT", 0.05)
    seed = int(os.environ.get("FUZZ_SEED", "1"))
    end, broken, rounds = time.monotonic() + SECONDS, 0, 0
    while time.monotonic() < end:
        seed, rounds, began = seed + 1, rounds + 1, time.monotonic()
        try:
            broken += attack(seed, tmp_path)
        except BaseException as error:
            error.add_note(f"FUZZ_SEED={seed - 1}")
            raise
        assert time.monotonic() - began < 15, f"FUZZ_SEED={seed - 1}"
    assert 0 < broken < rounds
