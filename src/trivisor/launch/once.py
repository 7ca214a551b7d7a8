"""A plan carried out to its end: a program that is run jailed, heard, and waited for."""

from __future__ import annotations

import os
import selectors
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import IO

from trivisor.launch import tvinit
from trivisor.launch.plan import Plan, encode

MAX = 1 << 20
"""Bytes that are kept of the end of each stream."""
_CHUNK = 1 << 16


@dataclass(frozen=True)
class Done:
    """How it ended: `status` as subprocess has it (128 and more: the program died of a signal), the ends of what it wrote and said."""

    status: int
    out: bytes
    said: str
    timed_out: bool = False


def run(plan: Plan, timeout: float, fds: Sequence[int] = (), *, heard: Callable[[bytes], object] | None = None) -> Done:
    """Carry `plan` out, with the descriptors `fds` that it names, and return how its program ended; killed after `timeout` seconds.

    `heard` is given what it writes, as it comes; what that raises, and a Ctrl-C, ends the program too: it dies with its parent.
    """
    with open(os.memfd_create("plan"), "r+b") as memory:
        memory.write(encode(plan))
        memory.flush()
        memory.seek(0)
        command = [str(tvinit.path()), "launch", str(memory.fileno())]
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, pass_fds=[memory.fileno(), *fds]
        ) as process:
            try:
                ends = _listen(process, time.monotonic() + timeout, heard)
            except BaseException:
                process.kill()
                raise
            if ends is None:
                process.kill()
                return Done(-1, b"", f"it took over {timeout:g} s", timed_out=True)
            out, said = ends
        return Done(process.returncode, out, said.decode(errors="replace").strip())


def _listen(process: subprocess.Popen[bytes], deadline: float, heard: Callable[[bytes], object] | None) -> tuple[bytes, bytes] | None:
    """Read both streams to their ends and wait; None if that is not before the deadline."""
    assert process.stdout is not None and process.stderr is not None
    kept: dict[IO[bytes], bytes] = {process.stdout: b"", process.stderr: b""}
    with selectors.DefaultSelector() as selector:
        for stream in kept:
            selector.register(stream, selectors.EVENT_READ)
        while selector.get_map():
            left = deadline - time.monotonic()
            if left <= 0:
                return None
            for key, _ in selector.select(left):
                assert not isinstance(key.fileobj, int)
                stream = process.stdout if key.fileobj is process.stdout else process.stderr
                data = os.read(key.fd, _CHUNK)
                if not data:
                    selector.unregister(stream)
                elif heard is not None and stream is process.stdout:
                    heard(data)
                kept[stream] = (kept[stream] + data)[-MAX:]
    try:
        process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return None
    return kept[process.stdout], kept[process.stderr]
