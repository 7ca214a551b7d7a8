"""Options that verbs share, and what they mean as the wishes of a Spec."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import click

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from trivisor.vmm.machine import Machine
    from trivisor.vmm.manager import VMM
    from trivisor.vos.syscalls.policy import Policy

P = ParamSpec("P")
R = TypeVar("R")


@dataclass
class Settings:
    """What holds for the whole command line."""

    home: Path | None = None

    def vmm(self) -> VMM:
        """Open the home. Raises StorageError if it cannot be used."""
        from trivisor.vmm.manager import VMM

        return VMM(home=self.home)


def settings() -> Settings:
    """Return the settings of the command line that is running."""
    found: Settings = click.get_current_context().find_root().ensure_object(Settings)
    return found


def open_vmm() -> VMM:
    """Open the home that the command line names."""
    return settings().vmm()


def _set_home(ctx: click.Context, _param: click.Parameter, value: str | None) -> None:
    if value is not None:
        ctx.find_root().ensure_object(Settings).home = Path(value).absolute()


home_option = click.option(
    "--home",
    metavar="FOLDER",
    expose_value=False,
    is_eager=True,
    callback=_set_home,
    help="Where machines and images are kept.  [default: $TRIVISOR_HOME, else the XDG data folder]",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def verb(name: str, **attributes: Any) -> Callable[[Callable[..., object]], click.Command]:
    """Make a verb of a function: a click command with the options that every verb has."""

    def wrap(function: Callable[..., object]) -> click.Command:
        attributes.setdefault("context_settings", {}).setdefault("help_option_names", ["-h", "--help"])
        return click.command(name, cls=click.Command, **attributes)(home_option(function))

    return wrap


class _Named(click.types.StringParamType):
    """A text that tab completion knows the possible values of."""

    def __init__(self, name: str, values: Callable[[VMM], Sequence[str]]) -> None:
        self.name = name
        self._values = values

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem

        from trivisor.core.errors import TrivisorError

        home = os.environ.get("TRIVISOR_HOME") if ctx.find_root().obj is None else ctx.find_root().obj.home
        try:
            values = self._values(Settings(Path(home) if home else None).vmm())
        except TrivisorError:
            return []  # a prompt is no place for an error message
        return [CompletionItem(value) for value in values if value.startswith(incomplete)]


MACHINE = _Named("machine", lambda vmm: [machine.name for machine in vmm.list()])
IMAGE = _Named("image", lambda vmm: [image.name for image in vmm.images.list()])
EITHER = _Named("name", lambda vmm: [*(one.name for one in vmm.list()), *(one.name for one in vmm.images.list())])
DISK = _Named("disk", lambda vmm: [disk.name for disk in vmm.disks.list()])
SNAPSHOT = _Named("snapshot", lambda vmm: [one.ref for one in vmm.snapshots.list()])
VOLUME = _Named("volume", lambda vmm: [volume.name for volume in vmm.volumes.list()])

machine_argument = click.argument("machine", type=MACHINE)
machines_argument = click.argument("machines", type=MACHINE, nargs=-1, required=True, metavar="MACHINE...")


def pairs(values: Sequence[str], what: str, *, inherit: bool = False) -> dict[str, str]:
    """Return {"K": "V"} for texts "K=V". With `inherit`, "K" alone takes its value from our own environment."""
    found: dict[str, str] = {}
    for value in values:
        key, equals, text = value.partition("=")
        if not key or (not equals and not inherit):
            raise click.UsageError(f"{what} {value!r} is not KEY=VALUE")
        if equals:
            found[key] = text
        elif key in os.environ:
            found[key] = os.environ[key]
    return found


def ports(values: Sequence[str]) -> dict[int, int]:
    """Return {host: guest} for texts "HOST:GUEST", or "PORT" for both."""
    found: dict[int, int] = {}
    for value in values:
        host, colon, guest = value.partition(":")
        if not host.isdecimal() or (colon and not guest.isdecimal()):
            raise click.UsageError(f"port {value!r} is not HOST:GUEST", click.get_current_context(silent=True))
        if int(host) in found:
            raise click.UsageError(f"host port {host} is published twice", click.get_current_context(silent=True))
        found[int(host)] = int(guest or host)
    return found


def volumes(values: Sequence[str]) -> dict[str, str]:
    """Return {path in the machine: source} for texts "SOURCE:PATH[:ro]"; a source that begins with . is taken from here."""
    found: dict[str, str] = {}
    for value in values:
        text, mode = (value[:-3], value[-3:]) if value.endswith((":ro", ":rw")) else (value, "")
        source, colon, place = text.rpartition(":")
        if not colon or not source or not place:
            raise click.UsageError(f"volume {value!r} is not SOURCE:PATH[:ro]", click.get_current_context(silent=True))
        if place in found:
            raise click.UsageError(f"two volumes are to lie at {place}", click.get_current_context(silent=True))
        found[place] = (str(Path(source).absolute()) if source.startswith(".") else source) + mode
    return found


def shape_words(words: Sequence[str]) -> dict[str, str | float]:
    """Return what texts "latency=50ms" ask of a machine's network, for Network.reshape and a Spec."""
    found: dict[str, str | float] = {key.replace("-", "_"): value for key, value in pairs(words, "shape").items()}
    if "loss" in found:
        try:
            found["loss"] = float(found["loss"])
        except ValueError:
            raise click.UsageError(f"loss {found['loss']!r} is not a number from 0 to 1") from None
    return found


def egress_words(words: Sequence[str]) -> list[str]:
    """Return what is allowed by the words of a policy; "none" alone allows nothing."""
    return [] if tuple(words) == ("none",) else list(words)


_RULE_OPTIONS: tuple[Callable[[Callable[..., object]], Callable[..., object]], ...] = (
    click.option(
        "--rule", multiple=True, metavar="CALL:WHAT[,...]", help="A system call's answer, such as write:ENOSPC,path=/data/*,after=5."
    ),
    click.option("--read", multiple=True, metavar="PATH", help="Files may be read only there; may be given often, as the next two."),
    click.option("--write", multiple=True, metavar="PATH", help="Files may be written, made and removed only there."),
    click.option("--execute", multiple=True, metavar="PATH", help="Programs may be executed only from there."),
)


def rule_options(function: Callable[..., object]) -> Callable[..., object]:
    """Give a verb the options that say what programs get from system calls."""
    for option in reversed(_RULE_OPTIONS):
        function = option(function)
    return function


def policy(options: dict[str, Any]) -> Policy | None:
    """Take the values of `rule_options` out and return the policy that they make; None if none was given."""
    from trivisor.vos.syscalls.policy import Policy

    rules = options.pop("rule")
    places = {kind: list(options.pop(kind)) or None for kind in ("read", "write", "execute")}
    if not rules and not any(places.values()):
        return None
    made = Policy(*rules)
    if any(places.values()):
        made.paths(**places)
    return made


_SPEC_OPTIONS: tuple[Callable[[Callable[..., object]], Callable[..., object]], ...] = (
    click.option("--name", help="A DNS label, unique in the home.  [default: one is made up]"),
    click.option("--wall", default="auto", show_default=True, type=click.Choice(["auto", "vm", "gvisor", "container"])),
    click.option("--cpus", type=float, help="Virtual processors; on container and gvisor also parts of one.  [default: 1]"),
    click.option("-m", "--memory", metavar="SIZE", help="Such as 512M or 2G.  [default: 256M]"),
    click.option("--disk", metavar="SIZE|ram", help="The writable layer; ram: kept in memory, gone at stop.  [default: 8G]"),
    click.option("--kernel", metavar="micro|full|PATH", help="The kernel it boots.  [default: micro]"),
    click.option("--swap", metavar="SIZE", help="Of the host's swap beyond the memory; 0: none."),
    click.option(
        "--oom", type=click.Choice(["kill", "stop"]), help="When memory runs out: kill a program, or stop it all.  [default: kill]"
    ),
    click.option(
        "--ram", type=click.Choice(["private", "shared"]), help="shared: of its own, for views and a balloon (vm).  [default: private]"
    ),
    click.option("--hugepages", type=click.Choice(["transparent", "reserved"]), help="Its RAM in huge pages (vm)."),
    click.option("--dedupe", is_flag=True, default=None, help="Let the host keep pages once that other machines have, too."),
    click.option("--cpuset", metavar="LIST", help="The host's processors that it may run on, such as 0-1."),
    click.option("--pids", type=int, help="How many processes and threads there may be."),
    click.option("--io", multiple=True, metavar="LIMIT=N", help="read-bps, write-bps, read-iops or write-iops, such as write-bps=10M."),
    click.option("--network", metavar="none|nat|host|NAME", help="NAME: one that machines share.  [default: none, or nat if need be]"),
    click.option("--reach", multiple=True, metavar="host|metadata", help="Let it reach what is denied to all others."),
    click.option(
        "--egress", multiple=True, metavar="none|ALLOWED", help="What it may talk to, such as pypi.example:443; may be given often."
    ),
    click.option("--shape", multiple=True, metavar="KEY=VALUE", help="rate-in, rate-out, latency or loss, such as latency=50ms."),
    click.option("-v", "--volume", multiple=True, metavar="SOURCE:PATH[:ro]", help="A host folder (/..., ./...) or volume, at PATH in it."),
    click.option("--tmpfs", multiple=True, metavar="PATH:SIZE", help="A folder in its memory, such as /scratch:64M; may be given often."),
    click.option("-p", "--publish", multiple=True, metavar="HOST:GUEST", help="Publish a TCP port on this host's loopback."),
    click.option("-P", "--publish-all", is_flag=True, help="Publish the TCP ports that the image exposes, on free ones of this host."),
    click.option("-e", "--env", multiple=True, metavar="KEY[=VALUE]", help="Environment of every command; KEY alone: from ours."),
    click.option("--ttl", metavar="TIME", help="Stop it after this long, such as 90s or 10m."),
    click.option("--idle", metavar="TIME", help="Stop it after this long without traffic from this host."),
    click.option("-l", "--label", multiple=True, metavar="KEY=VALUE", help="Kept with the machine, for you."),
    *_RULE_OPTIONS,
)


def _in_memory(values: Sequence[str]) -> dict[str, str]:
    made = {}
    for value in values:
        place, colon, size = value.rpartition(":")
        if not colon:
            raise click.UsageError(f"tmpfs {value!r} is not PATH:SIZE", click.get_current_context(silent=True))
        made[place] = size
    return made


def spec_options(function: Callable[..., object]) -> Callable[..., object]:
    """Give a verb the options that say what a machine is to be."""
    for option in reversed(_SPEC_OPTIONS):
        function = option(function)
    return function


def wishes(options: dict[str, Any], snapshot: str | None = None) -> dict[str, Any]:
    """Return the keyword arguments of VMM.create for the values of `spec_options`; with `snapshot`, of a machine that is made from it."""
    published: dict[int, int] | str = ports(options.pop("publish"))
    if options.pop("publish_all"):
        if snapshot is not None:
            raise click.UsageError("-P goes with an image: a snapshot's ports are published as they are", click.get_current_context())
        if published:
            raise click.UsageError("-P goes without -p", click.get_current_context(silent=True))
        published = "exposed"
    made = {
        "ports": published or None,
        "volumes": volumes(options.pop("volume")) or None,
        "tmpfs": _in_memory(options.pop("tmpfs")) or None,
        "io": {key.replace("-", "_"): value for key, value in pairs(options.pop("io"), "io limit").items()} or None,
        "env": pairs(options.pop("env"), "environment", inherit=True) or None,
        "labels": pairs(options.pop("label"), "label") or None,
        "syscalls": policy(options),
        "shape": shape_words(options.pop("shape")) or None,
        "egress": egress_words(given) if (given := options.pop("egress")) else None,
    }
    if (published or made["egress"] is not None or made["shape"]) and options["network"] is None and snapshot is None:
        options["network"] = "nat"
    return {key: value for key, value in {**options, **made}.items() if value is not None}


snapshot_option = click.option(
    "--snapshot", type=SNAPSHOT, metavar="MACHINE@NAME", help="Instead of an image: it begins where that stands."
)


def each(machines: Sequence[str], do: Callable[[Machine], object]) -> None:
    """Do it to every machine that is named. The first failure ends it; those already done stay done, and were printed."""
    vmm = open_vmm()
    for name in machines:
        do(vmm.get(name))
        click.echo(name)
