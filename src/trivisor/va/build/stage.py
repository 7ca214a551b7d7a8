"""One stage: its instructions in order, each a step that is found in the cache or done.

A step is done on the root as the steps before left it, which is an image without a name for as long as the build lasts. COPY and ADD need
no machine: the layer is made of the files. What a config alone changes makes no layer.
"""

from __future__ import annotations

import os
import posixpath
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from trivisor.core.errors import ImageError, RecipeError, TrivisorError
from trivisor.images import compose, view
from trivisor.images.catalog import Image
from trivisor.images.compose import Stacked
from trivisor.images.model import History, Platform, RunConfig, chain_ids
from trivisor.images.pack import LayerWriter, PackedLayer
from trivisor.images.tarwrite import emit
from trivisor.images.view import FolderView, StackView, View
from trivisor.store.faults import from_os
from trivisor.store.workspace import Workspace
from trivisor.va.build import owners
from trivisor.va.build.cache import Cache, Made, key
from trivisor.va.build.copy import As, CopyError, Layer
from trivisor.va.build.events import BuildEvent, Kind
from trivisor.va.build.fetch import Sources
from trivisor.va.build.halt import Halt
from trivisor.va.build.ignore import patterns
from trivisor.va.build.mounts import Mount
from trivisor.va.build.needs import Maker
from trivisor.va.build.options import Options
from trivisor.va.build.parse import Containerfile, Instruction, triggered
from trivisor.va.build.recipe import SCRATCH, Recipe, Stage
from trivisor.va.build.run import run
from trivisor.va.build.state import PROXIES, Copy, Folder, Run, State, Step


@dataclass
class Built:
    """A stage as it is so far: what is below it, and what its steps added."""

    layers: list[Stacked] = field(default_factory=list)
    history: list[History] = field(default_factory=list)
    run: RunConfig = field(default_factory=RunConfig)
    author: str = ""
    created: float = 0.0
    platform: Platform | None = None

    @property
    def chain(self) -> str:
        """What names its root."""
        return chain_ids([layer.diff_id for layer in self.layers])[-1] if self.layers else ""

    def image(self, vmm: Maker, work: Workspace, name: str = "", source: str = "build", created: float | None = None) -> Image:
        """Register it as an image. Raises what `Images.add` raises."""
        when = self.created if created is None else created
        return compose.add(
            vmm.images,
            work,
            self.layers,
            self.run,
            self.history,
            name=name,
            source=source,
            created=when,
            author=self.author,
            platform=self.platform,
        )

    def view(self, vmm: Maker, work: Workspace) -> View:
        """Return its root as one can look into it."""
        if not self.layers:
            return nothing(work)
        return StackView(vmm.images.unpacked(self.image(vmm, work).digest))


def nothing(work: Workspace) -> FolderView:
    """Return the view of an empty root."""
    empty = work.path / "empty"
    empty.mkdir(exist_ok=True, mode=0o755)
    return FolderView(empty)


@dataclass(frozen=True)
class Building:
    """What all stages of one build have in common."""

    vmm: Maker
    file: Containerfile
    recipe: Recipe
    options: Options
    context: FolderView
    work: Workspace
    cache: Cache
    given: Mapping[str, str]
    base: Callable[[str, Stage], Built]
    """Gets the image that a FROM or a --from names."""
    halt: Halt = field(default_factory=Halt)

    @property
    def nothing(self) -> FolderView:
        """An empty root."""
        return nothing(self.work)


class StageBuilder:
    """Builds one stage. `built` are the stages that it needs, by number."""

    def __init__(self, building: Building, stage: Stage, built: Mapping[int, Built]) -> None:
        self._all = building
        self._stage = stage
        self._built = built
        self._step = 0
        self._below = 0
        self._ran_on = ""
        self._sources = Sources(building, stage, built)

    def build(self) -> Built:
        """Do all its steps. Raises RecipeError, BuildFailed, and what machines and images raise."""
        all_, stage = self._all, self._stage
        state = State(all_.file, all_.given, all_.recipe.arguments)
        base = Built(platform=all_.options.platform)
        if stage.base != SCRATCH:
            base = self._built[stage.base] if isinstance(stage.base, int) else all_.base(stage.base, stage)
            state.take(base.run, base.author)
        triggers = [triggered(text, stage.line, all_.file.name, all_.file.escape) for text in base.run.on_build or ()]
        instructions = [*triggers, *stage.instructions]
        self._below = len(base.layers)
        now = Built(list(base.layers), list(base.history), state.final(), base.author, base.created, base.platform)
        for self._step, found in enumerate(instructions, 1):
            all_.halt.check()
            begun = time.monotonic()
            self._tell("begin", found, len(instructions))
            step = state.read(found)
            now.run, now.author = state.final(), state.author
            with self._translated(found):
                made = self._do(found, step, now, len(instructions)) if step is not None else None
            self._enter(now, found, made)
            self._tell("done", found, len(instructions), seconds=time.monotonic() - begun)
        self._forget()
        return now

    @contextmanager
    def _translated(self, found: Instruction) -> Iterator[None]:
        """Raise RecipeError for what cannot be read, and StorageError where ours cannot be written."""
        try:
            yield
        except ImageError as error:  # an archive, or a file that could be listed and not read
            raise RecipeError(self._all.file.name, found.line, f"{found.name}: {error}", hint=error.hint) from error
        except TrivisorError:
            raise  # some of them are OSErrors too
        except OSError as error:
            place = Path(os.fsdecode(error.filename)) if isinstance(error.filename, (str, bytes)) else self._all.work.path
            if place.is_relative_to(self._all.context.root):
                message = f"{found.name}: {place.relative_to(self._all.context.root)} cannot be read: {error.strerror}"
                raise RecipeError(
                    self._all.file.name, found.line, message, hint="see who may read it, or name it in .dockerignore"
                ) from error
            raise from_os(error, place) from error

    def _enter(self, now: Built, found: Instruction, made: Made | None) -> None:
        """Add what an instruction made, and that it was there, to the stage."""
        text = " ".join([found.name, *(f"--{name}={value}" for name, value in found.flags), found.text])
        if made is not None:
            now.layers.append(made.layer)
            now.created = max(now.created, made.created)
        now.history.append(History(compose.stamp(made.created if made else now.created), text, empty_layer=made is None))

    def _do(self, found: Instruction, step: Step, now: Built, steps: int) -> Made | None:
        if isinstance(step, Run):
            return self._run(found, step, now, steps)
        with ExitStack() as stack:
            try:
                base = now.view(self._all.vmm, self._all.work)
                if isinstance(step, Folder) and (there := view.resolve(base, step.path)) is not None and there.kind == "d":
                    return None
                layer = Layer(base, f"{self._all.file.name}:{found.line}", stack)
                if isinstance(step, Folder):
                    layer.folder(step.path)
                else:
                    self._copy(step, layer, base, stack)
            except CopyError as error:
                raise RecipeError(self._all.file.name, found.line, f"{found.name}: {error}", hint=error.hint) from error
            name = key(now.chain, type(step).__name__, layer.content, self._all.options.latest)
            return self._find(name, found, steps) or self._keep(name, self._write(layer, name), now)

    def _run(self, found: Instruction, step: Run, now: Built, steps: int) -> Made:
        lent = [(mount.kind, mount.target, mount.id, mount.readonly, mount.env, self._sources.content(mount)) for mount in step.mounts]
        env = {name: value for name, value in step.env.items() if name.upper() not in PROXIES}
        name = key(now.chain, "run", step.argv, step.script, env, step.user, step.cwd, step.network, lent, self._all.options.latest)
        if (made := self._find(name, found, steps)) is not None:
            return made
        if not now.layers:
            raise RecipeError(self._all.file.name, found.line, "RUN: there is no program in an empty image", hint="copy one into it first")
        if now.platform is not None and not Platform.host().runs(now.platform):
            hint = "build it in a stage FROM --platform=$BUILDPLATFORM, and COPY what comes of that"
            raise RecipeError(self._all.file.name, found.line, f"RUN: the image is for {now.platform}, and this host is not", hint=hint)
        image = now.image(self._all.vmm, self._all.work).digest

        def said(data: bytes) -> None:
            self._tell("output", found, steps, data)

        target = self._all.work.path / f"{name}.layer"
        with ExitStack() as stack:

            def lend(mount: Mount) -> Path:
                return self._sources.place(mount, stack)

            packed = run(self._all.vmm, image, step, self._all.options, self._all.file.name, lend, said, target, self._all.halt)
            self._forget()
            self._ran_on = image if len(now.layers) > self._below else ""
            return self._keep(name, packed, now)

    def _forget(self) -> None:
        """Let go of the root that the step before last ran on: each is a file of its own behind the vm wall, and nobody else's."""
        if self._ran_on and self._all.options.wall == "vm":
            self._all.vmm.images.forget_rootfs(self._ran_on, self._all.work.owner)

    def _copy(self, step: Copy, layer: Layer, base: View, stack: ExitStack) -> None:
        become = As(owners.find(step.owner, base) if step.owner else None if step.stage else (0, 0), step.mode)
        leave = patterns(step.exclude)
        for number, (name, text) in enumerate(step.texts):
            target = posixpath.join(step.target, name) if step.target.endswith("/") else step.target
            place = self._all.work.path / f"text-{self._stage.index}-{self._step}-{number}"
            layer.write(text.encode("utf-8", "surrogateescape"), place, target, become)
        found = self._sources.find(step, stack)
        if len(found) > 1 and not step.target.endswith("/") and not layer.is_folder(step.target):
            raise CopyError(f"{len(found)} files cannot go to one name", f"end the target with a slash: {step.target}/")
        for source in found:
            if step.unpack and source.node.kind == "f" and not source.fetched and layer.extract(source.node.place, step.target, become):
                continue
            into = source.node.kind != "d" and (step.target.endswith("/") or layer.is_folder(step.target))
            target = posixpath.join(step.target, source.name) if into else step.target
            layer.copy(source.view, source.node, target.rstrip("/") or "/", become, leave)

    def _write(self, layer: Layer, name: str) -> PackedLayer:
        latest = self._all.options.latest
        if latest is not None:
            for _, node in layer.tree.walk():
                node.mtime = min(node.mtime, latest)
            layer.tree.root.mtime = min(layer.tree.root.mtime, latest)
        with LayerWriter(self._all.work.path / f"{name}.layer") as writer:
            emit(layer.tree, layer.sources, writer.write)
            return writer.close()

    def _find(self, name: str, found: Instruction, steps: int) -> Made | None:
        made = self._all.cache.find(name, self._all.work)
        if made is not None:
            self._tell("cached", found, steps)
        return made

    def _keep(self, name: str, packed: PackedLayer, now: Built) -> Made:
        latest = self._all.options.latest
        chain = chain_ids([*(layer.diff_id for layer in now.layers), packed.diff_id])[-1]
        return self._all.cache.keep(name, packed, self._all.work, time.time() if latest is None else latest, chain)

    def _tell(self, kind: Kind, found: Instruction, steps: int, data: bytes = b"", seconds: float = 0.0) -> None:
        text = f"{found.name} {found.text}"
        event = BuildEvent(kind, self._stage.name or str(self._stage.index), self._step, steps, text, found.line, data, seconds)
        self._all.options.report(event)
