"""A machine that is made from a snapshot: what it is asked to be is what that was, but for what is said here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from trivisor.core import spec as specs
from trivisor.core.errors import AlreadyExists, InvalidSpec, NotFound
from trivisor.core.spec import Spec
from trivisor.vmm import budget, names
from trivisor.vmm.context import Context
from trivisor.vmm.records import Row
from trivisor.vmm.snapshots import verbs
from trivisor.vmm.snapshots.model import Kept

ALWAYS = ("env", "idle", "labels", "lifetime", "ports", "ttl")
"""What can be asked for anew of any."""
WITHOUT_MEMORY = ("cpus", "cpuset", "dedupe", "egress", "io", "memory", "network", "oom", "pids", "reach", "shape", "swap", "volumes")
"""What can be asked for too where no memory goes on: that was made for a machine as it was."""
_NAME_TRIES = 8


def create(context: Context, ref: str, name: str | None, wall: str, wishes: Mapping[str, Any]) -> Row:
    """Make a machine from the snapshot `ref`. Raises what VMM.create raises."""
    kept = verbs.named(context, ref)
    if wall not in ("auto", kept.spec.wall):
        raise InvalidSpec(f"{kept.ref} is of the {kept.spec.wall} wall, not {wall}", hint="leave out wall")
    for attempt in range(_NAME_TRIES):
        spec = _spec(kept, names.readable(attempt) if name is None else name, wishes)
        context.engine(spec.wall, spec.name).check(spec)
        budget.possible(context, spec.memory)
        try:
            return verbs.create(context, kept, spec)
        except AlreadyExists:
            if name is not None or attempt == _NAME_TRIES - 1:
                raise
        except NotFound as error:
            if context.images.store.exists(kept.digest):
                raise
            raise NotFound(f"the image of {kept.ref} is gone", hint="import or pull it again") from error
    raise AssertionError("unreachable")


def _spec(kept: Kept, name: str, wishes: Mapping[str, Any]) -> Spec:
    """Return what the machine is asked to be. Raises InvalidSpec for what the snapshot has decided."""
    given = {key: value for key, value in wishes.items() if value is not None and value != ()}
    able = ALWAYS if kept.about.memory else (*ALWAYS, *WITHOUT_MEMORY)
    if fixed := sorted(given.keys() - {*able}):
        raise InvalidSpec(f"{', '.join(fixed)} is as the snapshot {kept.ref} has it", hint=f"what can be changed is {', '.join(able)}")
    # Ports can be asked for alone: the network that they need is the snapshot's.
    asked = Spec.make(image=kept.spec.image, name=name, wall=kept.spec.wall, **{"network": kept.spec.network, **given})
    changes = {key: getattr(asked, key) for key in given}
    if "env" in changes:
        changes["env"] = {**kept.spec.env, **asked.env}
    if "ports" not in changes:
        changes["ports"] = dict(verbs.free_ports(list(kept.spec.ports.values())))
    changes["asked"] = tuple(dict.fromkeys((*kept.spec.asked, *(key for key in asked.asked if key in given))))
    return specs.checked(msgspec.structs.replace(kept.spec, name=name, **changes))
