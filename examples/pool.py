"""Serve requests from a pool of warm machines: each request has a machine of its own that has loaded its modules already."""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor

from trivisor import VMM, Pool

WARMUP = ["python3", "-c", "import re, subprocess"]
REQUESTS = ["2**100", "sum(range(1000))", "open('/etc/hostname').read().strip()", "sorted('trivisor')"]


def answer(pool: Pool, request: str) -> str:
    """Return what a request comes to, in a machine that nobody has used and nobody will."""
    with pool.take() as vm:
        return vm.exec(["python3", "-c", f"print({request})"], timeout=30, check=True).text.strip()


def main() -> None:
    """Answer all, two at a time; `--wall NAME` chooses the wall."""
    wall = sys.argv[2] if sys.argv[1:2] == ["--wall"] else "auto"
    with VMM() as vmm, vmm.pool("debian", size=2, wall=wall, memory="256M", warmup=WARMUP) as pool:
        pool.wait()
        began = time.monotonic()
        with ThreadPoolExecutor(2) as crew:
            for request, said in zip(REQUESTS, crew.map(lambda request: answer(pool, request), REQUESTS), strict=True):
                print(f"{request:<40} {said}")
        done = pool.stats()
        print(f"{done.taken} machines in {time.monotonic() - began:.2f} s, {'begun in one warm one' if done.forked else done.why}")


if __name__ == "__main__":
    main()
