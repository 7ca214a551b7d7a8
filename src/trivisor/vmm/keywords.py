"""The keywords of VMM.create and VMM.run, for editors and type checkers: the fields of core.spec.Spec in the forms that people write.

Spec.make checks the values; None means the default. What a field means, and its unit, is said there.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

from trivisor.core.network import Egress, Reach, Shape
from trivisor.core.rules import Paths, Rule, SyscallSpec
from trivisor.core.spec import Lifetime
from trivisor.core.wishes import IoLimits, Volume
from trivisor.vos.syscalls.policy import Policy

Size = int | str
"""Bytes, or text such as "256M"."""
Duration = float | str
"""Seconds, or text such as "10m"."""


class Keywords(TypedDict, total=False):
    """What a machine can be made with beside its image, name and wall."""

    cpus: float | None
    memory: Size | None
    swap: Size | None
    cpuset: str | None
    pids: int | None
    io: IoLimits | Mapping[str, Any] | None
    disk: Size | Literal["ram"] | None
    kernel: str | os.PathLike[str] | None
    ram: Literal["private", "shared"] | None
    hugepages: Literal["transparent", "reserved"] | None
    dedupe: bool | None
    oom: Literal["kill", "stop"] | None
    network: str | None
    ports: dict[int, int] | Literal["exposed"] | None
    shape: Shape | Mapping[str, Any] | None
    egress: Egress | Mapping[str, Any] | Sequence[str] | None
    reach: Reach | Sequence[Reach] | None
    cut: Sequence[str] | None
    tmpfs: Mapping[str, int | str] | None
    volumes: Mapping[str, Volume | str | os.PathLike[str] | Mapping[str, Any]] | None
    env: dict[str, str] | None
    lifetime: Lifetime | None
    ttl: Duration | None
    idle: Duration | None
    labels: dict[str, str] | None
    syscalls: Policy | SyscallSpec | Sequence[Rule | Paths | str] | Mapping[str, Any] | None


class RunKeywords(Keywords, total=False):
    """The same with name and wall."""

    name: str | None
    wall: str
