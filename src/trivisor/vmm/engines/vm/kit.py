"""Kits: a guest kernel with its modules, ready to boot, in home.kits/<key>.

A flavour (micro, full) is Debian's kernel package, fetched with the package manager, which checks the signatures,
and unpacked: nothing is installed on the host. It needs no root, and where the system has no package lists it
makes lists of its own from the system's sources. Any other kernel is a path; its modules are those of lib/modules/RELEASE
beside its folder (as in an unpacked package) or of /lib/modules/RELEASE, or else it must have everything built in.

A kit is made once, under a lock, aside, and renamed. It holds `kernel` (what QEMU boots), `original` (what that was made
from), `modules/`, `kit.json`, and an initramfs for each tvinit that has used it.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from trivisor.core.errors import EngineError, HostLacks, InvalidSpec
from trivisor.core.files import sync
from trivisor.core.paths import Home
from trivisor.core.process import find, run
from trivisor.vmm.engine import Progress
from trivisor.vmm.engines.vm import files, initramfs, kernel, modules

FLAVOURS = {"micro": "linux-image-cloud-amd64", "full": "linux-image-amd64"}
_FORMAT = 6
_FETCH = 900.0


class _Facts(msgspec.Struct, frozen=True):
    format: int
    release: str
    origin: str
    pvh: bool
    modules: list[str]
    digest: str
    shares: list[str]
    devices: dict[str, list[str]]


@dataclass(frozen=True)
class Kit:
    """A kit on disk. `digest` is of the kernel and its modules, so equal kits give equal ice."""

    folder: Path
    release: str
    origin: str
    digest: str
    modules: tuple[str, ...]
    shares: tuple[str, ...] = ()
    """Modules for shared folders, in the order in which they load; not loaded at boot."""
    devices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The same for each kind of device that a machine may be given and virtio does not drive, if the kernel has them."""

    @property
    def kernel(self) -> Path:
        return self.folder / "kernel"

    @property
    def original(self) -> Path:
        """The kernel file as it came, which any QEMU boots."""
        return self.folder / "original"

    def initramfs(self, tvinit: Path, digest: str) -> Path:
        """Return the initramfs that holds this tvinit (`digest` is its SHA-256), made at the first call."""
        path = self.folder / f"initramfs-{digest[:16]}"
        if not path.exists():
            aside = self.folder / f".initramfs-{os.getpid()}-{os.urandom(4).hex()}"
            later = dict.fromkeys(name for names in self.devices.values() for name in names)
            loaded, more = self._read(self.modules), self._read([*self.shares, *later])
            try:
                aside.write_bytes(initramfs.build(tvinit.read_bytes(), loaded, more))
                aside.chmod(0o644)
                sync(aside)
                aside.rename(path)
            except OSError as error:
                aside.unlink(missing_ok=True)
                raise files.storage(error, "writing the initramfs") from error
        return path

    def _read(self, names: Sequence[str]) -> list[tuple[str, bytes]]:
        return [(name, (self.folder / "modules" / f"{name}.ko").read_bytes()) for name in names]


def check(name: str) -> None:
    """Raise InvalidSpec if `name` is neither a flavour nor the path of a kernel. Reads little."""
    if name in FLAVOURS:
        return
    if "/" not in name:
        raise InvalidSpec(f"there is no kernel {name!r}", hint="it is micro, full, or the path of a kernel (with a /)")
    path = Path(name)
    if not path.is_file():
        raise InvalidSpec(f"kernel {name} is not a file", hint="give the path of a bzImage or vmlinux")
    try:
        with path.open("rb") as stream:
            head = stream.read(0x250)
    except OSError as error:
        raise InvalidSpec(f"kernel {name} cannot be read: {error.strerror}") from error
    if head[:4] != b"\x7fELF" and head[0x202:0x206] != b"HdrS":
        raise InvalidSpec(f"{name} is not a Linux kernel", hint="give an x86-64 bzImage (vmlinuz) or an uncompressed vmlinux")


def key(name: str) -> str:
    """Return the name of the folder under home.kits. Raises InvalidSpec as `check` does."""
    check(name)
    if name in FLAVOURS:
        return f"{name}-{_FORMAT}"
    path = Path(name).resolve()
    stat = path.stat()
    seen = f"{path}:{stat.st_mtime_ns}:{stat.st_size}:{_FORMAT}"
    return f"path-{hashlib.sha256(seen.encode()).hexdigest()[:24]}"


def have(home: Home, name: str) -> Kit | None:
    """Return the kit if it is there."""
    return _load(home.kits / key(name))


def get(home: Home, name: str, progress: Progress) -> Kit:
    """Return the kit of a flavour or kernel path, made if need be. Raises InvalidSpec, HostLacks, EngineError, StorageError."""
    folder = home.kits / key(name)
    if (kit := _load(folder)) is not None:
        return kit
    waiting = f"waiting for the {name} kernel that another process prepares"
    with files.locked(home.kits / f"{folder.name}.lock", lambda: progress(waiting), timeout=_FETCH):
        if (kit := _load(folder)) is not None:
            return kit
        shutil.rmtree(folder, ignore_errors=True)
        with files.workspace(home, "kit") as work:
            if name in FLAVOURS:
                _make_flavour(work, folder, name, progress)
            else:
                image = Path(name).resolve()
                progress(f"preparing kernel {image.name}")
                _make(work, folder, image, (image.parent.parent / "lib/modules", Path("/lib/modules")), str(image))
        made = _load(folder)
        if made is None:
            raise EngineError(f"the kit {folder.name} was made and cannot be read")
        return made


def sweep(home: Home) -> list[str]:
    """Remove kits of an earlier form, unless someone is making them; say what."""
    said = []
    for folder in sorted(path for path in home.kits.iterdir() if path.is_dir()):
        try:
            with files.locked(home.kits / f"{folder.name}.lock", lambda: None, timeout=0):
                if _load(folder) is not None:
                    continue
                shutil.rmtree(folder, ignore_errors=True)
                (home.kits / f"{folder.name}.lock").unlink(missing_ok=True)
        except files.Held:
            continue
        said.append(f"kit {folder.name}: removed, this version cannot use it")
    return said


def _load(folder: Path) -> Kit | None:
    try:
        facts = msgspec.json.decode((folder / "kit.json").read_bytes(), type=_Facts)
    except (FileNotFoundError, NotADirectoryError, msgspec.DecodeError):
        return None
    if facts.format != _FORMAT:
        return None
    devices = {kind: tuple(names) for kind, names in facts.devices.items()}
    return Kit(folder, facts.release, facts.origin, facts.digest, tuple(facts.modules), tuple(facts.shares), devices)


def _make_flavour(work: Path, folder: Path, name: str, progress: Progress) -> None:
    package, deb = _fetch(work, FLAVOURS[name], progress)
    progress(f"unpacking {package}")
    root = work / "root"
    run([find("dpkg-deb", "dpkg"), "-x", deb, root], timeout=300)
    images = sorted((root / "boot").glob("vmlinuz-*"))
    if len(images) != 1:
        raise EngineError(f"{package} holds {len(images)} kernels, not one")
    _make(work, folder, images[0], (root / "lib/modules", root / "usr/lib/modules"), deb.name)


def _make(work: Path, folder: Path, image: Path, trees: Sequence[Path], origin: str) -> None:
    """Make the kit of one kernel image; `trees` are where its modules may be, by release."""
    try:
        data = image.read_bytes()
    except OSError as error:
        raise InvalidSpec(f"kernel {image} cannot be read: {error.strerror}") from error
    parsed = kernel.parse(data, image.name)
    found = [tree / parsed.release for tree in trees if (tree / parsed.release).is_dir()]
    loaded = modules.load_order(found[0]) if found else []
    shares = modules.load_order(found[0], modules.WANTED + modules.SHARES)[len(loaded) :] if found else []
    devices = _devices(found[0], loaded + shares) if found else {}
    later = {name: content for order in devices.values() for name, content in order}
    digest = hashlib.sha256(parsed.image)
    made = work / "kit"
    (made / "modules").mkdir(parents=True, mode=0o755)
    (made / "kernel").write_bytes(parsed.image)
    (made / "kernel").chmod(0o644)
    (made / "original").write_bytes(data)
    for name, content in loaded:
        (made / "modules" / f"{name}.ko").write_bytes(content)
        digest.update(name.encode() + b"\0" + content)
    for name, content in [*shares, *later.items()]:
        (made / "modules" / f"{name}.ko").write_bytes(content)
        digest.update(b"later " + name.encode() + b"\0" + content)
    names = [name for name, _ in loaded]
    drivers = {kind: _names(order) for kind, order in devices.items()}
    facts = _Facts(_FORMAT, parsed.release, origin, parsed.pvh, names, digest.hexdigest(), _names(shares), drivers)
    (made / "kit.json").write_bytes(msgspec.json.encode(facts))
    made.chmod(0o755)
    files.settle(made, folder)


def _devices(tree: Path, others: list[tuple[str, bytes]]) -> dict[str, list[tuple[str, bytes]]]:
    """Return the drivers of each kind of device that may come, of those that the kernel has the first one of."""
    known = {name for name, _ in others}
    found = {}
    for kind, wanted in modules.DEVICES.items():
        order = [one for one in modules.load_order(tree, modules.WANTED + wanted) if one[0] not in known]
        if wanted[0] in {name for name, _ in order}:
            found[kind] = order
    return found


def _names(read: Sequence[tuple[str, bytes]]) -> list[str]:
    return [name for name, _ in read]


def _fetch(work: Path, meta: str, progress: Progress) -> tuple[str, Path]:
    """Download the kernel package that `meta` depends on: by the system's lists, else by fresh ones of our own."""
    apt = find("apt-get", "apt")
    find("apt-cache", "apt")
    target = work / "deb"
    target.mkdir()
    failure: EngineError | None = None
    for options in ([], _own_state(work)):
        try:
            if options:
                progress("reading the package lists")
                run([apt, "-q", *options, "update"], timeout=_FETCH, env=_environment())
            package = _dependency(meta, options)
            progress(f"fetching {package}")
            run([apt, "-q", *(options or _own_cache(work)), "download", package], timeout=_FETCH, cwd=target, env=_environment())
            found = list(target.glob("*.deb"))
            if len(found) == 1:
                return package, found[0]
            failure = EngineError(f"apt-get download {package} left {len(found)} packages")
        except EngineError as error:
            # Missing or old lists: the second round has fresh ones.
            failure = error
    raise HostLacks(
        f"the kernel package {meta} cannot be fetched: {failure}",
        hint="check the network and the package sources, or give a kernel of your own: kernel=PATH",
    ) from failure


def _dependency(meta: str, options: list[str]) -> str:
    output = run([find("apt-cache", "apt"), *options, "depends", "--important", meta], timeout=60, env=_environment()).decode()
    match = re.search(r"^\s*\|?Depends: (linux-image-[0-9][\w.+-]*)$", output, re.MULTILINE)
    if not match:
        raise EngineError(f"the package lists do not know {meta}", output=output)
    return match[1]


def _environment() -> dict[str, str]:
    return {**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}


def _own_cache(work: Path) -> list[str]:
    cache = work / "apt-cache"
    (cache / "archives/partial").mkdir(parents=True, exist_ok=True)
    # The package manager's own user may not enter the home, which is 0700: apt must fetch as us.
    return ["-o", f"Dir::Cache={cache}", "-o", "APT::Sandbox::User=root"]


def _own_state(work: Path) -> list[str]:
    state = work / "apt-state"
    (state / "lists/partial").mkdir(parents=True, exist_ok=True)
    return [*_own_cache(work), "-o", f"Dir::State={state}", "-o", "Dir::State::status=/var/lib/dpkg/status"]
