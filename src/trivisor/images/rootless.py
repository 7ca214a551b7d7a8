"""Unpacking layers without root, by the root of a user namespace, where the host gives this user subordinate ids.

There files can be given to the owners that the image says, as far as the ids reach, and machines have the same ids (launch/ids.py). A
process of ours runs this module in the namespace; it is told what to do, and says what came of it, by a file. It is whoever starts it
who holds the locks and puts what was made in place.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from trivisor.core.errors import EngineError, HostLacks, ImageError, NotFound, StorageError, TrivisorError
from trivisor.images.documents import Documents, Library
from trivisor.images.layers import Progress, Unstackable, unpack_layers
from trivisor.images.place import Owners
from trivisor.launch import ids
from trivisor.store.store import Store

TIMEOUT = 1800.0
_PROGRAM = "import sys; sys.path += sys.argv[2:]; from trivisor.images import rootless; rootless.main(sys.argv[1])"
"""The namespace's process has none of our environment, and must find the packages that we found."""
_JOB, _OUTCOME = "job.json", "outcome.json"
_KINDS = {kind.__name__: kind for kind in (ImageError, NotFound, StorageError)}


class _Job(msgspec.Struct):
    store: str
    digest: str
    folders: list[str]
    missing: list[int]


class _Outcome(msgspec.Struct, omit_defaults=True):
    lost: bool = False
    kind: str = ""
    message: str = ""
    hint: str = ""
    errno: int = 0
    unstackable: bool = False


def unpack_as_root(
    store: Store, documents: Documents, folders: Sequence[Path], missing: Sequence[int], work: Path, progress: Progress
) -> bool | None:
    """Do what `unpack_layers` does as the root of a user namespace; tell whether owners were lost, None where there is no such root.

    Raises what it raises.
    """
    try:
        if ids.probe(work).kind != "subids" or not sys.executable:
            return None
    except HostLacks:
        return None
    progress(f"unpacking {len(missing)} of {len(folders)} layers")
    job = _Job(str(store.root), documents.digest, [str(folder) for folder in folders], list(missing))
    (work / _JOB).write_bytes(msgspec.json.encode(job))
    try:
        ids.run_as_root([sys.executable, "-I", "-c", _PROGRAM, str(work), *sys.path], TIMEOUT)
        outcome = msgspec.json.decode((work / _OUTCOME).read_bytes(), type=_Outcome)
    except (EngineError, FileNotFoundError, msgspec.DecodeError):
        for number in missing:
            if folders[number].exists():
                ids.remove_tree(folders[number])
        return None
    if outcome.unstackable:
        raise Unstackable
    if outcome.errno:
        raise OSError(outcome.errno, os.strerror(outcome.errno))
    if outcome.kind:
        raise _KINDS.get(outcome.kind, StorageError)(outcome.message, hint=outcome.hint)
    return outcome.lost


def main(place: str) -> None:
    """Carry out the job that lies in the folder `place`, in the namespace. What went wrong is this process's outcome, not a failure."""
    work = Path(place)
    job = msgspec.json.decode((work / _JOB).read_bytes(), type=_Job)
    store, owners = Store(Path(job.store)), Owners(kept=True)
    folders = [Path(folder) for folder in job.folders]
    outcome = _Outcome()
    try:
        documents = Library(store).read(job.digest)
        if documents is None:
            raise StorageError(f"{job.digest} has no layers")
        unpack_layers(store, documents, folders, job.missing, work, lambda _: None, owners)
        outcome.lost = owners.lost
    except Unstackable:
        outcome.unstackable = True
    except TrivisorError as error:
        outcome.kind, outcome.message, outcome.hint = type(error).__name__, error.message, error.hint
    except OSError as error:
        outcome.errno = error.errno or 5
    finally:
        # What failed is removed here, where root may.
        failed = bool(outcome.kind or outcome.errno or outcome.unstackable)
        for number in job.missing:
            if failed:
                shutil.rmtree(folders[number], ignore_errors=True)
            shutil.rmtree(work / f"staged-{number}", ignore_errors=True)
    (work / _OUTCOME).write_bytes(msgspec.json.encode(outcome))
