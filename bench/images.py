"""How quickly does an image come from a registry, and how quickly is one built?

skopeo and umoci fetch and unpack the same image from the same registry; buildah builds the same recipe on the same base.
"""

from __future__ import annotations

import io
import os
import random
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.common import Row, Series, main, row
from trivisor import VMM
from trivisor.core.units import MIB
from trivisor.images import compose
from trivisor.images.compose import Stacked
from trivisor.images.model import RunConfig
from trivisor.images.pack import LayerWriter
from trivisor.va.build.build import build
from trivisor.va.build.options import Options

LAYERS = 6
SIZE = 200 * MIB
_FILE = 24 << 10
STEPS = 10
BASE = "debian"
NOTES = """
The image that is pulled has 6 layers with 200 MB of files of 24 KB, which half compress. Ours are ready when the folders are there that a
container is started on; skopeo copy and umoci unpack leave one folder. Each round begins with an empty store. The ten steps each write a
file, behind the container wall without a network; buildah has them in a chroot, with --layers, and no cache. Rebuilding finds every step.
The bound on bytes is those of the layer that is new, and 5 percent.
"""


def rows(quick: bool) -> list[Row]:
    """Measure. Peers that are not installed leave their columns empty."""
    rounds = 2 if quick else 5
    with tempfile.TemporaryDirectory(prefix="trivisor-bench-") as folder:
        return [*_pulls(Path(folder), rounds), *_builds(Path(folder), rounds)]


def _pulls(folder: Path, rounds: int) -> list[Row]:
    if shutil.which("docker-registry") is None:
        return []
    ours, theirs, shared, told = Series(), Series(), Series(), Series()
    with _registry(folder / "registry") as host:
        new = _publish(folder / "publisher", host)
        peers = shutil.which("skopeo") and shutil.which("umoci")
        for _ in range(rounds):
            with _home(folder) as vmm:
                with ours.timed():
                    vmm.images.lowers(vmm.images.pull(f"{host}/bench:one").digest)
                before = _stored(vmm.home)
                with shared.timed():
                    vmm.images.lowers(vmm.images.pull(f"{host}/bench:two").digest)
                told.values.append((_stored(vmm.home) - before) / new)
            if peers:
                with tempfile.TemporaryDirectory(dir=folder) as place, theirs.timed():
                    _run("skopeo", "copy", "-q", "--src-tls-verify=false", f"docker://{host}/bench:one", f"oci:{place}/oci:one")
                    _run("umoci", "unpack", "--image", f"{place}/oci:one", f"{place}/bundle")
    return [
        row("pull of 200 MB in 6 layers, to a ready root", ours, "ms", peer="skopeo copy + umoci unpack", against=theirs, share=1.2),
        row("pull of a second image that shares 5 of 6 layers, to a ready root", shared, "ms"),
        row("bytes that it adds, beside those of its own layer", told, "x", bound=1.05),
    ]


def _builds(folder: Path, rounds: int) -> list[Row]:
    ours, theirs, again, command = Series(), Series(), Series(), Series()
    context = folder / "context"
    context.mkdir()
    recipe = "".join(f"RUN echo {number} > /file{number}\n" for number in range(STEPS))
    with VMM() as vmm:
        if all(image.name != f"{BASE}:latest" for image in vmm.images.list()):
            return []
        (context / "Containerfile").write_text(f"FROM {BASE}\n{recipe}")
        options = Options(network="none", memory="128M")
        build(vmm, context, ["bench-build"], options=options)
        buildah = _Buildah(folder / "buildah", vmm, recipe)
        for _ in range(rounds):
            with ours.timed():
                build(vmm, context, ["bench-build"], options=Options(network="none", memory="128M", use_cache=False))
            with again.timed():
                build(vmm, context, ["bench-build"], options=options)
            with command.timed():
                _run(
                    sys.executable,
                    "-m",
                    "trivisor",
                    "build",
                    "-q",
                    "-t",
                    "bench-build",
                    "--network",
                    "none",
                    "--memory",
                    "128M",
                    str(context),
                )
            if buildah.there:
                with theirs.timed():
                    buildah.build()
        vmm.images.remove("bench-build")
    return [
        row("build of ten RUN steps, container wall", ours, "ms", peer="buildah bud --isolation chroot", against=theirs, share=0.5),
        row("the same with every step cached", again, "ms", bound=150),
        row("the same as a command: trivisor build", command, "ms"),
    ]


class _Buildah:
    """buildah with a store of its own, in which the base is."""

    def __init__(self, folder: Path, vmm: VMM, recipe: str) -> None:
        self.there = shutil.which("buildah") is not None and shutil.which("skopeo") is not None and os.geteuid() == 0
        self._context = folder / "context"
        self._store = ["--root", str(folder / "root"), "--runroot", str(folder / "run"), "--storage-driver", "overlay"]
        if self.there:
            self._context.mkdir(parents=True)
            (self._context / "Containerfile").write_text(f"FROM localhost/bench-base\n{recipe}")
            vmm.images.export(BASE, folder / "oci", archive=False)
            self._call("pull", "-q", f"oci:{folder / 'oci'}")
            image = subprocess.run(["buildah", *self._store, "images", "-q"], check=True, capture_output=True, text=True).stdout.split()[0]
            self._call("tag", image, "localhost/bench-base")

    def build(self) -> None:
        """Build all steps anew."""
        self._call("bud", "-q", "--isolation", "chroot", "--layers", "--no-cache", "-t", "bench-build", str(self._context))

    def _call(self, *words: str) -> None:
        _run("buildah", *self._store, *words)


def _publish(home: Path, host: str) -> int:
    """Push the images; return the bytes of the layer that the second has for itself."""
    chance = random.Random(1)
    with VMM(home) as vmm, vmm.images.workspace() as work:
        layers = []
        for number in range(LAYERS + 1):
            with LayerWriter(work.path / f"layer{number}") as writer:
                writer.write(_tar(number, chance))
                packed = writer.close()
            vmm.images.store.adopt(packed.path, work.owner)
            layers.append(Stacked(packed.descriptor, packed.diff_id))
        for name, chosen in (("one", layers[:LAYERS]), ("two", [*layers[: LAYERS - 1], layers[-1]])):
            compose.add(vmm.images, work, chosen, RunConfig(), [], name=f"{host}/bench:{name}", source="bench", created=0.0)
            vmm.images.push(f"{host}/bench:{name}")
        return layers[-1].descriptor.size


def _tar(number: int, chance: random.Random) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for file in range(SIZE // LAYERS // _FILE):
            info = tarfile.TarInfo(f"usr/share/bench{number}/{file % 50}/{file}")
            info.size = _FILE
            tar.addfile(info, io.BytesIO(chance.randbytes(_FILE // 2) + bytes(_FILE // 2)))
    return out.getvalue()


def _stored(home: Path) -> int:
    return sum(blob.stat().st_size for blob in (home / "store/blobs/sha256").iterdir())


@contextmanager
def _home(folder: Path) -> Iterator[VMM]:
    with tempfile.TemporaryDirectory(dir=folder) as place, VMM(Path(place) / "home") as vmm:
        yield vmm


@contextmanager
def _registry(folder: Path) -> Iterator[str]:
    """Run a registry on a free port of the loopback; give its name."""
    folder.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{probe.getsockname()[1]}"
    config = f"version: 0.1\nstorage:\n  filesystem:\n    rootdirectory: {folder}\nhttp:\n  addr: {host}\n"
    (folder / "config.yml").write_text(config)
    server = subprocess.Popen(
        ["docker-registry", "serve", str(folder / "config.yml")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            try:
                socket.create_connection(("127.0.0.1", int(host.rpartition(":")[2])), 1).close()
                break
            except OSError:
                time.sleep(0.05)  # it says nothing when it listens
        yield host
    finally:
        server.terminate()
        server.wait(20)


def _run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True, stdin=subprocess.DEVNULL)


if __name__ == "__main__":
    main(rows, NOTES)
