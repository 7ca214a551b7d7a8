"""A QEMU is started when the last one of its machine has ended."""

from __future__ import annotations

import signal
import subprocess
import threading
from pathlib import Path

from trivisor.core.paths import MachineDir
from trivisor.vmm.engines.vm import runner


def test_the_last_qemu_is_waited_for(tmp_path: Path) -> None:
    """Its keeper was killed: it dies of that a moment later."""
    place = MachineDir(tmp_path)
    runner._await_last(place)
    with subprocess.Popen(["sleep", "1000"]) as last:
        runner._note(place, last.pid)
        threading.Timer(0.2, last.send_signal, [signal.SIGKILL]).start()
        runner._await_last(place)
        assert last.poll() == -signal.SIGKILL
    runner._await_last(place)
