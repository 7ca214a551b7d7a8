"""image="host": the host's own programs as a machine's root, by an allow-list.

The root is a small tree of its own: empty folders, the links that make /bin and /lib what they are, and copies of those files
of /etc that programs need and that everybody may read. Over it a machine has its private writable layer, and over
each of `folders()` (/usr, /opt, and /bin or /lib where they are folders) another. Nothing else of the host is in it: no home folders,
keys, shadow files, /run, temporary folders, no home of Trivisor. The root's digest is made of what it was made from.
"""

from __future__ import annotations

import hashlib
import os
import pwd
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

NAME = "host"
PREFIX = "host:"

_FOLDERS = ("usr", "opt", "bin", "sbin", "lib", "lib32", "lib64", "libx32")
_EMPTY = {"proc": 0o755, "sys": 0o755, "dev": 0o755, "run": 0o755, "mnt": 0o755, "srv": 0o755, "home": 0o755, "root": 0o700, "tmp": 0o1777}
_VAR = {"var": 0o755, "var/lib": 0o755, "var/cache": 0o755, "var/log": 0o755, "var/tmp": 0o1777}
_ETC = (
    # who and where
    *("passwd", "group", "nsswitch.conf", "host.conf", "gai.conf", "protocols", "services", "ethers", "networks", "rpc"),
    *("os-release", "debian_version", "redhat-release", "alpine-release", "lsb-release", "machine-info"),
    # libraries, languages, time
    *("ld.so.cache", "ld.so.conf", "ld.so.conf.d", "ld-musl-x86_64.path", "alternatives", "localtime", "timezone"),
    *("locale.alias", "locale.conf", "default/locale", "terminfo", "inputrc", "mime.types", "magic", "magic.mime", "mailcap"),
    # certificates of authorities, never private keys
    *("ssl/certs", "ssl/openssl.cnf", "ca-certificates.conf", "pki/tls/certs", "pki/tls/cert.pem", "pki/tls/openssl.cnf"),
    *("pki/ca-trust/extracted", "crypto-policies/config", "crypto-policies/back-ends"),
    # programs
    *("bash.bashrc", "profile", "login.defs", "shells", "fonts", "perl", "python3", "java-17-openjdk", "java-21-openjdk", "ImageMagick-6"),
)
_WITHHELD = ("boot", "dev", "etc", "proc", "run", "sys")
_FIRST_PERSON = 1000
_MAX_FILE = 16 << 20
_MAX_FILES = 20_000


def folders(host: Path = Path("/"), *, hidden: Path | None = None) -> tuple[Path, ...]:
    """Return the host's folders that lie in the root as they are, each under a writable layer of its own.

    One that holds `hidden`, Trivisor's home, is left out.
    """
    found = (host / name for name in _FOLDERS if (host / name).is_dir() and not (host / name).is_symlink())
    return tuple(folder for folder in found if hidden is None or folder not in hidden.resolve().parents)


def withheld(folder: Path, home: Path) -> str:
    """Say why the working `folder` is not shared with a machine on the host's root, "" if it may be. `home`: Trivisor's.

    What is in it was asked for by working there; what holds other people's things, or keys by custom, was not.
    """
    real = folder.resolve()
    people = {Path(person.pw_dir).resolve() for person in pwd.getpwall() if person.pw_uid == 0 or person.pw_uid >= _FIRST_PERSON}
    people = {place for place in people if place != Path("/") and place.is_dir()} | {Path.home().resolve(), Path("/home")}
    own = home.resolve()
    if real == own or own in real.parents or real in own.parents:
        return "it is or holds Trivisor's home"
    if any(real == place or real in place.parents for place in people):
        return "it is or holds a home folder"
    if real in (Path("/tmp"), Path("/var/tmp"), Path("/dev/shm")) or len(real.parts) < 2 or real.parts[1] in _WITHHELD:
        return "it is the system's"
    return ""


def digest(host: Path = Path("/")) -> str:
    """Return the name of the root that `build` makes now. Cheap: it looks at times and sizes, not at contents."""
    known = hashlib.sha256()
    for path in (*(host / name for name in _FOLDERS), *(host / "etc" / name for name in _ETC)):
        try:
            what = path.lstat()
        except OSError:
            continue
        known.update(f"{path} {what.st_mode} {what.st_ino} {what.st_size} {what.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return PREFIX + known.hexdigest()


def build(root: Path, host: Path = Path("/")) -> None:
    """Make the root in the new folder `root`."""
    root.mkdir(mode=0o755)
    root.chmod(0o755)
    for name, mode in {**_EMPTY, **_VAR, "etc": 0o755}.items():
        (root / name).mkdir()
        (root / name).chmod(mode)
    for name in _FOLDERS:
        if (host / name).is_symlink():
            (root / name).symlink_to((host / name).readlink())
        elif (host / name).is_dir():
            (root / name).mkdir(mode=0o755)
    (root / "var/run").symlink_to("/run")
    for number, (source, name) in enumerate(_wanted(host / "etc")):
        if number >= _MAX_FILES:
            break
        target = root / "etc" / name
        target.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        if source.is_symlink():
            target.symlink_to(source.readlink())
        else:
            shutil.copyfile(source, target)
            target.chmod(0o755 if source.stat().st_mode & 0o111 else 0o644)


def _wanted(etc: Path) -> Iterator[tuple[Path, str]]:
    """Yield the links and files on the list with their names under /etc, and of folders all that is in them."""
    for name in _ETC:
        path = etc / name
        if path.is_dir() and not path.is_symlink():
            for folder, below, files in os.walk(path):
                for entry in sorted([*files, *(sub for sub in below if (Path(folder) / sub).is_symlink())]):
                    found = Path(folder) / entry
                    if _public(found):
                        yield found, str(found.relative_to(etc))
        elif _public(path):
            yield path, name


def _public(path: Path) -> bool:
    """Whether it is a link, or a file that everybody may read: what only some may read is nothing that programs in general need."""
    try:
        what = path.lstat()
    except OSError:
        return False
    if stat.S_ISLNK(what.st_mode):
        return True
    return stat.S_ISREG(what.st_mode) and bool(what.st_mode & stat.S_IROTH) and what.st_size <= _MAX_FILE
