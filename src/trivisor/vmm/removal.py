"""Removing the folders in which machines wrote."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

from trivisor.core.errors import EngineError, StorageError
from trivisor.launch import ids

_BY_HAND = "remove it by hand, then delete again"


def remove_tree(path: Path) -> None:
    """Remove a folder with all that is in it; that it is gone already is no error. Raises StorageError.

    A machine may have left folders that nobody may enter, files of ids that only a user namespace has, or a tree deeper than
    Python's stack: what shutil cannot do is left to rm(1), which is root where those ids are.
    """
    for _ in range(3):
        try:
            shutil.rmtree(path)
        except FileNotFoundError:
            # Another process may be removing the same tree: what matters is that nothing is left.
            if not path.exists():
                return
        except (PermissionError, RecursionError):
            break
        except OSError as error:
            if error.errno != errno.ENOTEMPTY:  # else something was still written beside us: once more, and then by rm(1)
                raise StorageError(f"{path} cannot be removed: {error.strerror}", hint=_BY_HAND) from error
        else:
            return
    try:
        ids.remove_tree(path)
    except EngineError as error:
        raise StorageError(f"{path} cannot be removed: {error.output.strip()[-200:]}", hint=_BY_HAND) from error
