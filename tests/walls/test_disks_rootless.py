"""Disks without root, with one id and with subordinate ids: in, out, and an image's root as a disk."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
from pathlib import Path

import pytest
from rootless_parity import User, user

from trivisor import VMM
from trivisor.core.units import MIB
from trivisor.images.disks import rootdisk
from trivisor.images.disks.rootdisk import Layer

__all__ = ["user"]

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else"),
    pytest.mark.timeout(300),
]


def test_disks_and_a_root(user: User) -> None:
    def life(vmm: VMM) -> None:
        folder = vmm.home / "tmp-disks"
        folder.mkdir()
        (folder / "raw.img").write_bytes(b"content".ljust(1 << 20, b"\0"))
        vmm.disks.import_(folder / "raw.img", "data")
        vmm.disks.export("data", folder / "data.ova")
        assert vmm.disks.import_package(folder / "data.ova", "again").disks[0].size == 1 << 20
        with tarfile.open(folder / "root.tar", "w") as tar:
            for name, owner in (("roots", 0), ("theirs", 1000)):
                info = tarfile.TarInfo(name)
                info.uid, info.size = owner, 5
                tar.addfile(info, io.BytesIO(b"hello"))
        vmm.images.import_(folder / "root.tar", "small")
        documents = vmm.images.documents(vmm.images.get("small").digest)
        found = zip(documents.manifest.layers, documents.config.rootfs.diff_ids, strict=True)
        layers = [Layer(vmm.images.store.path(layer.digest), diff_id) for layer, diff_id in found]
        disk = folder / "disk"
        told: list[str] = []
        rootdisk.make(layers, disk, folder, None, 256 * MIB, told.append)
        assert "User:     0" in said(disk, "stat /roots") and (user.kind == "subids") == (rootdisk.LOST not in told)
        owner = f"User:  {1000 if user.kind == 'subids' else 0:4}"
        assert owner in said(disk, "stat /theirs") and said(disk, "cat /theirs") == "hello"
        assert {entry.name for entry in folder.iterdir()} == {"raw.img", "data.ova", "root.tar", "disk"}
        for name in ("data", "again"):
            vmm.disks.remove(name)

    user.does(life)


def said(disk: Path, request: str) -> str:
    return subprocess.run(["/sbin/debugfs", "-R", request, disk], capture_output=True, text=True, check=True).stdout
