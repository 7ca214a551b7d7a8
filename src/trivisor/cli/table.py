"""The verbs: name, the module that holds `command`, and one line of help. Help is printed from here, so it imports none of them."""

from __future__ import annotations

from typing import NamedTuple


class Verb(NamedTuple):
    """Where a verb is, and what it does in one line (the first line of its docstring; a test compares them)."""

    module: str
    attribute: str
    help: str


def _own(name: str, line: str) -> Verb:
    return Verb(f"trivisor.cli.verbs.{name}", "command", line)


def _life(name: str, line: str) -> Verb:
    return Verb("trivisor.cli.verbs.life", name, line)


def _freeze(name: str, line: str) -> Verb:
    return Verb("trivisor.cli.verbs.freeze", name, line)


def _image(name: str, line: str) -> Verb:
    return Verb("trivisor.cli.verbs.images", name, line)


VERBS: dict[str, Verb] = {
    "run": _own("run", "Run a command in a new machine."),
    "create": _own("create", "Make a machine, without starting it."),
    "start": _life("start", "Start machines."),
    "pause": _life("pause", "Freeze running machines."),
    "resume": _life("resume", "Let paused and suspended machines go on."),
    "stop": _life("stop", "Power machines off."),
    "delete": _life("delete", "Delete machines and their disks."),
    "snapshot": _freeze("snapshot", "Freeze a machine under a name. It goes on."),
    "restore": _freeze("restore", "Have a machine be what it was at a snapshot."),
    "fork": _freeze("fork", "Make running copies of a running machine."),
    "suspend": _freeze("suspend", "Put machines away: memory on the disk, no process left; resume goes on."),
    "snapshots": _own("snapshots", "List snapshots, and all that is done with them."),
    "ps": _own("ps", "List machines."),
    "exec": _own("exec", "Run a command in a running machine."),
    "trace": _own("trace", "Run a command in a running machine and print its system calls."),
    "cp": _own("cp", "Copy files between a machine and this host."),
    "logs": _own("logs", "Print what a machine's program wrote, its console, or PID 1's log."),
    "health": _own("health", "Check whether a machine is well, as its image says."),
    "inspect": _own("inspect", "Print all that is known of machines or images, as JSON."),
    "stats": _own("stats", "Print what running machines use."),
    "events": _own("events", "Print what happened to machines."),
    "forward": _own("forward", "Forward a port of this host to a port in a machine."),
    "modify": _own("modify", "Change a machine's memory, processors and disk, while it runs where that can be."),
    "migrate": Verb("trivisor.cli.verbs.migrate", "migrate", "Move a running machine to another home, where `trivisor receive` waits."),
    "receive": Verb("trivisor.cli.verbs.migrate", "receive", "Wait for one machine that `trivisor migrate` moves here; print its name."),
    "wait": _own("wait", "Wait until machines no longer run; print their exit status."),
    "commit": _own("commit", "Make an image of a machine's image and what it wrote."),
    "build": _own("build", "Build an image from a Containerfile."),
    "images": _own("images", "List images, and all that is done with them."),
    "pull": Verb("trivisor.cli.verbs.registry", "pull", "Get an image from its registry."),
    "push": Verb("trivisor.cli.verbs.registry", "push", "Send an image to a registry."),
    "import": Verb("trivisor.cli.verbs.archives", "import_", "Make an image of a folder, a tar, or an archive of images."),
    "export": Verb("trivisor.cli.verbs.archives", "export", "Write an image as an OCI image layout."),
    "save": Verb("trivisor.cli.verbs.archives", "save", "Write images into one archive, for load and for `docker load`."),
    "load": Verb("trivisor.cli.verbs.archives", "load", "Take all images of an archive or OCI layout, by the names that they have there."),
    "tag": _image("tag", "Give an image another name as well."),
    "rmi": _image("rmi", "Remove images. One that a machine was made from stays."),
    "history": _image("history", "Print how an image came about, the latest step first."),
    "du": _image("du", "Print what images take of the disk, and what prune would free."),
    "prune": _image("prune", "Remove what no image and no machine needs."),
    "volume": _own("volume", "List, make and remove volumes."),
    "disk": _own("disk", "List disks; bring them in from other hypervisors and out to them."),
    "memory": _own("memory", "Say what machines take of the host's memory; bound it; look into it."),
    "device": _own("device", "Attach, list and detach devices."),
    "network": _own("network", "Say how machines are connected; change it."),
    "doctor": _own("doctor", "Say what this host offers, and what is missing."),
    "completion": _own("completion", "Print the completion script of a shell."),
    "version": _own("version", "Print versions."),
}

ALIASES: dict[str, str] = {"rm": "delete"}
