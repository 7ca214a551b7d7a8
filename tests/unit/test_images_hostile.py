"""Archives made to hurt: each is refused by an ImageError that names the member, and leaves nothing."""

from __future__ import annotations

import gzip
import lzma
import os
import random
import subprocess
import time
from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from squash_support import contents, imported, left, listing, make_home, squashfs
from tar_maker import END, block, file, folder, gnu_long, hardlink, number, padded, pax, record, symlink

from trivisor.core.errors import ImageError, NotFound
from trivisor.core.units import MIB
from trivisor.images.catalog import Images
from trivisor.images.layer import apply
from trivisor.images.limits import DEFAULT, Limits
from trivisor.images.stream import Section, unpack
from trivisor.images.tree import Tree

SMALL = Limits(total=10 * MIB, entries=100, metadata=100_000, depth=20)
OLD_MAP = b"%011o\0%011o\0" % (0, 512) + b"%011o\0%011o\0" % (256, 512)

HOSTILE = {
    "dotdot": (file("a/../../etc/passwd", b"x"), "'..'"),
    "dotdot-inside": (file("a/../b", b"x"), "'..'"),
    "absolute-dotdot": (file("/../b", b"x"), "'..'"),
    "dotdot-folder": (folder("../"), "'..'"),
    "hardlink-dotdot": (file("a") + hardlink("b", "../../etc/shadow"), "'..'"),
    "hardlink-out": (hardlink("b", "/etc/shadow"), "does not have"),
    "hardlink-through-link": (symlink("s", "/etc") + hardlink("b", "s/shadow"), "does not have"),
    "hardlink-folder": (folder("d") + hardlink("b", "d"), "hard link to the folder"),
    "hardlink-root": (hardlink("b", "."), "hard link to the folder"),
    "device": (block("sda", "4", device=(8, 0)), "device node"),
    "device-deep": (block("a/dev/mem", "3", device=(1, 1)), "device node"),
    "parent-is-file": (file("a") + file("a/b"), "not a folder"),
    "parent-is-fifo": (block("a", "6") + file("a/b"), "not a folder"),
    "parent-loop": (symlink("a", "b") + symlink("b", "a") + file("a/x"), "loop"),
    "parent-self": (symlink("a", "a/a/a") + file("a/x"), "loop"),
    "root-is-link": (symlink(".", "/etc"), "root must be a folder"),
    "root-is-file": (file("/"), ""),
    "link-to-nothing": (symlink("a", ""), "link to nothing"),
    "long-name": (gnu_long("L", b"y" * 300) + file("x"), "longer than 255"),
    "long-path": (gnu_long("L", b"a/" * 3000) + file("x"), "longer than"),
    "nul-in-name": (pax([(b"path", b"a\0b")]) + file("x"), "NUL"),
    "nul-in-link": (pax([(b"linkpath", b"a\0b")]) + symlink("x", "y"), "NUL"),
    "deep": (file("/".join("d" * 30)), "over 20 folders"),
    "deep-by-links": (folder("a/" * 15) + symlink("s", "a/" * 15) + file("s/" + "b/" * 15 + "x"), "over 20 folders"),
    "entries": (b"".join(file(f"f{n}") for n in range(101)), "over 100 entries"),
    "implicit-entries": (b"".join(file(f"d{n}/x") for n in range(51)), "over 100 entries"),
    "total": (block("big", size=11 * MIB), "larger than the limit"),
    "huge": (block("big", size=(1 << 62)), "larger than the limit"),
    "negative": (block("big", size=-1), "negative"),
    "not-a-number": (block("x")[:124] + b"zz" + block("x")[126:], "checksum"),
    "pax-huge": (block("pax", "x", size=2 * MIB) + bytes(2 * MIB) + file("x"), "extension header"),
    "pax-long-size": (block("pax", "x", size=1 << 40), "extension header"),
    "longname-huge": (block("l", "L", size=3 * MIB) + bytes(3 * MIB) + file("x"), "extension header"),
    "pax-length-lies": (block("pax", "x", size=20) + padded(b"99 path=x\n0123456789") + file("x"), "malformed"),
    "pax-length-zero": (block("pax", "x", size=10) + padded(b"0 path=xx\n") + file("x"), "malformed"),
    "pax-no-newline": (block("pax", "x", size=10) + padded(b"10 path=xx") + file("x"), "malformed"),
    "pax-digits": (block("pax", "x", size=90_000) + padded(b"1" * 90_000) + file("x"), "malformed"),
    "pax-size": (pax([(b"size", b"-5")]) + file("x"), "not a number"),
    "pax-size-huge": (pax([(b"size", b"9" * 400)]) + file("x"), "not a number"),
    "pax-uid": (pax([(b"uid", b"4294967295")]) + file("x"), "not a user id"),
    "pax-mtime": (pax([(b"mtime", b"nan")]) + file("x"), "not a number"),
    "pax-alone": (pax([(b"path", b"x")]), "belongs to no entry"),
    "pax-without-end": (pax([(b"path", b"x")]) * 50 + file("x"), "too many extension"),
    "globals-without-end": (pax([(b"comment", b"x")], "g") * 50 + file("x"), "too many extension"),
    "metadata": (b"".join(pax([(b"SCHILY.xattr.user.a", b"v" * 60_000)]) + file(f"f{n}") for n in range(3)), "over the limit of 100000"),
    "xattr-name": (pax([(b"SCHILY.xattr.user." + b"a" * 300, b"v")]) + file("x"), "too long"),
    "xattr-base64": (pax([(b"LIBARCHIVE.xattr.user.a", b"!!!")]) + file("x"), "malformed"),
    "multi-volume": (block("x", "M"), "not supported"),
    "unknown-type": (block("x", "Z"), "not supported"),
    "sparse-huge": (pax([(b"GNU.sparse.map", b""), (b"GNU.sparse.size", b"99999999999")]) + file("x"), "larger than the limit"),
    "sparse-overlap": (block("x", "S", size=1024, tail=OLD_MAP.ljust(97, b"\0") + number(4096, 12)) + bytes(1024), "sparse map"),
    "sparse-beyond": (pax([(b"GNU.sparse.map", b"100,600"), (b"GNU.sparse.size", b"512")]) + file("x", bytes(600)), "sparse map"),
    "sparse-mismatch": (pax([(b"GNU.sparse.map", b"0,5"), (b"GNU.sparse.size", b"512")]) + file("x", bytes(600)), "does not match"),
    "sparse-odd": (pax([(b"GNU.sparse.map", b"0,5,7"), (b"GNU.sparse.size", b"512")]) + file("x", bytes(5)), "sparse map"),
    "sparse-map-endless": (pax([(b"GNU.sparse.major", b"1"), (b"GNU.sparse.realsize", b"9")]) + file("x", b"9" * 5000), "sparse map"),
    "sparse-map-count": (
        pax([(b"GNU.sparse.major", b"1"), (b"GNU.sparse.realsize", b"9")]) + file("x", b"9" * 15 + b"\n" + bytes(600)),
        "sparse map",
    ),
    "mount-point-is-file": (file("proc", b"x"), "must be a folder"),
    "empty": (b"", "nothing in it"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_refused(tmp_path: Path, case: str) -> None:
    data, why = HOSTILE[case]
    begun = time.monotonic()
    if case == "root-is-file":  # its name ends with a slash: a folder, as v7 wrote them
        assert listing(imported(tmp_path, data + file("a") + END))
        return
    with pytest.raises(ImageError, match=why.replace(".", r"\.") or None) as caught:
        imported(tmp_path, data + END, SMALL)
    assert "archive" in str(caught.value)
    assert time.monotonic() - begun < 10
    home = make_home(tmp_path)
    assert left(home) == [] and Images(home).list() == []
    assert Images(home).collect() == 0


def test_not_an_archive(tmp_path: Path) -> None:
    for data in (b"", b"hello", os.urandom(4096), b"\x7fELF" + bytes(2000), b"\x1f\x8b", b"\x28\xb5\x2f\xfd"):
        with pytest.raises(ImageError):
            imported(tmp_path, data)
    home = make_home(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "nothing", Path("/dev/zero"), tmp_path / "fifo"):
        with pytest.raises(ImageError):
            Images(home).import_(path, "x")
    assert left(home) == []


def test_truncated_everywhere(tmp_path: Path) -> None:
    data = folder("d") + pax([(b"path", b"long")]) + file("x", b"data" * 300) + gnu_long("L", b"name") + file("y", b"z") + END
    whole = [data, gzip.compress(data, mtime=0), zstandard.compress(data), lzma.compress(data)]
    for packed in whole:
        # The end marker is two blocks, the first says it all. The last bytes of a packed one hold only its checksum.
        end = len(packed) - 1024 if packed is data else len(packed) - 40
        for cut in sorted({*range(1, end, 97), *range(512, end, 512), end}):
            with pytest.raises(ImageError):
                _read(tmp_path, packed[:cut])


def test_bit_flips_in_packed_data(tmp_path: Path) -> None:
    data = file("x", random.Random(1).randbytes(2000)) + END
    for packed in (gzip.compress(data, mtime=0), lzma.compress(data)):
        for at in range(20, 1500, 111):
            flipped = bytearray(packed)
            flipped[at] ^= 0x55
            try:
                _read(tmp_path, bytes(flipped))
            except ImageError:
                continue


@pytest.mark.parametrize("pack", ["gzip", "zstd", "xz"])
def test_bombs_are_read_in_pieces(tmp_path: Path, pack: str) -> None:
    """A gigabyte of zeros in some kilobytes costs neither memory nor minutes."""
    size = 1 << 30
    header = block("bomb", size=size)
    if pack == "zstd":
        compressor = zstandard.ZstdCompressor().compressobj()
        packed = compressor.compress(header) + b"".join(compressor.compress(bytes(MIB)) for _ in range(size // MIB)) + compressor.flush()
    elif pack == "xz":
        xz = lzma.LZMACompressor(preset=0)
        packed = xz.compress(header) + b"".join(xz.compress(bytes(MIB)) for _ in range(300)) + xz.flush()
    else:
        packed = gzip.compress(header) + gzip.compress(bytes(16 * MIB)) * 30
    assert len(packed) < 2 * MIB
    with pytest.raises(ImageError, match="a bomb"):
        _read(tmp_path, packed, Limits(ratio=900))
    with pytest.raises(ImageError, match="larger than the limit"):
        _read(tmp_path, packed, SMALL)


def test_an_xz_that_wants_all_memory(tmp_path: Path) -> None:
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 1 << 29}]
    packed = lzma.compress(file("x", b"y") + END, filters=filters)
    with pytest.raises(ImageError, match=r"[Mm]emory"):
        _read(tmp_path, packed)


def test_links_to_links_cost_bounded_time(tmp_path: Path) -> None:
    """Each name leads through 40 links of 1000 folders each."""
    deep = "/".join(["."] * 10 + ["d"] * 15)
    data = folder(deep) + b"".join(symlink(f"{'l' * (n + 1)}", f"{deep}/{'../' * 15}{'l' * n}" if n else deep) for n in range(40))
    data += b"".join(file(f"{'l' * 38}/{n}") for n in range(50))
    with pytest.raises(ImageError, match=r"too many folders and links|loop|over 100 entries"):
        _read(tmp_path, data + END, SMALL)


def test_char_0_0_hides_and_is_no_node(tmp_path: Path) -> None:
    image = imported(tmp_path, file("a", b"x") + file("b", b"y") + block("a", "3") + END)
    assert "a" not in listing(image) and contents(image, "b") == b"y"


def test_shell_words_and_options_as_names(tmp_path: Path) -> None:
    names = ["-comp", "--", "-", "$(touch x)", "`id`", "a b", "*", "\\", "\\n", '"', "'", "%s", "\x1b[2J", "..."]
    image = imported(tmp_path, b"".join(file(name, name.encode()) for name in names) + END)
    subprocess.run(["unsquashfs", "-q", "-n", "-d", tmp_path / "out", squashfs(image)], check=True, capture_output=True)
    assert {name: (tmp_path / "out" / name).read_bytes() for name in names} == {name: name.encode() for name in names}


def test_a_failed_import_keeps_the_old_image(tmp_path: Path) -> None:
    old = imported(tmp_path, file("a", b"old") + END)
    with pytest.raises(ImageError):
        imported(tmp_path, file("../a", b"new") + END)
    assert Images(make_home(tmp_path)).get("x") == old


def test_a_failed_first_import_names_nothing(tmp_path: Path) -> None:
    with pytest.raises(ImageError):
        imported(tmp_path, file("../a") + END)
    with pytest.raises(NotFound) as caught:
        Images(make_home(tmp_path)).get("x")
    assert "bootstrap" in caught.value.hint


def _read(tmp_path: Path, data: bytes, limits: Limits = DEFAULT) -> Tree:
    path = tmp_path / "data"
    path.write_bytes(data)
    with path.open("rb") as handle:
        tree = Tree(limits, "archive")
        apply(tree, unpack(Section(handle.fileno(), 0, len(data), "archive"), limits), 0, limits, layered=True)
    return tree


# Fuzzing: whatever the bytes, a tree inside its limits or an ImageError, soon.

NAMES = st.sampled_from(
    ["a", "b", "a/b", "a/b/c", "../a", "/a", "./", ".wh.a", "a/.wh..wh..opq", ".wh.", ".wh...", "dev/x", "", "a/", "\xe9"]
)
FIELDS = st.fixed_dictionaries(
    {
        "kind": st.sampled_from("0123456789LKxgSDVM\0Z"),
        "size": st.one_of(st.integers(0, 2000), st.sampled_from([-1, 1 << 33, 1 << 62])),
        "target": NAMES,
        "mode": st.integers(0, 0o177777),
        "device": st.tuples(st.integers(0, 9), st.integers(0, 9)),
        "mtime": st.integers(-10, 1 << 40),
    }
)
RECORDS = st.lists(
    st.tuples(
        st.sampled_from(
            [
                b"path",
                b"linkpath",
                b"size",
                b"uid",
                b"mtime",
                b"GNU.sparse.map",
                b"GNU.sparse.size",
                b"GNU.sparse.major",
                b"GNU.sparse.name",
            ]
            + [b"GNU.sparse.numblocks", b"GNU.sparse.offset", b"GNU.sparse.numbytes", b"SCHILY.xattr.user.a", b"LIBARCHIVE.xattr.user.b"]
        ),
        st.one_of(st.binary(max_size=20), st.sampled_from([b"0,5", b"1", b"5", b"0,1,4,2", b"a", b"1.5"])),
    ),
    max_size=4,
)


@st.composite
def archives(draw: st.DrawFn) -> bytes:
    parts = []
    for _ in range(draw(st.integers(0, 6))):
        if draw(st.booleans()):
            data = b"".join(record(key, value) for key, value in draw(RECORDS))
            parts.append(block("pax", draw(st.sampled_from("xxxgL")), size=len(data)) + padded(data))
        fields = draw(FIELDS)
        name = draw(NAMES)
        parts.append(block(name, **fields) + padded(draw(st.binary(max_size=600))))
    data = b"".join(parts) + draw(st.sampled_from([END, b"", bytes(512)]))
    flips = draw(st.lists(st.tuples(st.integers(0, max(0, len(data) - 1)), st.integers(0, 255)), max_size=3))
    out = bytearray(data)
    for at, value in flips:
        if out:
            out[at] = value
    return bytes(out)


@pytest.mark.fuzz
@settings(max_examples=500, deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.one_of(archives(), archives().map(lambda data: gzip.compress(data, 1)), st.binary(max_size=2000)))
def test_fuzz_the_reader(tmp_path: Path, data: bytes) -> None:
    try:
        tree = _read(tmp_path, data, SMALL)
    except ImageError:
        return
    for path, node in tree.walk():
        assert ".." not in path.split("/") and not path.startswith("/") and "//" not in path
        assert node.kind in "fdlp"
        assert node.content is None or 0 <= node.content.size <= SMALL.total


@pytest.mark.fuzz
@settings(max_examples=40, deadline=20000, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=archives())
def test_fuzz_the_whole_import(tmp_path: Path, data: bytes) -> None:
    try:
        image = imported(tmp_path, data, SMALL)
    except ImageError:
        pass
    else:
        listing(image)
    assert left(make_home(tmp_path)) == []
