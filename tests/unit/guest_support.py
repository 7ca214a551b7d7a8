"""The guest program itself, run on the host with one end of a socket pair as its line."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from raw_line import RawLine

from trivisor.launch import tvinit


@dataclass(frozen=True)
class Guest:
    """A guest that runs, and the synchronised line to it."""

    process: subprocess.Popen[bytes]
    line: RawLine


@contextmanager
def running_guest() -> Iterator[Guest]:
    """Run one; at the end the line is closed, upon which it has to end by itself."""
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen([tvinit.path(), "guest", "--fd", str(theirs.fileno())], pass_fds=[theirs.fileno()])
    try:
        line = RawLine(ours)
        line.sync()
        yield Guest(process, line)
    finally:
        ours.close()
        try:
            process.wait(30)
        finally:
            process.kill()
            process.wait()
