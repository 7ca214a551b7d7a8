"""From a Containerfile and its context to an image: stages side by side, each when those that it needs are there."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from threading import Lock

import msgspec

from trivisor.core.errors import InvalidSpec, NotFound, RecipeError, RegistryError
from trivisor.images import compose
from trivisor.images.catalog import Image
from trivisor.images.model import Platform
from trivisor.images.reference import Reference, normalise
from trivisor.images.view import FolderView
from trivisor.store.workspace import Workspace
from trivisor.va.build import ignore
from trivisor.va.build.cache import Cache
from trivisor.va.build.needs import Maker
from trivisor.va.build.options import Options
from trivisor.va.build.parse import MAX_SIZE, Containerfile, parse
from trivisor.va.build.recipe import Recipe, Stage, recipe
from trivisor.va.build.stage import Building, Built, StageBuilder

NAMES = ("Containerfile", "Dockerfile")
WALLS = ("vm", "gvisor", "container")
"""Behind which a RUN can be carried out."""
_STAGES = 4
"""Built at the same time."""


def build(
    vmm: Maker, context: Path | str, tags: Sequence[str] = (), *, file: Path | str | None = None, options: Options | None = None
) -> Image:
    """Build the image that the Containerfile in the folder `context`, or `file`, describes; it is called by each of `tags` then.

    Without a tag it stays for as long as it is in the store (`Images.collect`). Raises RecipeError and BuildFailed, which name the line;
    ImageError (bases); InvalidSpec, StorageError, and what machines raise.
    """
    chosen = options or Options()
    for tag in tags:
        normalise(tag)
    if chosen.wall not in WALLS:
        raise InvalidSpec(f"the steps of a build are not carried out behind {chosen.wall!r}", hint=f"wall is one of {', '.join(WALLS)}")
    folder = Path(context)
    if not folder.is_dir():
        raise InvalidSpec(f"{context} is no folder", hint="give the folder that COPY takes its files from")
    place, text = _read(folder, file)
    read = parse(text, place.name if place.parent == folder else str(place))
    given = {**_platforms(chosen), **chosen.arguments}
    plan = recipe(read, given)
    target = plan.stage(chosen.target)
    with vmm.images.workspace() as work:
        view = FolderView(folder, _ignored(folder, place))
        bases = _Bases(vmm, read, chosen, work)
        cache = Cache(vmm.images.store, use=chosen.use_cache)
        built = _stages(Building(vmm, read, plan, chosen, view, work, cache, given, bases.get), plan, target)
        return _finish(vmm, built, tags, chosen, work, place)


def _finish(vmm: Maker, built: Built, tags: Sequence[str], options: Options, work: Workspace, place: Path) -> Image:
    if options.labels:
        built.run = msgspec.structs.replace(built.run, labels={**(built.run.labels or {}), **options.labels})
    latest = options.latest
    source = f"build of {place}"
    image = built.image(vmm, work, tags[0] if tags else "", source, created=latest)
    for tag in tags[1:]:
        vmm.images.tag(tags[0], tag)
    return image


def _stages(building: Building, plan: Recipe, target: Stage) -> Built:
    """Build `target` and what it needs, side by side where nothing is waited for."""
    left = {stage.index: stage for stage in plan.needed(target)}
    built: dict[int, Built] = {}
    running: dict[Future[Built], int] = {}
    with ThreadPoolExecutor(_STAGES) as pool:
        try:
            while target.index not in built:
                for index in [index for index, stage in left.items() if stage.needs <= built.keys()]:
                    running[pool.submit(StageBuilder(building, left.pop(index), built).build)] = index
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    built[running.pop(future)] = future.result()
        except BaseException:  # Ctrl-C too: nobody waits for what is not needed any more
            building.halt.call()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    return built[target.index]


class _Bases:
    """The images that FROM and --from name: those of the home, else from their registry, each once a build."""

    def __init__(self, vmm: Maker, file: Containerfile, options: Options, work: Workspace) -> None:
        self._vmm = vmm
        self._file = file
        self._options = options
        self._work = work
        self._lock = Lock()
        self._known: dict[tuple[str, Platform | None], Image] = {}

    def get(self, name: str, stage: Stage) -> Built:
        """Return the image as a stage begins with it. Raises RecipeError, NotFound, RegistryError, ImageError."""
        platform = self._platform(stage)
        with self._lock:
            image = self._known.get((name, platform)) or self._find(name, stage, platform)
            self._known[name, platform] = image
        documents = self._vmm.images.documents(image.digest)
        if not all(self._vmm.images.store.hold(blob.digest, self._work.owner) for blob in documents.blobs):
            raise NotFound(f"the image {name} was removed meanwhile", hint="build again")
        config = documents.config
        history = list(config.history or ())
        return Built(compose.stack_of(documents), history, config.run, config.author, 0.0, config.platform)

    def _platform(self, stage: Stage) -> Platform | None:
        try:
            return Platform.parse(stage.platform) if stage.platform else self._options.platform
        except InvalidSpec as error:
            raise RecipeError(self._file.name, stage.line, f"FROM --platform: {error}", hint=error.hint) from error

    def _find(self, name: str, stage: Stage, platform: Platform | None) -> Image:
        here = f"there is neither a stage nor an image {name[:60]} here"
        try:
            if not self._options.pull:
                image = self._vmm.images.get(name)
                if platform is None or platform.runs(image.platform):
                    return image
                here = f"the image {name[:60]} here is for {image.platform}, not {platform}"
        except InvalidSpec as error:
            raise RecipeError(self._file.name, stage.line, f"FROM {name[:60]}: {error}", hint=error.hint) from error
        except NotFound:
            pass
        try:
            return self._pull(name, platform)
        except (NotFound, RegistryError) as error:
            message = f"{here}, and its registry has none: {error}"
            hint = error.hint or "`trivisor images` lists those that are here, and `trivisor images bootstrap` makes one of Debian"
            raise RecipeError(self._file.name, stage.line, message, hint=hint) from error

    def _pull(self, name: str, platform: Platform | None) -> Image:
        images = self._vmm.images
        if platform is None or Platform.host().runs(platform):
            return images.pull(name, platform=platform, **self._options.access)
        # The name goes on meaning what runs on this host. The import is here for the reason that `Images.pull` gives.
        from trivisor.images.registry.pull import pull

        pulled = pull(Reference.parse(name), images.store, self._work, platform=platform, **self._options.access)
        return images.add(pulled.manifest, pulled.media_type, "", pulled.source, self._work)


def _read(folder: Path, file: Path | str | None) -> tuple[Path, str]:
    candidates = [Path(file)] if file is not None else [folder / name for name in NAMES]
    for place in candidates:
        try:
            data = place.read_bytes()[: MAX_SIZE + 1]
        except FileNotFoundError:
            continue
        except OSError as error:
            raise InvalidSpec(f"{place} cannot be read: {error.strerror}") from error
        try:
            return place, data.decode()
        except UnicodeDecodeError as error:
            line = data[: error.start].count(b"\n") + 1
            raise RecipeError(place.name, line, "it is not text in UTF-8") from error
    raise InvalidSpec(f"there is no {' or '.join(str(place) for place in candidates)}", hint="give it with --file")


def _ignored(folder: Path, file: Path) -> ignore.Ignore | None:
    """Return what the ignore file of this Containerfile, or of the context, leaves out."""
    for place in (file.with_name(f"{file.name}.dockerignore"), folder / ".containerignore", folder / ".dockerignore"):
        try:
            text = place.read_text()
        except FileNotFoundError:
            continue
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidSpec(f"{place} cannot be read: {error}") from error
        try:
            return ignore.read(text)
        except ValueError as error:
            raise InvalidSpec(f"{place}: {error}") from error
    return None


def _platforms(options: Options) -> Mapping[str, str]:
    """Return the arguments that say what is built where (Dockerfile reference, "Automatic platform ARGs")."""
    here, there = Platform.host(), options.platform or Platform.host()
    values: dict[str, str] = {}
    for name, platform in (("BUILD", here), ("TARGET", there)):
        values |= {f"{name}PLATFORM": str(platform), f"{name}OS": platform.os}
        values |= {f"{name}ARCH": platform.architecture, f"{name}VARIANT": platform.variant}
    if "SOURCE_DATE_EPOCH" in os.environ:
        values["SOURCE_DATE_EPOCH"] = os.environ["SOURCE_DATE_EPOCH"]
    return values
