"""Looking into a squashfs with unsquashfs, which needs no root to list."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from trivisor.core.paths import Home
from trivisor.images import stacked
from trivisor.images.catalog import Image, Images
from trivisor.images.limits import DEFAULT, Limits


def make_home(folder: Path) -> Home:
    home = Home(folder / "home")
    home.open()
    return home


def imported(folder: Path, data: bytes, limits: Limits = DEFAULT) -> Image:
    """Import the archive `data` into a home in `folder`."""
    archive = folder / "archive"
    archive.write_bytes(data)
    return Images(make_home(folder)).import_(archive, "x", limits=limits)


def squashfs(image: Image) -> Path:
    """Return the image's root, made if it is not there; its home is told by where that lies."""
    return Images(Home(image.rootfs.parents[3])).rootfs(image.digest)


def listing(image: Image | Path) -> dict[str, str]:
    """Return path -> "mode uid/gid size date [-> target]" of all but the root."""
    rootfs = image if isinstance(image, Path) else squashfs(image)
    done = subprocess.run(["unsquashfs", "-lln", rootfs], capture_output=True, check=True, env={**os.environ, "TZ": "UTC"})
    found = {}
    for line in done.stdout.decode(errors="surrogateescape").splitlines():
        mode, owner, size, day, hour, name = line.split(None, 5)
        path, arrow, target = name.partition(" -> ")
        found[path.removeprefix("squashfs-root").lstrip("/") or "/"] = f"{mode} {owner} {size} {day} {hour}{arrow}{target}"
    return found


def contents(image: Image, path: str) -> bytes:
    return subprocess.run(["unsquashfs", "-cat", squashfs(image), path], capture_output=True, check=True).stdout


def extracted(image: Image, target: Path) -> Path:
    """Unpack as whoever runs the tests: owners and some attributes need root."""
    subprocess.run(["unsquashfs", "-q", "-n", "-d", target, squashfs(image)], capture_output=True, check=os.geteuid() == 0)
    return target


def unpacked(root: Path, target: Path) -> tuple[Path, ...]:
    """Unpack each squashfs of a root, the uppermost first."""
    target.mkdir()
    places = [0, *stacked.pieces(root)]
    for at in places:
        subprocess.run(["unsquashfs", "-q", "-n", "-o", str(at), "-d", target / str(at), root], capture_output=True, check=True)
    return tuple(target / str(at) for at in reversed(places))


def left(home: Home) -> list[str]:
    """What an import must not leave: workspaces, blobs that nothing names."""
    return [str(path) for path in [*(home.store / "tmp").iterdir(), *home.tmp.iterdir()]]
