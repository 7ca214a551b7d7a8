"""A database put through every fault that a disk can have, at each of its writes: does it lose what it said was safe?

`database_faults.py [WRITES]` needs sqlite3 on this host: the machine's root is the host's own, in a container.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from trivisor import VMM, Machine, Policy

DATABASE = "/data/test.db"
WRITES = ("write", "pwrite64")
SET_UP = "CREATE TABLE t(a INTEGER PRIMARY KEY, b TEXT); CREATE INDEX i ON t(b);"
ROWS = 60
ROW = "INSERT INTO t VALUES (N, hex(randomblob(400))); SELECT N;\n"
SAVE = "".join(ROW.replace("N,", f"{row},").replace("N;", f"{row};") for row in range(1, ROWS + 1))
"""Each row is a transaction of its own, and its number is said when it is safe. Together they make some 400 writes."""


def faults(number: int) -> Iterator[tuple[str, Policy]]:
    """Yield each fault, happening at write `number`, counted from 0, to a file of the database."""
    for errno in ("ENOSPC", "EIO"):
        policy = Policy()
        policy.fail(WRITES, errno, path="/data/*", after=number, times=1)
        yield errno, policy
    policy = Policy()
    policy.tear(WRITES, keep=100, errno="EIO", path="/data/*", after=number, times=1)
    yield "torn", policy


def trial(vm: Machine, policy: Policy) -> None:
    """Fill the database under a policy. Raises AssertionError if no write failed, or if the database is not what it was said to be."""
    vm.exec(f'rm -f {DATABASE}*; sqlite3 {DATABASE} "{SET_UP}"', check=True)
    filled = vm.exec(["sqlite3", "-bail", DATABASE], stdin=SAVE, policy=policy, timeout=120)
    assert filled.exit_code, "no write failed"
    safe = int(filled.text.split()[-1]) if filled.text else 0
    state = vm.exec(["sqlite3", DATABASE, "PRAGMA integrity_check; SELECT max(a), count(*) FROM t;"], timeout=120).text.split()
    assert state[:1] == ["ok"], f"damaged: {' '.join(state)}"
    last, count = (int(word or 0) for word in state[1].split("|"))
    # Of the row at which the fault came nothing was said: it may be there, or not.
    assert last == count and safe <= count <= safe + 1, f"{count} rows where {safe} were safe"


def torture(vm: Machine, writes: int) -> dict[str, int]:
    """Return how many of its first writes each fault was survived at."""
    vm.files.mkdir("/data", parents=True)
    done: dict[str, int] = {}
    for number in range(writes):
        for name, policy in faults(number):
            try:
                trial(vm, policy)
            except AssertionError as error:
                raise AssertionError(f"{name} at write {number + 1}: {error}") from None
            done[name] = done.get(name, 0) + 1
    return done


if __name__ == "__main__":
    with VMM() as vmm, vmm.run("host", wall="container") as machine:
        print(torture(machine, int(sys.argv[1]) if len(sys.argv) > 1 else 200))
