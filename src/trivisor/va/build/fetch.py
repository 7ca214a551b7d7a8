"""Where the files of COPY, ADD and bind mounts come from: the context, another stage, an image, or an address."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import time
import urllib.parse
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trivisor.core.errors import RecipeError
from trivisor.images import view as views
from trivisor.images.limits import DEFAULT
from trivisor.images.stream import CHUNK
from trivisor.images.view import FolderView, Node, View
from trivisor.va.build.copy import As, CopyError, Layer, matches
from trivisor.va.build.mounts import Mount
from trivisor.va.build.recipe import Stage, stage_of
from trivisor.va.build.state import Copy

if TYPE_CHECKING:
    from trivisor.va.build.stage import Building, Built

_ADDRESS = re.compile(r"https?://", re.IGNORECASE)
_GIT = re.compile(r"(git@|git://|https?://.*\.git(#|$))")
_CONNECT, _READ = 30.0, 60.0
"""Seconds."""


@dataclass(frozen=True)
class Found:
    """One file or folder that a COPY takes, by the name that it is called by."""

    name: str
    node: Node
    view: View
    fetched: bool = False
    """It came from an address."""


class Sources:
    """What one stage may take files from."""

    def __init__(self, building: Building, stage: Stage, built: Mapping[int, Built]) -> None:
        self._all = building
        self._stage = stage
        self._built = built
        self._views: dict[str, View] = {}
        self._fetched = 0

    def find(self, step: Copy, stack: ExitStack) -> list[Found]:
        """Return what the sources of a COPY or ADD mean. Raises CopyError, and what images raise."""
        found: list[Found] = []
        for source in step.sources:
            if step.unpack and _GIT.match(source):
                raise CopyError(f"{source[:60]}: repositories are not fetched", "clone it in a RUN, or before the build")
            if step.unpack and _ADDRESS.match(source):
                found.append(self._fetch(source, step))
                continue
            view = self._view(step.stage)
            found += [Found(name, node, view) for name, node in matches(view, source)]
        return found

    def content(self, mount: Mount) -> str:
        """Return what tells the files of a bind mount from others, "" for other mounts. Raises RecipeError."""
        if mount.kind != "bind":
            return ""
        view, node = self._bound(mount)
        with ExitStack() as stack:
            layer = Layer(self._all.nothing, "mount", stack)
            layer.copy(view, node, "/x", As())
            return layer.content

    def place(self, mount: Mount, stack: ExitStack) -> Path:
        """Return where the files of a bind mount lie on the host: a copy of them where the step may write. Raises RecipeError."""
        view, node = self._bound(mount)
        if not mount.source_stage and self._all.context.whole and mount.readonly:
            return node.place
        target = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="trivisor-build-"))) / "files"
        _copy_out(view, node, target)
        return target

    def _bound(self, mount: Mount) -> tuple[View, Node]:
        view = self._view(mount.source_stage)
        try:
            return view, matches(view, mount.source or "/")[0][1]
        except CopyError as error:
            raise RecipeError(self._all.file.name, self._stage.line, f"--mount of {mount.target}: {error}", hint=error.hint) from error

    def _view(self, stage: str) -> View:
        if not stage:
            return self._all.context
        if stage not in self._views:
            index = stage_of(stage, self._all.recipe.stages)
            built = self._built[index] if index is not None else self._all.base(stage, self._stage)
            self._views[stage] = built.view(self._all.vmm, self._all.work)
        return self._views[stage]

    def _fetch(self, address: str, step: Copy) -> Found:
        """Get a file from an address, into a folder of its own."""
        name = urllib.parse.unquote(urllib.parse.urlsplit(address).path).rpartition("/")[2]
        if step.target.endswith("/") and (not name or "\0" in name):
            raise CopyError(f"{address[:80]} has no name for its file", "give the target a name")
        self._fetched += 1
        folder = self._all.work.path / f"fetched-{self._stage.index}-{self._fetched}"
        folder.mkdir()
        file = folder / "file"
        digest, modified = _download(address, file)
        if step.checksum and step.checksum != f"sha256:{digest}":
            raise CopyError(f"{address[:80]} is sha256:{digest}, not {step.checksum[:80]}", "see what changed there before you take it")
        file.chmod(0o600)
        os.utime(file, (modified, modified))
        view = FolderView(folder)
        node = view.at("file")
        assert node is not None
        return Found(name or "file", node, view, fetched=True)


def _download(address: str, target: Path) -> tuple[str, float]:
    """Write what is at an address to a file; return its digest and when it was changed last."""
    import urllib3  # here, for the reason that `Images.pull` gives

    digest, left = hashlib.sha256(), DEFAULT.total
    try:
        with (
            urllib3.PoolManager(timeout=urllib3.Timeout(connect=_CONNECT, read=_READ), retries=urllib3.Retry(3, redirect=5)) as pool,
            pool.request("GET", address, preload_content=False) as answer,
            target.open("wb") as file,
        ):
            if answer.status != 200:
                raise CopyError(f"{address[:80]}: {answer.status} {answer.reason}", "check the address")
            for data in answer.stream(CHUNK):
                digest.update(data)
                file.write(data)
                left -= len(data)
                if left < 0:
                    raise CopyError(f"{address[:80]} is larger than {DEFAULT.total} bytes")
            return digest.hexdigest(), _when(answer.headers.get("Last-Modified", ""))
    except urllib3.exceptions.HTTPError as error:
        raise CopyError(f"{address[:80]} cannot be fetched: {error}", "check the address, and the network of this host") from error


def _when(text: str) -> float:
    from email.utils import parsedate_to_datetime  # here, since it takes a while as well

    try:
        return parsedate_to_datetime(text).timestamp()
    except (ValueError, TypeError):
        return time.time()


def _copy_out(view: View, top: Node, target: Path) -> None:
    """Copy a file or a tree of a view to the host."""
    for node in views.everything(view, top):
        below = node.path[len(top.path) :].strip("/")
        place = target / below if below else target
        if node.kind == "d":
            place.mkdir()
        elif node.kind == "l":
            place.symlink_to(node.target)
        elif node.kind == "f":
            with node.open() as source, place.open("wb") as sink:
                while data := source.read(CHUNK):
                    sink.write(data)
        else:
            continue
        if os.geteuid() == 0:
            os.chown(place, node.uid, node.gid, follow_symlinks=False)
        if node.kind != "l":
            place.chmod(node.mode)
