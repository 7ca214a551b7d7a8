"""Run programs that nobody has read: each in a machine of its own, with no network, limited memory and limited time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from trivisor import VMM, ExecTimeout

SUBMISSIONS = {
    "right": "print(sum(range(101)))",
    "wrong": "print(42)",
    "endless": "while True: pass",
    "nosy": "import socket; socket.create_connection(('192.0.2.1', 80), 3)",
    "hungry": "x = bytearray(10**10)",
}
EXPECTED = "5050"


def grade(vmm: VMM, source: str) -> str:
    """Return a verdict on one program."""
    with vmm.run("debian", memory="256M", disk="ram") as vm:
        vm.files.write_text("/tmp/main.py", source)
        try:
            result = vm.exec(["python3", "/tmp/main.py"], user="nobody", cwd="/tmp", timeout=5, max_output=1 << 20)
        except ExecTimeout:
            return "took too long"
        if result.exit_code:
            last = result.error_text.strip().splitlines()[-1:]
            return f"failed: {last[0] if last else result.exit_code}"
        return "passed" if result.text.strip() == EXPECTED else f"wrong: {result.text.strip()[:40]}"


def main() -> None:
    """Grade them all, two at a time."""
    with VMM() as vmm, ThreadPoolExecutor(2) as pool:
        for name, verdict in zip(SUBMISSIONS, pool.map(lambda source: grade(vmm, source), SUBMISSIONS.values()), strict=True):
            print(f"{name:<8} {verdict}")


if __name__ == "__main__":
    main()
