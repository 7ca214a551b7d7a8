"""What a Containerfile builds: stages, and which of them need which others.

A stage needs the stages that its FROM, its COPY --from and its RUN --mount name, by name (in any case of letters) or number. A name
that no stage has is an image's. What the target does not need is not built.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter

from trivisor.core.errors import RecipeError
from trivisor.va.build.mounts import Mount, parse_mount
from trivisor.va.build.parse import Containerfile, Instruction
from trivisor.va.build.words import WordError, expand, split, unquote

SCRATCH = "scratch"
AUTOMATIC = tuple(f"{side}{part}" for side in ("BUILD", "TARGET") for part in ("PLATFORM", "OS", "ARCH", "VARIANT"))
"""Arguments that a FROM may use without an ARG."""


@dataclass(frozen=True)
class Stage:
    """One FROM and what follows it. `base` is "scratch", an image, or the number of a stage as int."""

    index: int
    name: str
    base: str | int
    platform: str
    line: int
    instructions: tuple[Instruction, ...]
    needs: frozenset[int]
    """The stages that must be built before it."""


@dataclass(frozen=True)
class Recipe:
    """The stages of one Containerfile, in the order in which they are written."""

    file: str
    escape: str
    arguments: dict[str, str]
    """The ARGs before the first FROM, with the values that they have in this build."""
    stages: tuple[Stage, ...]

    def stage(self, target: str = "") -> Stage:
        """Return the stage called `target` (or its number), the last one for "". Raises RecipeError."""
        if not target:
            return self.stages[-1]
        index = _index(target, [stage.name for stage in self.stages])
        if index is None:
            have = ", ".join(stage.name or str(stage.index) for stage in self.stages)
            raise RecipeError(self.file, 1, f"there is no stage {target}", hint=f"there are {have}")
        return self.stages[index]

    def needed(self, target: Stage) -> list[Stage]:
        """Return `target` and all that it needs, each after what it needs itself."""
        wanted = {target.index}
        for stage in reversed(self.order()):
            if stage.index in wanted:
                wanted |= stage.needs
        return [stage for stage in self.order() if stage.index in wanted]

    def order(self) -> list[Stage]:
        """Return all stages, each after what it needs. Raises RecipeError for a cycle."""
        sorter = TopologicalSorter({stage.index: sorted(stage.needs) for stage in self.stages})
        try:
            return [self.stages[index] for index in sorter.static_order()]
        except CycleError as error:
            members = error.args[1]
            names = " -> ".join(self.stages[index].name or str(index) for index in members)
            raise RecipeError(self.file, self.stages[members[0]].line, f"stages need each other in a circle: {names}") from error


def recipe(file: Containerfile, arguments: Mapping[str, str]) -> Recipe:
    """Find the stages of `file`; `arguments` are those given to the build (--build-arg). Raises RecipeError."""
    first = next((at for at, found in enumerate(file.instructions) if found.name == "FROM"), None)
    before = file.instructions[:first]
    if wrong := next((found for found in before if found.name != "ARG"), None):
        raise RecipeError(file.name, wrong.line, f"{wrong.name} before the first FROM", hint="only ARG may stand there")
    if first is None:
        raise RecipeError(file.name, 1, "there is no FROM in it", hint="begin with FROM, for example `FROM debian`")
    values = {name: arguments[name] for name in AUTOMATIC if name in arguments}
    for found in before:
        for name, default in pairs(file, found, values, bare=True):
            value = arguments.get(name, default)
            if value is not None:
                values[name] = value
    parts: list[list[Instruction]] = []
    for found in file.instructions[first:]:
        if found.name == "FROM":
            parts.append([])
        parts[-1].append(found)
    froms = [_from(file, part[0], values) for part in parts]
    names = [name for _, _, name in froms]
    stages = []
    for index, part in enumerate(parts):
        reference, platform, name = froms[index]
        if name and name.lower() in (other.lower() for other in names[:index]):
            raise RecipeError(file.name, part[0].line, f"there are two stages {name}")
        # A FROM means a stage before it, else an image of that name.
        base = _index(reference, names[:index], numbers=False)
        needs = _needs(file, part[1:], names)
        stages.append(
            Stage(
                index,
                name,
                reference if base is None else base,
                platform,
                part[0].line,
                tuple(part[1:]),
                frozenset(needs if base is None else {*needs, base}),
            )
        )
    found_recipe = Recipe(file.name, file.escape, values, tuple(stages))
    found_recipe.order()
    return found_recipe


def stage_of(text: str, stages: tuple[Stage, ...]) -> int | None:
    """Return the number of the stage that a --from= names, None if it is an image."""
    return _index(text, [stage.name for stage in stages])


def pairs(file: Containerfile, found: Instruction, values: Mapping[str, str], *, bare: bool = False) -> list[tuple[str, str | None]]:
    """Return the names and values of an ENV, LABEL or ARG, expanded; with `bare` a name may have none. Raises RecipeError.

    `ENV name all the rest` is the old form, of one.
    """
    try:
        words = split(found.text, file.escape)
        if not bare and "=" not in words[0]:
            name, *rest = found.text.split(maxsplit=1)
            if not rest:
                raise RecipeError(file.name, found.line, f"{found.name} {name} has no value", hint=f"write {found.name} {name}=VALUE")
            return [(name, expand(rest[0], values, file.escape))]
        result: list[tuple[str, str | None]] = []
        for word in words:
            raw, equals, value = word.partition("=")
            name = expand(raw, values, file.escape) if found.name == "LABEL" else unquote(raw, file.escape)
            if not name or (not equals and not bare):
                raise RecipeError(file.name, found.line, f"{word[:40]!r} is no name=value")
            result.append((name, expand(value, values, file.escape) if equals else None))
        return result
    except WordError as error:
        raise RecipeError(file.name, found.line, str(error)) from error


def mounts(file: str, found: Instruction) -> list[Mount]:
    """Return the mounts that a RUN asks for, as written. Raises RecipeError."""
    try:
        return [parse_mount(value) for key, value in found.flags if key == "mount"]
    except ValueError as error:
        raise RecipeError(file, found.line, f"--mount: {error}") from error


def _from(file: Containerfile, found: Instruction, values: Mapping[str, str]) -> tuple[str, str, str]:
    try:
        words = [expand(word, values, file.escape) for word in split(found.text, file.escape)]
        platform = expand(found.flag("platform"), values, file.escape)
    except WordError as error:
        raise RecipeError(file.name, found.line, str(error)) from error
    if not words or not words[0]:
        hint = "the ARG that it names has no value: give it with --build-arg"
        raise RecipeError(file.name, found.line, f"FROM {found.text} names no image", hint=hint)
    if len(words) == 1:
        return words[0], platform, ""
    if len(words) != 3 or words[1].upper() != "AS":
        raise RecipeError(file.name, found.line, f"FROM {found.text}", hint="write FROM image, or FROM image AS name")
    name = words[2]
    if not name[0].isalpha() or not all(char.isalnum() or char in "-_." for char in name) or name.lower() == SCRATCH:
        raise RecipeError(file.name, found.line, f"{name[:40]!r} is no name of a stage", hint="begin with a letter; then a-z 0-9 - _ .")
    return words[0], platform, name


def _needs(file: Containerfile, instructions: list[Instruction], names: list[str]) -> set[int]:
    """Return the stages that instructions take files from."""
    needs: set[int] = set()
    for found in instructions:
        sources = [value for key, value in found.flags if key == "from"]
        sources += [mount.source_stage for mount in mounts(file.name, found) if mount.source_stage]
        for source in sources:
            index = _index(source, names)
            if index is not None:
                needs.add(index)
            elif source.isdecimal():
                raise RecipeError(file.name, found.line, f"there is no stage {source}", hint=f"there are {len(names)}, from 0")
    return needs


def _index(text: str, names: list[str], *, numbers: bool = True) -> int | None:
    lower = text.lower()
    for index, name in enumerate(names):
        if name and name.lower() == lower:
            return index
    if numbers and text.isdecimal() and len(text) < 6 and int(text) < len(names):
        return int(text)
    return None
