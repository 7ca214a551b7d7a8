"""The peer of bench/life.py: plain QEMU with its default options, booting the same kernel file and initramfs.

What it is measured by is the guest program's first answer and its first command, over a virtio serial port as ours. The command is
one of tvinit's own, in the initramfs: less than ours does, which has mounted an image's root by then.
"""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trivisor.vos import wire
from trivisor.vos.wire import Flag, Type

NAME = "plain QEMU"
MEMORY = 256
STREAM = 1 << 16 | 1
RESYNC = bytes(12 + 32768)
BOOT = 60.0


@contextmanager
def plain_qemu(qemu: str, kernel: Path, initramfs: Path) -> Iterator[tuple[subprocess.Popen[bytes], socket.socket]]:
    """Run it; give the process and our end of the line. It is killed at the end."""
    ours, theirs = socket.socketpair()
    argv = [qemu, "-m", str(MEMORY), "-display", "none", "-serial", "null", "-monitor", "none"]
    argv += ["-kernel", str(kernel), "-initrd", str(initramfs), "-append", "console=ttyS0 panic=-1"]
    argv += ["-chardev", f"socket,id=line,fd={theirs.fileno()}", "-device", "virtio-serial-pci"]
    argv += ["-device", "virtserialport,chardev=line,name=trivisor.line"]
    with ours, theirs:
        process = subprocess.Popen(argv, pass_fds=[theirs.fileno()], stderr=subprocess.DEVNULL)
        try:
            yield process, ours
        finally:
            process.kill()
            process.wait()


def first_command(line: socket.socket) -> None:
    """Synchronise, as a keeper does, and run one command to its end. Raises TimeoutError."""
    nonce = os.urandom(16)
    line.settimeout(BOOT)
    line.sendall(RESYNC + wire.frame(Type.SYNC, 0, nonce + (1).to_bytes(4, "little")))
    parser = wire.Parser()
    _until(line, parser, Type.SYNCED, nonce)
    request = wire.exec_request(("list", "/"), (), flags=Flag.BUILTIN | Flag.NO_STDIN)
    for frame in wire.exec_frames(STREAM, request):
        line.sendall(frame)
    _until(line, parser, Type.EXITED, b"")


def _until(line: socket.socket, parser: wire.Parser, wanted: int, begins: bytes) -> None:
    end = time.monotonic() + BOOT
    while time.monotonic() < end:
        received = line.recv_into(parser.space())
        if not received:
            break
        for kind, _stream, payload in parser.frames(received):
            if kind == wanted and bytes(payload).startswith(begins):
                return
    raise TimeoutError(f"{NAME} did not answer")
