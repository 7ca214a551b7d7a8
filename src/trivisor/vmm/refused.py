"""What a policy of names refused a machine: its helper keeps the first of each kind in a file, 128 in a life (launch/net/relay.py).

As with a watchdog (fired.py), whoever asks for the machine, for events, or finds it ended reads that file; a refusal is written down
once, by its time. All of them, as they happen, are in `vm.network.decisions()`: a program that tries a thousand names must not push every
other event out of the record.
"""

from __future__ import annotations

from trivisor.launch.net import relay
from trivisor.vmm.context import Context
from trivisor.vmm.records import Row


def note(context: Context, row: Row) -> None:
    """Write down what is new."""
    if row.spec.network not in ("none", "host") and (found := relay.refusals(context.folder(row))):
        context.records.note_once("egress", row.id, row.name, found)
