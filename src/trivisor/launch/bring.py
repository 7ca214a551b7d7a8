"""A folder of the host brought into a container that runs, and taken out again: mounts made from outside, as root (move_mount(2)).

A thread of our own joins the container's mount namespace and finds the place there, part by part and through no link: the container's
programs may change its tree meanwhile, and it is theirs. The mount's ids are the container's, as those of its volumes.
"""

from __future__ import annotations

import ctypes
import os
import struct
import threading
from collections.abc import Callable
from pathlib import Path

from trivisor.core.errors import EngineError, HostLacks

_OPEN_TREE, _MOVE_MOUNT, _MOUNT_SETATTR, _UMOUNT2 = 428, 429, 442, 166 if os.uname().machine == "x86_64" else 39
_CLONE_FS, _CLONE_NEWNS = 0x200, 0x20000
_OPEN_TREE_CLONE, _AT_EMPTY_PATH = 1, 0x1000
_FROM_EMPTY, _TO_EMPTY = 0x4, 0x40
_RDONLY, _NOSUID, _NODEV, _IDMAP = 0x1, 0x2, 0x4, 0x100000
_MNT_DETACH, _UMOUNT_NOFOLLOW = 2, 8
_WAIT = 30.0


def bring(pid: int, source: Path, target: str, *, readonly: bool, mapped: bool) -> None:
    """Mount `source` at `target`, a folder of the container whose PID 1 is `pid`; `mapped`: with ids on the disk taken for ids inside.

    Raises EngineError, HostLacks.
    """
    tree = _tree(pid, source, readonly=readonly, mapped=mapped)
    try:
        _inside(pid, lambda: _move(tree, target))
    except OSError as error:
        raise EngineError(f"{source} cannot be mounted at {target}", output=str(error)) from error
    finally:
        os.close(tree)


def take(pid: int, target: str) -> None:
    """Unmount what `bring` mounted; programs that have files open there keep them until they close them. Raises EngineError."""
    try:
        _inside(pid, lambda: _unmount(target))
    except OSError as error:
        raise EngineError(f"{target} cannot be unmounted", output=str(error), hint="was it moved? A stop takes it away") from error


def _tree(pid: int, source: Path, *, readonly: bool, mapped: bool) -> int:
    """Return a mount of `source` that is nowhere yet."""
    folder = _walk(str(source))
    try:
        tree = _call(_OPEN_TREE, folder, b"", _OPEN_TREE_CLONE | _AT_EMPTY_PATH | os.O_CLOEXEC)
    except OSError as error:
        raise HostLacks(
            f"{source} cannot be mounted: {error.strerror}", hint="a running container is given folders by root alone"
        ) from error
    finally:
        os.close(folder)
    try:
        users = os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC) if mapped else 0
        try:
            flags = _NOSUID | _NODEV | (_RDONLY if readonly else 0) | (_IDMAP if mapped else 0)
            attributes = struct.pack("=QQQQ", flags, 0, 0, users)
            _call(_MOUNT_SETATTR, tree, b"", _AT_EMPTY_PATH, attributes, len(attributes))
        finally:
            if mapped:
                os.close(users)
    except OSError as error:
        os.close(tree)
        raise HostLacks(
            f"{source} cannot be shown with a container's ids: {error.strerror}", hint="its file system has no idmapped mounts"
        ) from error
    return tree


def _walk(path: str) -> int:
    """Open a folder part by part, following no link."""
    flags = os.O_PATH | os.O_NOFOLLOW | os.O_DIRECTORY | os.O_CLOEXEC
    at = os.open("/", flags)
    for part in path.split("/"):
        if part:
            try:
                below = os.open(part, flags, dir_fd=at)
            finally:
                os.close(at)
            at = below
    return at


def _move(tree: int, target: str) -> None:
    place = _walk(target)
    try:
        _call(_MOVE_MOUNT, tree, b"", place, b"", _FROM_EMPTY | _TO_EMPTY)
    finally:
        os.close(place)


def _unmount(target: str) -> None:
    parent, _, name = target.rpartition("/")
    folder = _walk(parent)
    try:
        # umount2(2) takes no descriptor, but a path relative to where its thread is; the last part is not followed.
        os.fchdir(folder)
        _call(_UMOUNT2, name.encode(), _MNT_DETACH | _UMOUNT_NOFOLLOW)
    finally:
        os.close(folder)


def _inside(pid: int, work: Callable[[], None]) -> None:
    """Run `work` in a thread that is in the container's mount namespace, whose root is its root."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            namespace = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
            try:
                # Root and working folder are of all threads until one has its own.
                _libc(lambda libc: libc.unshare(_CLONE_FS))
                _libc(lambda libc: libc.setns(namespace, _CLONE_NEWNS))
            finally:
                os.close(namespace)
            work()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, name="trivisor-bring", daemon=True)
    thread.start()
    thread.join(_WAIT)
    if thread.is_alive():
        raise EngineError(f"a mount took over {_WAIT:g} s")
    if failed:
        raise failed[0]


def _call(number: int, *arguments: int | bytes) -> int:
    words = [ctypes.c_char_p(word) if isinstance(word, bytes) else ctypes.c_long(word) for word in arguments]
    return _libc(lambda libc: libc.syscall(ctypes.c_long(number), *words))


def _libc(call: Callable[[ctypes.CDLL], int]) -> int:
    result = call(ctypes.CDLL(None, use_errno=True))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return int(result)
