"""A virtual machine that moves from one home to another while its programs run."""

from __future__ import annotations

import runpy
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from machine_home import VmHome
from migrating import DOWNTIME, Elsewhere, count, counts_on, receiving, until

from trivisor import VMM, State
from trivisor.cli import main
from trivisor.vmm.migration.transport import new_token

COUNTING = """
import os, socket, threading, time
server = socket.create_server(("127.0.0.1", 0))
caller = socket.create_connection(server.getsockname())
answerer, _ = server.accept()
def answer():
    while data := answerer.recv(64): answerer.sendall(data)
threading.Thread(target=answer, daemon=True).start()
count, log = 0, open("/root/log", "w")
while True:
    count += 1
    caller.sendall(b"%020d" % count)
    assert int(caller.recv(64)) == count
    print(count, file=log, flush=True)
    with open("/run/next", "w") as out: out.write(str(count))
    os.rename("/run/next", "/run/count")
    time.sleep(0.01)
"""


@pytest.fixture(scope="module")
def there(iced_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Elsewhere]:
    other = Elsewhere(tmp_path_factory.mktemp("there") / "home", iced_home, images=True)
    yield other
    other.clear()


@pytest.mark.timeout(300)
def test_it_moves_there_and_back_while_programs_run(
    wall_home: VmHome, there: Elsewhere, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with VMM(wall_home.root) as vmm:
        machine = vmm.create("debian", wall="vm", name="nomad", disk="1G")
        machine.start()
        machine.exec("head -c 8M /dev/urandom >/root/big; md5sum /root/big >/root/sum; sync", check=True)
        machine.files.write("/run/counting.py", COUNTING.encode())
        machine.spawn(["python3", "/run/counting.py"], detach=True)
        until(lambda: machine.files.exists("/run/count"))
        identity = machine.exec("cat /etc/machine-id /proc/sys/kernel/random/boot_id", check=True).text
        before, token, seen = count(machine), new_token(), set[str]()
        with receiving(there.root, token=token) as home:
            moved = machine.migrate(home.address, token=token, downtime=DOWNTIME, progress=lambda at: seen.add(at.phase))
            arrived = home.machine()
            assert machine.id not in {other.id for other in vmm.list()} and not (wall_home.root / "machines" / machine.id).exists()
            assert {"disk", "memory", "handover", "done"} <= seen and moved.done and moved.progress.done > 1 << 20
            assert moved.downtime is not None and moved.downtime < DOWNTIME
            assert (arrived.id, arrived.name, arrived.state) == (machine.id, "nomad", State.RUNNING)
            counts_on(arrived, before)
            assert arrived.exec("cat /etc/machine-id /proc/sys/kernel/random/boot_id", check=True).text == identity
            arrived.exec("md5sum -c /root/sum && [ $(hostname) = nomad ]", check=True)
            assert abs(float(arrived.exec("date +%s.%N", check=True).text) - time.time()) < 5
            arrived.exec("echo after >/root/after; sync", check=True)
    address, statuses = f"unix:{tmp_path / 'socket'}", list[int]()
    waiting = threading.Thread(target=lambda: statuses.append(main.run(["--home", str(wall_home.root), "receive", address])))
    waiting.start()
    until((tmp_path / "socket").exists)
    with VMM(there.root) as away, VMM(wall_home.root) as vmm:
        before = count(away.get("nomad"))
        assert main.run(["--home", str(there.root), "migrate", "--downtime", str(DOWNTIME), "nomad", address]) == 0
        waiting.join(30)
        said = capfd.readouterr()
        assert statuses == [0] and "nomad: moved in" in said.out and "\nnomad\n" in f"\n{said.out}" and f"waiting at {address}" in said.err
        again = vmm.get("nomad")
        counts_on(again, before)
        assert again.files.read("/root/after") == b"after\n" and not away.list()
        again.stop()
        again.start()
        assert again.files.read("/root/after") == b"after\n" and int(again.files.read("/root/log").split()[-1]) > before
        again.delete(force=True)


def test_the_example(wall_home: VmHome, there: Elsewhere, tmp_path: Path) -> None:
    move = runpy.run_path(str(Path(__file__).parents[2] / "examples/migrate.py"))["move"]
    with VMM(wall_home.root) as vmm, VMM(there.root) as other:
        machine = vmm.create("mini", wall="vm")
        machine.start()
        done = move(machine, other, tmp_path / "socket", DOWNTIME)
        assert done.after > done.before and done.downtime < DOWNTIME
        other.get(machine.name).delete(force=True)
