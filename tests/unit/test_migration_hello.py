"""What a target does with a source that asks for what no machine may have."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import msgspec
import pytest

from trivisor import VMM, MigrationError, TrivisorError
from trivisor.core.spec import Spec
from trivisor.vmm.migration.link import Refused
from trivisor.vmm.migration.messages import VERSION, Hardware, Hello, Wants
from trivisor.vmm.migration.transport import Access, address, connect

HARDWARE = Hardware(shape={}, needs={}, words="", root="", memory=256 << 20, disk=None, taken=0)
SPEC = msgspec.to_builtins(Spec.make(image="debian", name="comer", wall="vm"))


def hello(**changes: Any) -> Hello:
    given: dict[str, Any] = {"machine": "0123456789ab", "spec": SPEC, "image": "debian", "digest": f"sha256:{'0' * 64}", "ttl": None}
    return Hello(**{"version": VERSION, "hardware": HARDWARE, **given, **changes})


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (hello(version=99), "speaks version 99"),
        (hello(spec={}), "no machine"),
        (hello(spec={**SPEC, "cpus": -1}), "cpus"),
        (hello(spec={**SPEC, "name": "../x"}), "DNS label"),
        (hello(spec={**SPEC, "wall": "container"}), "container wall cannot receive"),
        (hello(spec={**SPEC, "kernel": "../../etc/shadow"}), "this host's files"),
        (hello(spec={**SPEC, "volumes": {"/x": {"source": "/etc", "readonly": False}}}), "this host's files"),
        (hello(spec={**SPEC, "lifetime": "process"}), "this host's files"),
        (hello(spec={**SPEC, "network": "nat", "ports": {"70000": 1}}), "ports that there are not"),
        (hello(spec={**SPEC, "unknown": 1}), "no machine"),
        (hello(machine="../../../etc"), "no message"),
        (hello(digest="debian"), "no message"),
        (hello(ttl=-1.0), "no message"),
    ],
)
def test_a_machine_that_no_host_should_take(tmp_path: Path, said: Hello, why: str) -> None:
    access, at, listens = Access(), f"unix:{tmp_path / 'socket'}", threading.Event()
    failure: list[BaseException] = []

    def receive() -> None:
        try:
            vmm.receive(at, timeout=10, listening=lambda _: listens.set())
        except TrivisorError as error:
            failure.append(error)

    with VMM(tmp_path / "home") as vmm:
        waiting = threading.Thread(target=receive)
        waiting.start()
        assert listens.wait(10)
        with connect(address(at, access), access) as link:
            link.send(said)
            with pytest.raises(MigrationError) as told:
                link.receive(Wants, 10)
        waiting.join()
        # To one who says what is no message nothing more is said.
        assert why in str(told.value) if isinstance(told.value, Refused) else why == "no message"
        assert why in str(failure[0]) and not vmm.list()
