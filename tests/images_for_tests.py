"""A root of a few megabytes made of this host's own programs: the smallest real image that tests can run.

    root = mini_root(tmp_path / "root")            # a folder
    image = mini_image(home)                       # imported as "mini:latest" in that home

It has sh and the coreutils below with the libraries that they load (ldd(1)), root and one user (1000,
"user"), and nothing that needs the network to get.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import msgspec

from trivisor.core.paths import Home
from trivisor.images import model
from trivisor.images.catalog import Image, Images
from trivisor.images.pack import LayerWriter

PROGRAMS = (
    "sh cat true false ls echo sleep id env pwd stat head wc dd mkdir rm mv cp ln chmod chown touch date uname tty stty sync"
    " seq yes sha256sum test mkfifo kill sort tr tee"
)


def mini_root(folder: Path, programs: str = PROGRAMS) -> Path:
    """Make the root in `folder` and return it. A program that the host lacks is left out."""
    for name in ("bin", "etc", "root", "home/user", "tmp", "var/tmp", "proc", "sys", "dev", "run", "usr/bin"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "tmp").chmod(0o1777)
    (folder / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n")
    (folder / "etc/group").write_text("root:x:0:\nuser:x:1000:\nextra:x:2000:user\n")
    (folder / "etc/os-release").write_text('ID=mini\nPRETTY_NAME="mini"\n')
    for program in programs.split():
        found = shutil.which(program, path="/bin:/usr/bin:/sbin:/usr/sbin")
        if found is not None:
            shutil.copy2(os.path.realpath(found), folder / "bin" / program)
            for library in _libraries(found):
                target = folder / library.lstrip("/")
                if not target.exists():
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(os.path.realpath(library), target)
    if os.geteuid() == 0:
        os.chown(folder / "home/user", 1000, 1000)
    return folder


def mini_image(home: Home, name: str = "mini") -> Image:
    """Import the mini root into `home`; well under a second."""
    home.open()
    with tempfile.TemporaryDirectory() as folder:
        return Images(home).import_(mini_root(Path(folder) / "root"), name)


def layered_image(home: Home, base: str, tars: list[bytes], name: str, **config: object) -> Image:
    """Make the image `name` of the image `base` with more layers (plain tars) on top; `config` are fields of its RunConfig."""
    images = Images(home)
    below = images.documents(images.get(base).digest)
    with images.workspace() as work:
        layers, diffs = list(below.manifest.layers), list(below.config.rootfs.diff_ids)
        for number, tar in enumerate(tars):
            with LayerWriter(work.path / str(number)) as writer:
                writer.write(tar)
                layer = writer.close()
            images.store.adopt(layer.path, work.owner, known=layer.digest)
            layers.append(layer.descriptor)
            diffs.append(layer.diff_id)
        made = msgspec.structs.replace(below.config, rootfs=model.RootFs("layers", diffs), config=model.RunConfig(**config))  # type: ignore[arg-type]
        data = model.encode(made)
        described = model.Descriptor(model.OCI_CONFIG, images.store.add(io.BytesIO(data), work.owner), len(data))
        manifest = model.encode(model.Manifest(described, layers, 2, model.OCI_MANIFEST))
        return images.add(manifest, model.OCI_MANIFEST, name, "a test", work)


def _libraries(program: str) -> list[str]:
    """Return the absolute paths that the dynamic linker loads; none for a static program."""
    done = subprocess.run(["ldd", program], capture_output=True, text=True, check=False)
    return re.findall(r"(/\S+) \(0x", done.stdout)
