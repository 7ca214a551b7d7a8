"""A stage as it is read from top to bottom: what each instruction changes in the image's config, and which of them make a layer.

Nothing is run here. `read` takes one instruction and gives back what is to be done to the root file system, as a value: a Run, a Copy,
a Folder, or None where the config alone changes (Dockerfile reference; OCI image-spec, config.md).
"""

from __future__ import annotations

import posixpath
import re
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import msgspec

from trivisor.core.errors import RecipeError
from trivisor.images.model import Healthcheck, RunConfig
from trivisor.va.build.mounts import Mount
from trivisor.va.build.parse import Containerfile, Heredoc, Instruction
from trivisor.va.build.recipe import mounts, pairs
from trivisor.va.build.words import WordError, expand, split
from trivisor.vmm import runconfig

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
SHELL = ("/bin/sh", "-c")
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "FTP_PROXY", "NO_PROXY", "ALL_PROXY")
"""Arguments that every RUN sees where they are given, in either case of letters, and that no cache knows of."""
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ns|us|µs|ms|s|m|h)")
_UNITS = {"ns": 1, "us": 1_000, "µs": 1_000, "ms": 10**6, "s": 10**9, "m": 60 * 10**9, "h": 3600 * 10**9}
_PORT = re.compile(r"(\d{1,5})(?:-(\d{1,5}))?(?:/(tcp|udp|sctp))?")


@dataclass(frozen=True)
class Run:
    """A command in the machine. `script` is a file that is the command, with its own interpreter."""

    line: int
    argv: tuple[str, ...]
    env: dict[str, str]
    user: str
    cwd: str
    mounts: tuple[Mount, ...] = ()
    network: str = "default"
    script: str = ""


@dataclass(frozen=True)
class Copy:
    """Files into the image. `texts` are files of the recipe itself, by name."""

    line: int
    sources: tuple[str, ...]
    target: str
    stage: str = ""
    """Where they come from: a stage or an image; "" the context."""
    owner: str = ""
    mode: int | None = None
    exclude: tuple[str, ...] = ()
    texts: tuple[tuple[str, str], ...] = ()
    unpack: bool = False
    """ADD: archives are unpacked, and addresses fetched."""
    checksum: str = ""


@dataclass(frozen=True)
class Folder:
    """WORKDIR: a folder that is there afterwards."""

    line: int
    path: str


Step = Run | Copy | Folder


@dataclass
class State:
    """One stage. `given` are the arguments of the build, `outer` those that stand before the first FROM."""

    file: Containerfile
    given: Mapping[str, str]
    outer: Mapping[str, str]
    config: RunConfig = field(default_factory=RunConfig)
    author: str = ""
    env: dict[str, str] = field(default_factory=dict)
    arguments: dict[str, str] = field(default_factory=dict)
    _cmd_here: bool = False

    def take(self, run: RunConfig, author: str) -> None:
        """Begin with the config of what a FROM names."""
        self.config = msgspec.structs.replace(run, on_build=None)
        self.author = author
        self.env = dict(pair.split("=", 1) for pair in run.env or () if "=" in pair[1:])

    @property
    def workdir(self) -> str:
        return self.config.working_dir or "/"

    @property
    def shell(self) -> tuple[str, ...]:
        return tuple(self.config.shell or SHELL)

    @property
    def values(self) -> dict[str, str]:
        """What a variable means: the environment comes before arguments."""
        return {**self.arguments, **self.env}

    def final(self) -> RunConfig:
        """Return the config as it is now."""
        return msgspec.structs.replace(self.config, env=[f"{key}={value}" for key, value in self.env.items()] or None)

    def read(self, found: Instruction) -> Step | None:
        """Take one instruction; return what it does to files. Raises RecipeError."""
        reader = _READERS[found.name]
        before = self.config
        try:
            step = reader(self, found)
            if self.config is not before:
                runconfig.read(self.config)
            return step
        except (WordError, runconfig.Refused) as error:
            raise self.wrong(found, str(error)) from error

    def wrong(self, found: Instruction, message: str, hint: str = "") -> RecipeError:
        """Return the error for an instruction."""
        return RecipeError(self.file.name, found.line, f"{found.name}: {message}", hint=hint)

    # What makes layers

    def run(self, found: Instruction) -> Run:
        argv, script = self._command(found)
        network = found.flag("network", "default")
        if network not in ("default", "none"):
            raise self.wrong(found, f"--network={network} is not possible", "there are default and none; see `trivisor build --network`")
        expanded = [self._mount(mount) for mount in mounts(self.file.name, found)]
        proxies = {key: value for key, value in self.given.items() if key.upper() in PROXIES}
        env = {"PATH": PATH, **proxies, **self.arguments, **self.env}
        return Run(found.line, argv, env, self.config.user or "", self.workdir, tuple(expanded), network, script)

    def copy(self, found: Instruction) -> Copy:
        words = self._words(found)
        if len(words) < 2:
            raise self.wrong(found, "it takes sources and a target", f"write {found.name} SOURCE... TARGET")
        *sources, target = words
        texts: list[tuple[str, str]] = []
        names = iter(found.heredocs)
        plain: list[str] = []
        for source in sources:
            if source.startswith("<<") and (text := next(names, None)) is not None:
                texts.append((text.name, expand(text.text, self.values, self.file.escape, quotes=False) if text.expand else text.text))
            else:
                plain.append(source)
        if len(sources) > 1 and not target.endswith("/"):
            raise self.wrong(found, f"{len(sources)} sources need a folder to go to", f"end the target with a slash: {target}/")
        return Copy(
            found.line,
            tuple(plain),
            _join(self.workdir, target),
            found.flag("from"),
            expand(found.flag("chown"), self.values, self.file.escape),
            self._mode(found),
            tuple(value for key, value in found.flags if key == "exclude"),
            tuple(texts),
            found.name == "ADD",
            found.flag("checksum"),
        )

    def workdir_(self, found: Instruction) -> Folder:
        path = _join(self.workdir, self._one(found)).rstrip("/") or "/"
        self.config = msgspec.structs.replace(self.config, working_dir=path)
        return Folder(found.line, path)

    # What changes the config alone

    def arg(self, found: Instruction) -> None:
        for name, default in pairs(self.file, found, self.values, bare=True):
            value = self.given.get(name, default if default is not None else self.outer.get(name))
            if value is not None:
                self.arguments[name] = value

    def env_(self, found: Instruction) -> None:
        self.env |= {name: value or "" for name, value in pairs(self.file, found, self.values)}

    def label(self, found: Instruction) -> None:
        labels = {**(self.config.labels or {}), **{name: value or "" for name, value in pairs(self.file, found, self.values)}}
        self.config = msgspec.structs.replace(self.config, labels=labels)

    def cmd(self, found: Instruction) -> None:
        self._cmd_here = True
        self.config = msgspec.structs.replace(self.config, cmd=self._argv(found))

    def entrypoint(self, found: Instruction) -> None:
        # What the base wanted as arguments was for the base's own program.
        self.config = msgspec.structs.replace(self.config, entrypoint=self._argv(found), cmd=self.config.cmd if self._cmd_here else None)

    def user(self, found: Instruction) -> None:
        self.config = msgspec.structs.replace(self.config, user=self._one(found))

    def expose(self, found: Instruction) -> None:
        ports: dict[str, dict[str, object]] = {**(self.config.exposed_ports or {})}
        for word in expand(found.text, self.values, self.file.escape).split():
            match = _PORT.fullmatch(word)
            first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
            if match is None or not 1 <= first <= last <= 65535:
                raise self.wrong(found, f"{word[:40]!r} is no port", "for example 80, 53/udp or 8000-8010")
            ports |= {f"{port}/{match[3] or 'tcp'}": {} for port in range(first, last + 1)}
        self.config = msgspec.structs.replace(self.config, exposed_ports=ports)

    def volume(self, found: Instruction) -> None:
        places: dict[str, object] = {_join("/", place): {} for place in self._words(found)}
        self.config = msgspec.structs.replace(self.config, volumes={**(self.config.volumes or {}), **places})

    def stop_signal(self, found: Instruction) -> None:
        word = self._one(found)
        names = {name for signal_ in signal.Signals for name in (signal_.name, signal_.name.removeprefix("SIG"), str(signal_.value))}
        if word.upper() not in names and not word.upper().startswith(("SIGRTMIN", "RTMIN", "SIGRTMAX", "RTMAX")):
            raise self.wrong(found, f"{word[:40]!r} is no signal", "for example SIGTERM")
        self.config = msgspec.structs.replace(self.config, stop_signal=word)

    def shell_(self, found: Instruction) -> None:
        self.config = msgspec.structs.replace(self.config, shell=list(found.words or ()))

    def healthcheck(self, found: Instruction) -> None:
        kind, *rest = found.text.split(maxsplit=1)
        if kind.upper() == "NONE":
            if rest or found.flags:
                raise self.wrong(found, "NONE stands alone")
            check = Healthcheck(test=["NONE"])
        elif kind.upper() == "CMD" and rest:
            inner = _inner(rest[0])
            check = Healthcheck(
                test=["CMD", *inner] if inner is not None else ["CMD-SHELL", rest[0]],
                interval=self._duration(found, "interval"),
                timeout=self._duration(found, "timeout"),
                start_period=self._duration(found, "start-period"),
                start_interval=self._duration(found, "start-interval"),
                retries=self._count(found, "retries"),
            )
        else:
            raise self.wrong(found, f"{kind[:40]!r} is no kind of check", "write HEALTHCHECK CMD command, or HEALTHCHECK NONE")
        self.config = msgspec.structs.replace(self.config, healthcheck=check)

    def on_build(self, found: Instruction) -> None:
        self.config = msgspec.structs.replace(self.config, on_build=[*(self.config.on_build or ()), found.text])

    def maintainer(self, found: Instruction) -> None:
        self.author = found.text

    # Parts

    def _command(self, found: Instruction) -> tuple[tuple[str, ...], str]:
        if found.words is not None:
            if not found.words:
                raise self.wrong(found, "an array without a command")
            return found.words, ""
        if not found.heredocs:
            return (*self.shell, found.text), ""
        if len(found.heredocs) == 1 and len(split(found.text, self.file.escape)) == 1:
            body = found.heredocs[0].text
            return ((), body) if body.startswith("#!") else ((*self.shell, body), "")
        return (*self.shell, found.text + "\n" + "".join(_rest(text) for text in found.heredocs)), ""

    def _mount(self, mount: Mount) -> Mount:
        target = _join(self.workdir, expand(mount.target, self.values, self.file.escape)) if mount.target else ""
        id_ = target if mount.kind == "cache" and mount.id == mount.target else mount.id
        return replace(mount, target=target, source=expand(mount.source, self.values, self.file.escape), id=id_)

    def _argv(self, found: Instruction) -> list[str]:
        return list(found.words) if found.words is not None else [*self.shell, found.text]

    def _words(self, found: Instruction) -> list[str]:
        words = list(found.words) if found.words is not None else split(found.text, self.file.escape)
        plain = found.words is not None
        result = [expand(word, self.values, self.file.escape, quotes=not plain) for word in words]
        if any(not word or "\0" in word for word in result):
            raise self.wrong(found, "a word in it is empty", "a variable in it may have no value")
        return result

    def _one(self, found: Instruction) -> str:
        text = expand(found.text, self.values, self.file.escape)
        if not text or "\0" in text:
            raise self.wrong(found, f"{found.text[:60]} comes to nothing", "a variable in it may have no value")
        return text

    def _mode(self, found: Instruction) -> int | None:
        text = expand(found.flag("chmod"), self.values, self.file.escape)
        if text and not re.fullmatch(r"[0-7]{3,4}", text):
            raise self.wrong(found, f"--chmod={text[:20]} is no mode", "write it in octal, for example 755")
        return int(text, 8) if text else None

    def _duration(self, found: Instruction, flag: str) -> int:
        """Read a duration as Go writes them: 30s, 1m30s."""
        text = found.flag(flag)
        parts = _DURATION.findall(text)
        if "".join(number + unit for number, unit in parts) != text:
            raise self.wrong(found, f"--{flag}={text[:20]} is no duration", "for example 30s or 1m30s")
        total = int(sum(float(number) * _UNITS[unit] for number, unit in parts))
        if text and not 10**6 <= total < 2**63:
            raise self.wrong(found, f"--{flag}={text[:20]} is out of range", "one millisecond is the least")
        return total

    def _count(self, found: Instruction, flag: str) -> int:
        text = found.flag(flag, "0")
        if not text.isdecimal() or len(text) > 6:
            raise self.wrong(found, f"--{flag}={text[:20]} is no number")
        return int(text)


def _rest(text: Heredoc) -> str:
    """Give a here-document back to the shell that reads it."""
    return f"{text.text}{text.name}\n"


def _join(folder: str, path: str) -> str:
    """Return `path` from `folder`, with the slash at its end that says it is a folder."""
    whole = posixpath.normpath(posixpath.join("/", folder, path))
    whole = "/" + whole.lstrip("/")
    return whole + "/" if path.endswith(("/", "/.")) and whole != "/" else whole


def _inner(text: str) -> list[str] | None:
    """Return a JSON array of strings, None if the text is none."""
    try:
        return msgspec.json.decode(text.encode("utf-8", "surrogateescape"), type=list[str]) if text.startswith("[") else None
    except (msgspec.DecodeError, msgspec.ValidationError):
        return None


_READERS: dict[str, Callable[[State, Instruction], Step | None]] = {
    "ADD": State.copy,
    "ARG": State.arg,
    "CMD": State.cmd,
    "COPY": State.copy,
    "ENTRYPOINT": State.entrypoint,
    "ENV": State.env_,
    "EXPOSE": State.expose,
    "HEALTHCHECK": State.healthcheck,
    "LABEL": State.label,
    "MAINTAINER": State.maintainer,
    "ONBUILD": State.on_build,
    "RUN": State.run,
    "SHELL": State.shell_,
    "STOPSIGNAL": State.stop_signal,
    "USER": State.user,
    "VOLUME": State.volume,
    "WORKDIR": State.workdir_,
}
