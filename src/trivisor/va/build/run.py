"""RUN: a command in a machine of its own, behind the wall that was chosen, on the root as the steps before left it.

The machine ends with the build, however that ends. What it is lent for the step (mounts, secrets) is not in the layer: folders are
shared where the wall shares folders, and copied into the machine elsewhere; caches are volumes of the home.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trivisor.core.errors import BuildFailed, ExecTimeout, HostLacks, RecipeError
from trivisor.core.spec import PASSING
from trivisor.core.units import parse_size
from trivisor.core.wishes import Volume
from trivisor.images.pack import PackedLayer
from trivisor.va.build import caches
from trivisor.va.build.halt import Halt
from trivisor.va.build.mounts import Mount
from trivisor.va.build.needs import Maker
from trivisor.va.build.options import Options
from trivisor.va.build.state import Run

if TYPE_CHECKING:
    from trivisor.vmm.machine import Machine

SCRIPT = "/.trivisor-run"
_TAIL = 4096
_FOLDER_WALLS = ("container", "gvisor")


@dataclass
class Lent:
    """What a step's machine has beside its root."""

    volumes: dict[str, Volume] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    files: list[tuple[str, bytes, Mount]] = field(default_factory=list)
    trees: list[tuple[Path, str]] = field(default_factory=list)
    tmpfs: dict[str, int] = field(default_factory=dict)

    @property
    def without(self) -> list[str]:
        """The paths that are not the image's."""
        return [target for target, *_ in self.files] + [target for _, target in self.trees] + [*self.volumes, *self.tmpfs]


def run(
    vmm: Maker,
    image: str,
    step: Run,
    options: Options,
    file: str,
    lend: Callable[[Mount], Path],
    said: Callable[[bytes], None],
    target: Path,
    halt: Halt,
) -> PackedLayer:
    """Carry out `step` on the image with the digest `image`, and write what it changed as a layer to the new file `target`.

    `lend` says where the files of a bind mount lie; `said` gets what the command says. Raises BuildFailed, RecipeError, what machines
    raise, and Halted.
    """
    with ExitStack() as stack:
        asker = caches.Asker(file, step.line, options.timeout, halt.check)
        kept = caches.hold(vmm, [mount for mount in step.mounts if mount.kind == "cache"], asker, stack)
        lent = _lend(kept, step, options, file, lend)
        network = "none" if step.network == "none" else options.network
        wishes: dict[str, Any] = {"network": network, "memory": options.memory, "cpus": options.cpus}
        wishes |= {"volumes": lent.volumes or None, "tmpfs": lent.tmpfs or None, "labels": {PASSING: "build"}}
        machine = _machine(vmm, image, options.wall, wishes, stack)
        stack.enter_context(halt.watching(machine))
        for local, remote in lent.trees:
            machine.files.mkdir(_above(remote), parents=True)
            machine.files.upload(local, remote)
        for path, data, mount in lent.files:
            machine.files.mkdir(_above(path), parents=True)
            _write(machine, path, data, mount)
        _exec(machine, step, options, file, lent, said)
        without = [*lent.without, SCRIPT]
        return machine.layer(target, without=without, latest=options.latest)


def _machine(vmm: Maker, image: str, wall: str, wishes: dict[str, Any], stack: ExitStack) -> Machine:
    try:
        return stack.enter_context(vmm.run(image, wall=wall, **wishes))
    except HostLacks:
        # Without virtiofsd a virtual machine's folders are shared by 9p, which the full kernel alone has.
        if wall != "vm" or not wishes["volumes"]:
            raise
        return stack.enter_context(vmm.run(image, wall=wall, kernel="full", **wishes))


def _write(machine: Machine, path: str, data: bytes, mount: Mount) -> None:
    if not mount.uid and not mount.gid:
        machine.files.write(path, data, mode=mount.mode)
        return
    with tempfile.NamedTemporaryFile(prefix="trivisor-build-") as file:
        Path(file.name).write_bytes(data)
        os.fchmod(file.fileno(), mount.mode)
        machine.files.upload(file.name, path, owners=(mount.uid, mount.gid))


def _above(path: str) -> str:
    return path.rpartition("/")[0] or "/"


def _exec(machine: Machine, step: Run, options: Options, file: str, lent: Lent, said: Callable[[bytes], None]) -> None:
    argv = list(step.argv)
    if step.script:
        machine.files.write(SCRIPT, step.script.encode("utf-8", "surrogateescape"), mode=0o755)
        argv = [SCRIPT]
    tail = bytearray()

    def hear(data: bytes) -> None:
        tail.extend(data)
        del tail[:-_TAIL]
        said(data)

    env = {**step.env, **lent.env}
    try:
        done = machine.exec(argv, env=env, cwd=step.cwd, user=step.user or "0", timeout=options.timeout, on_stdout=hear, on_stderr=hear)
    except ExecTimeout as error:
        raise BuildFailed(file, step.line, f"it did not end in {options.timeout:g} s", output=bytes(tail)) from error
    if done.exit_code:
        raise BuildFailed(file, step.line, f"ended with status {done.exit_code}", exit_code=done.exit_code, output=bytes(tail))


def _lend(kept: Mapping[str, str], step: Run, options: Options, file: str, lend: Callable[[Mount], Path]) -> Lent:
    lent = Lent()
    for mount in step.mounts:
        if mount.kind == "secret":
            _secret(lent, mount, step, options, file)
        elif mount.kind == "cache":
            lent.volumes[mount.target] = Volume(kept[mount.id], mount.readonly)
        elif mount.kind == "tmpfs":
            # As tmpfs(5) has it, half of the memory if nothing is said.
            lent.tmpfs[mount.target] = mount.size if mount.size is not None else parse_size(options.memory, "memory") // 2
        else:
            place = lend(mount)
            if place.is_dir():
                _folder(lent, place, mount, options)
            else:
                lent.files.append((mount.target, place.read_bytes(), mount))
    return lent


def _folder(lent: Lent, place: Path, mount: Mount, options: Options) -> None:
    if options.wall in _FOLDER_WALLS:
        lent.volumes[mount.target] = Volume(str(place), mount.readonly and mount.kind == "bind")
    else:
        lent.trees.append((place, mount.target))


def _secret(lent: Lent, mount: Mount, step: Run, options: Options, file: str) -> None:
    data = options.secret(mount.id)
    if data is None:
        if mount.required:
            raise RecipeError(file, step.line, f"there is no secret {mount.id}", hint=f"give it with --secret id={mount.id},src=FILE")
        return
    if mount.env:
        lent.env[mount.env] = data.decode("utf-8", "surrogateescape")
    if mount.target:
        lent.files.append((mount.target, data, mount))
