"""Images out of the store, as files: OCI image layouts (image-layout.md), and archives that `docker load` reads.

All is written aside, synced and renamed, so that an end in between leaves what was there before. The bytes of blobs are those of the
store, counted and hashed once more on their way: an image has the same digest wherever it is read. An archive for `docker load` is a
layout too, with Docker's older list of images beside the index, as Docker itself writes it since 25.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import os
import secrets
import shutil
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from trivisor.core.errors import AlreadyExists, CallerError, ImageError, NotFound, StorageError
from trivisor.core.files import sync
from trivisor.images import model
from trivisor.images.archive import Saved
from trivisor.images.documents import Documents
from trivisor.images.limits import DEFAULT
from trivisor.images.model import OCI_INDEX, OCI_MANIFEST, REF_NAME, Descriptor
from trivisor.images.reference import Reference
from trivisor.images.registry.crew import Progress, Report
from trivisor.store.faults import translated
from trivisor.store.store import Store

NAME = "io.containerd.image.name"
"""The annotation that has the whole name; REF_NAME has the tag alone, which is what umoci and skopeo ask for."""
_CHUNK = 1 << 20
_VERSION = b'{"imageLayoutVersion":"1.0.0"}'


@dataclass(frozen=True)
class Leaving:
    """One image on its way out: what it is, the name that it bears there ("" for none), and the tag."""

    documents: Documents
    media_type: str
    name: str
    tag: str

    @property
    def descriptor(self) -> Descriptor:
        """What an index says of it."""
        notes = {key: value for key, value in ((NAME, self.name), (REF_NAME, self.tag)) if value}
        documents = self.documents
        return Descriptor(
            self.media_type, documents.digest, len(documents.data), annotations=notes or None, platform=documents.config.platform
        )


def leaving(documents: Documents, media_type: str, name: str, tag: str = "") -> Leaving:
    """Return the image for an index under `name`, or `tag` if that is to be another. A digest is no name."""
    if name.startswith("sha256:"):
        return Leaving(documents, media_type, "", tag)
    reference = Reference.parse(name)
    whole = f"{reference.canonical.removesuffix(f':{reference.tag}')}:{tag}" if tag and reference.tag else reference.canonical
    return Leaving(documents, media_type, whole, tag or reference.tag)


def as_oci(image: Leaving, store: Store, owner: str) -> Leaving:
    """Return it with an OCI manifest, which `owner` holds in the store, if it has Docker's. Raises StorageError."""
    if image.media_type == OCI_MANIFEST:
        return image
    documents = image.documents
    manifest = model.as_oci(documents.manifest)
    data = model.encode(manifest)
    digest = store.add(io.BytesIO(data), owner)
    return Leaving(Documents(digest, data, manifest, documents.config), OCI_MANIFEST, image.name, image.tag)


def to_folder(store: Store, images: Sequence[Leaving], target: Path, report: Report) -> None:
    """Write a layout into the new folder `target`, or add to the layout that is there.

    Raises AlreadyExists for a folder that is none, and for one with another image under that tag; StorageError.
    """
    target = target.absolute()
    with translated(target):
        if (target / "index.json").exists():
            _join(store, images, target, report)
        elif not target.is_dir() or any(target.iterdir()):
            if target.exists() or target.is_symlink():
                raise AlreadyExists(f"{target} is there, and no OCI image layout", hint="name a new folder, or a file: what.tar")
            _new(store, images, target, report)
        else:
            _new(store, images, target, report)


def to_archive(store: Store, images: Sequence[Leaving], target: Path | BinaryIO, report: Report, *, docker: bool) -> None:
    """Write a layout as a tar to the file `target`, which is replaced once all is written, or to a stream.

    With `docker` it has what `docker load` needs. Raises StorageError; of a stream OSError.
    """
    if not isinstance(target, Path):
        _tar(store, images, target, report, docker=docker)
        return
    target = target.absolute()
    with translated(target):
        if target.is_dir():
            raise AlreadyExists(f"{target} is a folder", hint="name a file")
        aside = _aside(target)
        try:
            with aside.open("xb") as file:
                _tar(store, images, file, report, docker=docker)
                file.flush()
                os.fsync(file.fileno())
            aside.rename(target)
            sync(target.parent)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise


# Folders


def _new(store: Store, images: Sequence[Leaving], target: Path, report: Report) -> None:
    aside = _aside(target)
    try:
        aside.mkdir()
        _fill(store, images, aside, report)
        _put(aside / "index.json", _index(images))
        sync(aside)
        aside.rename(target)
        sync(target.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _join(store: Store, images: Sequence[Leaving], target: Path, report: Report) -> None:
    """Add to a layout: blobs first, and the index, which makes them part of it, last."""
    with _alone(target):
        index = _read(target / "index.json")
        entries: list[dict[str, Any]] = index["manifests"]
        for image in images:
            entries = [entry for entry in entries if not _replaced(entry, image, target)]
        _fill(store, images, target, report)
        entries += [msgspec.to_builtins(image.descriptor) for image in images]
        _put(target / "index.json", msgspec.json.encode({**index, "manifests": entries}))
        sync(target)


def _replaced(entry: dict[str, Any], image: Leaving, target: Path) -> bool:
    """Tell whether `image` takes the place of an entry. Raises AlreadyExists if that is another image under the same tag."""
    notes = entry.get("annotations") or {}
    if image.tag and notes.get(REF_NAME) == image.tag and notes.get(NAME, image.name) != image.name:
        raise AlreadyExists(f"{target} has {notes[NAME]} under the tag {image.tag}", hint="choose another tag, or another folder")
    same = entry.get("digest") == image.documents.digest and notes.get(NAME, image.name) == image.name
    return (bool(image.tag) and notes.get(REF_NAME) == image.tag) or (same and not notes.get(REF_NAME))


def _read(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        data = file.read(DEFAULT.document + 1)
    try:
        index = msgspec.json.decode(data, type=dict[str, Any])
        entries = msgspec.convert(index.get("manifests"), list[dict[str, Any]])
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise ImageError(f"{path}: is malformed: {error}", hint="name a new folder") from error
    return {**index, "manifests": entries}


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CallerError(f"another process writes to {folder}", hint="wait for it to end") from None
        yield
    finally:
        os.close(fd)


def _fill(store: Store, images: Sequence[Leaving], folder: Path, report: Report) -> None:
    blobs = folder / "blobs" / "sha256"
    blobs.mkdir(parents=True, exist_ok=True)
    for digest, size, data in _blobs(store, images, report):
        path = blobs / digest.partition(":")[2]
        if not path.exists() or path.stat().st_size != size:
            _put(path, data)
    if not (folder / "oci-layout").exists():
        _put(folder / "oci-layout", _VERSION)
    sync(blobs)


def _put(path: Path, data: bytes | _Blob) -> None:
    """Write a file aside, sync it, and give it its name."""
    aside = _aside(path)
    try:
        with aside.open("xb") as file:
            source = io.BytesIO(data) if isinstance(data, bytes) else data
            while chunk := source.read(_CHUNK):
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        aside.rename(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def _aside(path: Path) -> Path:
    """Return where a thing is while it is made: beside its place, in whose folder it takes no name that anyone reads."""
    return path.with_name(f".{path.name[:200]}.{secrets.token_hex(6)}.partial")


# Archives


def _tar(store: Store, images: Sequence[Leaving], out: BinaryIO, report: Report, *, docker: bool) -> None:
    """Write the tar: the same bytes for the same images. The index comes last: of a stream that breaks off nothing is an image."""
    for name in ("blobs", "blobs/sha256"):
        out.write(_header(name, 0, folder=True))
    for digest, size, data in _blobs(store, images, report):
        out.write(_header(f"blobs/{digest.replace(':', '/')}", size))
        while chunk := data.read(_CHUNK):
            out.write(chunk)
        out.write(bytes(-size % tarfile.BLOCKSIZE))
    documents = {"manifest.json": _saved(images)} if docker else {}
    for name, text in {**documents, "oci-layout": _VERSION, "index.json": _index(images)}.items():
        out.write(_header(name, len(text)) + text + bytes(-len(text) % tarfile.BLOCKSIZE))
    out.write(bytes(2 * tarfile.BLOCKSIZE))


def _header(name: str, size: int, *, folder: bool = False) -> bytes:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode, entry.type = size, 0o755 if folder else 0o644, tarfile.DIRTYPE if folder else tarfile.REGTYPE
    return entry.tobuf(tarfile.PAX_FORMAT)


def _index(images: Iterable[Leaving]) -> bytes:
    manifests = [msgspec.to_builtins(image.descriptor) for image in images]
    return msgspec.json.encode({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": manifests})


def _saved(images: Iterable[Leaving]) -> bytes:
    """Return Docker's manifest.json: each image once, with all its names."""
    found: dict[str, Saved] = {}
    for image in images:
        documents = image.documents
        blobs = [f"blobs/{blob.digest.replace(':', '/')}" for blob in documents.blobs]
        saved = found.setdefault(documents.digest, Saved(blobs[0], blobs[1:], []))
        if image.name and (reference := Reference.parse(image.name)).tag:
            assert saved.repo_tags is not None
            saved.repo_tags.append(Reference(reference.registry, reference.repository, reference.tag).familiar)
    return msgspec.json.encode(list(found.values()))


# Blobs


def _blobs(store: Store, images: Sequence[Leaving], report: Report) -> Iterator[tuple[str, int, _Blob]]:
    """Give digest, size and bytes of each blob, each once."""
    sizes: dict[str, int] = {}
    for image in images:
        sizes.update({blob.digest: blob.size for blob in reversed(image.documents.blobs)})
        sizes[image.documents.digest] = len(image.documents.data)
    for digest, size in sizes.items():
        report(Progress(digest, 0, size, "queued"))
    for digest, size in sizes.items():
        with _Blob(store, digest, size, report) as blob:
            yield digest, size, blob
        report(Progress(digest, size, size, "done"))


class _Blob:
    """The bytes of a blob, whose digest is looked at when they end. Raises StorageError if it is damaged."""

    def __init__(self, store: Store, digest: str, size: int, report: Report) -> None:
        self._store, self._digest, self._size, self._report = store, digest, size, report
        self._sha, self._done = hashlib.sha256(), 0

    def __enter__(self) -> _Blob:
        try:
            self._file = self._store.path(self._digest).open("rb")
        except (NotFound, FileNotFoundError) as error:
            raise self._damaged("is gone") from error
        if (found := os.fstat(self._file.fileno()).st_size) != self._size:
            self._file.close()
            raise self._damaged(f"has {found} bytes, not {self._size}")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, size: int, /) -> bytes:
        data = self._file.read(size)
        self._sha.update(data)
        self._done += len(data)
        if data:
            self._report(Progress(self._digest, self._done, self._size, "writing"))
        elif self._sha.hexdigest() != self._digest.partition(":")[2]:
            raise self._damaged("is damaged")
        return data

    def _damaged(self, why: str) -> StorageError:
        return StorageError(f"the blob {self._digest} {why}", hint="get the image again; `trivisor images check` finds what is damaged")
