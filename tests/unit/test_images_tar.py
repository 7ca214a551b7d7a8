"""Real archives: every kind of entry that tools write arrives in the squashfs as it was."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import subprocess
import tarfile
from pathlib import Path

import pytest
import zstandard
from squash_support import contents, extracted, imported, listing, squashfs
from tar_maker import END, block, file, folder, gnu_long, hardlink, padded, pax, symlink

CAPABILITY = b"\x01\x00\x00\x02\x00\x04\n\x00" + bytes(12)
"""cap_net_bind_service=ep with a newline in it and NULs, as attributes of the kernel have."""


def test_owners_modes_times_links(tmp_path: Path) -> None:
    data = (
        folder("./", mode=0o711, uid=0, mtime=86400)
        + folder("./a", mode=0o2750, uid=7, gid=8, mtime=86400)
        + file("./a/setuid", b"hello", mode=0o4755, uid=3000000, gid=2000000000, mtime=86400)
        + symlink("./a/link", "/etc/../passwd")
        + hardlink("./b", "./a/setuid")
        + block("./a/fifo", "6", mtime=86400)
        + folder("./tmp", mode=0o1777)
        + END
    )
    image = imported(tmp_path, data)
    found = listing(image)
    assert found["/"].startswith("drwx--x--x 0/0 ") and found["/"].endswith("1970-01-02 00:00")
    assert found["a"].startswith("drwxr-s--- 7/8 ")
    assert found["a/setuid"] == "-rwsr-xr-x 3000000/2000000000 5 1970-01-02 00:00"
    assert found["b"] == found["a/setuid"]
    assert found["a/link"].endswith(" -> /etc/../passwd")
    assert found["a/fifo"].startswith("prw-r--r--")
    assert found["tmp"].startswith("drwxrwxrwt")
    assert {"proc", "sys", "dev", "run"} <= found.keys()
    assert contents(image, "b") == b"hello"


def test_a_hard_link_is_one_inode(tmp_path: Path) -> None:
    image = imported(tmp_path, file("a", b"x") + hardlink("b", "a") + END)
    root = extracted(image, tmp_path / "out")
    assert (root / "a").stat().st_ino == (root / "b").stat().st_ino


def test_attributes(tmp_path: Path) -> None:
    records = [
        (b"SCHILY.xattr.security.capability", CAPABILITY),
        (b"SCHILY.xattr.user.colour", b"a=b\n\0c"),
        (b"LIBARCHIVE.xattr.user.other", b"aGVsbG8"),
        (b"SCHILY.xattr.security.selinux", b"label"),
        (b"SCHILY.xattr.trusted.overlay.opaque", b"y"),
    ]
    image = imported(tmp_path, pax(records) + file("a", b"x") + END)
    out = subprocess.run(["unsquashfs", "-stat", squashfs(image)], capture_output=True, check=True).stdout
    assert b"Number of xattr ids 1" in out
    if os.geteuid() != 0:
        pytest.skip("needs root to set security.capability")
    path = extracted(image, tmp_path / "out") / "a"
    assert {name: os.getxattr(path, name) for name in os.listxattr(path)} == {
        "security.capability": CAPABILITY,
        "user.colour": b"a=b\n\0c",
        "user.other": b"hello",
    }


@pytest.mark.parametrize("style", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_and_odd_names(tmp_path: Path, style: int) -> None:
    buffer = io.BytesIO()
    names = ["d/" * 60 + "x" * 200, "new\nline", "ünï", "ca=fe", " space "]
    with tarfile.open(fileobj=buffer, mode="w", format=style) as archive:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(name)
            archive.addfile(member, io.BytesIO(name.encode()[: len(name)]))
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "t" * 3000
        archive.addfile(link)
    image = imported(tmp_path, buffer.getvalue())
    root = extracted(image, tmp_path / "out")
    for name in names:
        assert (root / name).read_bytes() == name.encode()[: len(name)]
    assert os.readlink(root / "link") == "t" * 3000


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    data = gnu_long("L", b"\xff" * 120) + file("x", b"1") + file(b"\xfe\xff", b"2") + gnu_long("K", b"\xff" * 120)
    image = imported(tmp_path, data + hardlink("h", "y") + END)
    root = os.fsencode(extracted(image, tmp_path / "out"))
    assert set(os.listdir(root)) >= {b"\xff" * 120, b"\xfe\xff", b"h"}


def test_ustar_prefix_and_v7_folder(tmp_path: Path) -> None:
    image = imported(tmp_path, block("name", prefix=b"some/where") + block("old/", "\0") + END)
    found = listing(image)
    assert found["some/where/name"][0] == "-" and found["old"][0] == "d"


def test_owner_of_a_root_that_is_not_roots(tmp_path: Path) -> None:
    image = imported(tmp_path, folder("./", uid=1234, gid=5678) + folder("a", uid=1234, gid=5678) + END)
    assert " 1234/5678 " in listing(image)["/"]


@pytest.mark.parametrize("pack", ["plain", "gzip", "gzip-members", "zstd", "zstd-frames", "bz2", "xz"])
def test_packings(tmp_path: Path, pack: str) -> None:
    # Halves that pack badly and well, so that both sides of every decoder's buffers are met.
    body = os.urandom(700_000) + bytes(3_000_000)
    data = file("a", body) + file("b", b"end") + END
    half = len(data) // 2
    packed = {
        "plain": lambda: data,
        "gzip": lambda: gzip.compress(data),
        "gzip-members": lambda: gzip.compress(data[:half]) + gzip.compress(data[half:]) + bytes(512),
        "zstd": lambda: zstandard.compress(data),
        "zstd-frames": lambda: zstandard.compress(data[:half]) + zstandard.compress(data[half:]),
        "bz2": lambda: bz2.compress(data),
        "xz": lambda: lzma.compress(data),
    }[pack]()
    image = imported(tmp_path, packed)
    assert contents(image, "a") == body
    assert contents(image, "b") == b"end"


def test_same_input_same_digest(tmp_path: Path) -> None:
    body = file("etc/a", os.urandom(300_000)) + file("etc/b", b"b") + hardlink("z", "etc/a")
    digests, roots = [], set()
    for number, data in enumerate((body, gzip.compress(body + END), body)):
        (tmp_path / str(number)).mkdir()
        image = imported(tmp_path / str(number), data if data[:2] == b"\x1f\x8b" else data + END)
        digests.append(image.digest)
        roots.add((*image.config.rootfs.diff_ids, squashfs(image).read_bytes()))
    assert len(roots) == 1 and digests[0] == digests[2] != digests[1]  # what came packed is kept as it was packed


def test_sparse_files_of_gnu_tar(tmp_path: Path) -> None:
    source = tmp_path / "sparse"
    with source.open("wb") as handle:
        for at in (0, 1 << 20, 5 << 20):
            handle.seek(at)
            handle.write(b"data at %d" % at)
        for at in range(6 << 20, 26 << 20, 512 << 10):  # more pieces than one header holds
            handle.seek(at)
            handle.write(b"x")
        handle.truncate(40 << 20)
    for style in (["--format=gnu"], ["--sparse-version=0.0"], ["--sparse-version=0.1"], ["--sparse-version=1.0"]):
        pax_format = [] if style == ["--format=gnu"] else ["--format=pax"]
        archive = tmp_path / "archive.tar"
        subprocess.run(["tar", "-C", tmp_path, "-cSf", archive, *pax_format, *style, "sparse"], check=True)
        assert archive.stat().st_size < 2 << 20
        folder_ = tmp_path / style[0].strip("-=")
        folder_.mkdir(exist_ok=True)
        image = imported(folder_, archive.read_bytes())
        assert contents(image, "sparse") == source.read_bytes(), style


def test_duplicates_last_wins(tmp_path: Path) -> None:
    data = (
        file("a", b"first")
        + file("d/x", b"kept")
        + file("a", b"last")
        + folder("d", mode=0o700)
        + symlink("b", "a")
        + file("b", b"file")
        + END
    )
    image = imported(tmp_path, data)
    assert contents(image, "a") == b"last"
    assert contents(image, "d/x") == b"kept"
    assert contents(image, "b") == b"file"
    assert listing(image)["d"].startswith("drwx------")


def test_names_lead_through_links_in_the_image_only(tmp_path: Path) -> None:
    data = folder("usr/lib") + symlink("lib", "usr/lib") + symlink("up", "../../../../usr") + symlink("abs", "/usr/lib")
    data += file("lib/a", b"a") + file("up/b", b"b") + file("abs/c", b"c") + hardlink("h", "lib/a") + END
    image = imported(tmp_path, data)
    found = listing(image)
    assert {"usr/lib/a", "usr/b", "usr/lib/c", "h"} <= found.keys()
    assert found["lib"][0] == "l"


def test_absolute_names_are_made_relative_and_nodes_of_dev_go(tmp_path: Path) -> None:
    data = file("/etc/resolv.conf", b"as it was") + block("./dev/null", "3", device=(1, 3)) + block("dev/sda", "4", device=(8, 0)) + END
    image = imported(tmp_path, data)
    assert contents(image, "etc/resolv.conf") == b"as it was"
    assert not [name for name in listing(image) if name.startswith("dev/")]


def test_git_comment_and_hard_link_with_size(tmp_path: Path) -> None:
    data = (
        pax([(b"comment", b"0123abc"), (b"path", b"evil")], "g")
        + file("a", b"x")
        + block("b", "1", target="a", size=1)
        + file("c", b"y")
        + END
    )
    image = imported(tmp_path, data)
    assert contents(image, "b") == b"x" and contents(image, "c") == b"y"


def test_a_real_tar_of_the_host(tmp_path: Path) -> None:
    """GNU tar writes /etc; what unsquashfs lists is what the host has."""
    archive = tmp_path / "etc.tar"
    subprocess.run(["tar", "-C", "/", "-cf", archive, "etc/alternatives", "etc/passwd"], check=True)
    out = tmp_path / "in"
    out.mkdir()
    image = imported(out, archive.read_bytes())
    assert contents(image, "etc/passwd") == Path("/etc/passwd").read_bytes()
    found = listing(image)
    for name in os.listdir("/etc/alternatives"):
        assert f"etc/alternatives/{name}" in found


def test_padded_stream_after_the_end_is_left(tmp_path: Path) -> None:
    image = imported(tmp_path, file("a", b"x") + END + padded(b"garbage"))
    assert contents(image, "a") == b"x"
