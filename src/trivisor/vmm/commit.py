"""Machine.commit: what a machine wrote becomes a layer, and with what is below it an image.

The layer is packed in a workspace of the store, whose lease holds it until the image names it: killed anywhere, nothing is left but what
the next collection removes, and the machine is as it was.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from trivisor.core.errors import GuestError, InvalidSpec
from trivisor.core.state import State
from trivisor.images import compose, host
from trivisor.images.catalog import Image
from trivisor.images.compose import Stacked
from trivisor.images.model import History, RunConfig
from trivisor.images.pack import PackedLayer
from trivisor.vmm import changes, life, runconfig
from trivisor.vmm.changes import Reader
from trivisor.vmm.context import Context
from trivisor.vmm.records import Row
from trivisor.vmm.snapshots import thawing
from trivisor.vos import guest

_SYNC = 60.0
FIELDS = ("env", "entrypoint", "cmd", "user", "working_dir", "labels", "exposed_ports", "volumes", "stop_signal")


def commit(context: Context, machine: str, name: str, *, config: Mapping[str, Any], author: str, message: str) -> Image:
    """Make the image `name` of the machine's image and what the machine wrote. Raises what Machine.commit raises."""
    images = context.images
    now = time.time()
    with images.workspace() as work, still(context, machine) as row:
        if row.digest.startswith(host.PREFIX):
            raise InvalidSpec("a machine on the host's own root has no image to add to", machine=row.name)
        documents = images.documents(row.digest)
        run = changed(documents.config.run, config)
        packed = pack(context, row, work.path / "layer", without=runconfig.wanted(images, row.digest).volumes)
        size = packed.size
        digest = images.store.adopt(packed.path, work.owner, expected=packed.digest)
        layers = [*compose.stack_of(documents), Stacked(packed.descriptor, packed.diff_id)]
        entry = History(compose.stamp(now), f"commit of {row.name}", author, message)
        image = compose.add(
            images,
            work,
            layers,
            run,
            [*(documents.config.history or ()), entry],
            name=name,
            source=f"commit of {row.name}",
            created=now,
            author=author or documents.config.author,
            platform=documents.config.platform,
        )
        context.records.note("committed", f"{row.name} as {image.name} ({digest[:19]}, {size} bytes)")
        return image


def pack(context: Context, row: Row, target: Path, *, without: Sequence[str] = (), latest: int | None = None) -> PackedLayer:
    """Write what the machine `row`, which stands still, has changed as a layer to the new file `target`."""
    engine, box = context.engine(row.spec.wall, row.name), context.box(row)
    if not isinstance(engine, Reader):
        return changes.pack(box, target, without=tuple(without), latest=latest)
    return changes.read(engine, box, lambda: context.images.lowers(row.digest), target, without=tuple(without), latest=latest)


def layer(context: Context, machine: str, target: Path, *, without: Sequence[str], latest: int | None) -> PackedLayer:
    """Write what a machine changed as a layer to the new file `target`. Raises what Machine.layer raises."""
    with still(context, machine) as row:
        return pack(context, row, target, without=without, latest=latest)


@contextmanager
def still(context: Context, machine: str) -> Iterator[Row]:
    """Hold the machine, frozen for as long as the `with` lasts if it runs. Raises InvalidState, Busy, EngineError, GuestError."""
    with life.operation(context, machine, "commit") as row:
        thawing.begun(row)
        engine, box = context.engine(row.spec.wall, row.name), context.box(row)
        if row.state is State.RUNNING:
            if isinstance(engine, Reader):
                _sync(context, row)
            engine.pause(box)
        try:
            yield row
        finally:
            if row.state is State.RUNNING:
                engine.resume(box)
        context.records.update(row.id, operation="", operator=None)


def _sync(context: Context, row: Row) -> None:
    """Have the guest bring to its disk what it holds back in its memory. Raises GuestError if it does not."""
    try:
        guest.configure(context.lines.of(row.id, context.folder(row).line, row.name).get(), [("sync",)], timeout=_SYNC)
    except GuestError as error:
        error.hint = "pause it first: then what has reached its disk is taken"
        raise


def changed(run: RunConfig, wishes: Mapping[str, Any]) -> RunConfig:
    """Return a config with the changes that a caller asks for. Raises InvalidSpec."""
    if unknown := wishes.keys() - set(FIELDS):
        raise InvalidSpec(f"an image's config has no {', '.join(sorted(unknown))}", hint=f"it has {', '.join(FIELDS)}")
    values = {**wishes}
    if isinstance(values.get("env"), Mapping):
        old = dict(pair.split("=", 1) for pair in run.env or () if "=" in pair)
        values["env"] = [f"{key}={value}" for key, value in {**old, **values["env"]}.items()]
    if isinstance(values.get("labels"), Mapping):
        values["labels"] = {**(run.labels or {}), **values["labels"]}
    for field in ("exposed_ports", "volumes"):
        if isinstance(values.get(field), list | tuple):
            values[field] = {str(key): {} for key in values[field]}
    try:
        made = msgspec.convert(msgspec.structs.replace(run, **values), RunConfig, from_attributes=True)
        runconfig.read(made)
        return made
    except (msgspec.ValidationError, TypeError, runconfig.Refused) as error:
        raise InvalidSpec(f"config: {error}") from None
