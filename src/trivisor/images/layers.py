"""Unpacking an image's layers, each into a folder of its own: several at a time, in the order in which one lies over the other.

Reading, unpacking and writing the files of a layer (place.stage) needs nothing of the others, and most of it happens outside the
interpreter's lock. Where they go depends on the layers below (delta.py), so that comes one after the other, and is quick.
"""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from threading import Event

from trivisor.core.errors import ImageError
from trivisor.images.delta import Delta
from trivisor.images.documents import Documents
from trivisor.images.layer import lay
from trivisor.images.limits import DEFAULT, Limits
from trivisor.images.place import Owners, Staged, stage, write
from trivisor.images.stream import Hashed, Section, unpack
from trivisor.images.tarread import Meter
from trivisor.store.store import Store

Progress = Callable[[str], None]
ROOT = "root"
_WORKERS = max(2, min(4, os.cpu_count() or 1))


class Unstackable(Exception):
    """The file system takes none of overlayfs's marks: no user attributes, or no whiteouts."""


def unpack_layers(
    store: Store,
    documents: Documents,
    folders: Sequence[Path],
    missing: Sequence[int],
    work: Path,
    progress: Progress,
    owners: Owners,
    *,
    limits: Limits = DEFAULT,
) -> None:
    """Unpack the layers with the numbers `missing` into their `folders`, of which the others are there. `work` is for half-made things.

    Raises ImageError, NotFound, OSError, Unstackable.
    """
    stop, meter = Event(), Meter()
    with ExitStack() as stack:
        ahead = stack.enter_context(ThreadPoolExecutor(_WORKERS))
        pool = stack.enter_context(ThreadPoolExecutor(_WORKERS))
        stack.callback(stop.set)

        def read(number: int) -> Staged:
            layer = documents.manifest.layers[number]
            with store.path(layer.digest).open("rb") as file:
                section = Section(file.fileno(), 0, layer.size, layer.digest)
                stream = Hashed(unpack(section, limits), limits, ahead)
                return stage(stream, work / f"staged-{number}", limits, meter, stop, owners)

        reading = deque(pool.submit(read, number) for number in missing)
        for number in missing:
            progress(f"unpacking layer {number + 1} of {len(documents.manifest.layers)}")
            staged = reading.popleft().result()
            if staged.digest != documents.config.rootfs.diff_ids[number]:
                digest = documents.manifest.layers[number].digest
                raise ImageError(f"{digest}: the layer is not what the image's config says", hint="get the image again")
            delta = Delta(limits, documents.manifest.layers[number].digest, [folder / ROOT for folder in folders[:number][::-1]])
            delta.layer = number
            lay(delta, staged.entries, 0, layered=True)
            delta.need()
            folders[number].mkdir(mode=0o755)
            try:
                write(delta, staged, folders[number] / ROOT, owners)
            except OSError as error:
                if error.errno == errno.ENOTSUP:
                    raise Unstackable from error
                raise
