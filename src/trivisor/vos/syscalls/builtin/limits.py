"""The machine's limits as the size of the computer: what programs read of memory, processors and load."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from trivisor.vos.syscalls.builtin.files import Content, files
from trivisor.vos.syscalls.call import Call
from trivisor.vos.syscalls.policy import Policy

_KIB = 1024
_TICK = 100  # sysconf(_SC_CLK_TCK)
_PAGE = 4096


@dataclass(frozen=True)
class Used:
    """What is in use now. Bytes, seconds of processor time since `booted`, and the three load averages."""

    memory: int = 0
    swap: int = 0
    cpu_seconds: float = 0.0
    load: tuple[float, float, float] = (0.0, 0.0, 0.0)
    processes: int = 1


def limits(
    policy: Policy,
    *,
    memory: int,
    cpus: float = 1,
    swap: int = 0,
    used: Callable[[], Used] = Used,
    booted: float | None = None,
    model: str = "Virtual CPU",
) -> None:
    """Show programs a computer of `memory` and `swap` bytes and `cpus` processors (a share counts as one more), started at `booted`.

    Covers /proc/meminfo, cpuinfo, stat, uptime, loadavg, swaps, the lists of processors under /sys, sysinfo(2) and
    sched_getaffinity(2). `used` is asked at each read; `booted` is seconds since the epoch, now unless given.
    """
    size = _Size(memory, swap, max(1, -(-round(cpus * 1000) // 1000)), time.time() if booted is None else booted, model, used)
    every = f"0-{size.cpus - 1}\n" if size.cpus > 1 else "0\n"
    shown: dict[str, Content] = {
        "/proc/meminfo": lambda _: size.meminfo(),
        "/proc/cpuinfo": lambda _: size.cpuinfo(),
        "/proc/stat": lambda _: size.stat(),
        "/proc/uptime": lambda _: size.uptime_file(),
        "/proc/loadavg": lambda _: size.loadavg(),
        "/proc/swaps": lambda _: size.swaps(),
        **dict.fromkeys((f"/sys/devices/system/cpu/{name}" for name in ("online", "possible", "present")), every),
    }
    files(policy, shown)

    @policy.on("sysinfo")
    def sysinfo(call: Call) -> None:
        call.write_struct("info", size.sysinfo())
        call.returns(0)

    @policy.on("sched_getaffinity")
    def affinity(call: Call) -> None:
        room = call.arg("cpusetsize")
        mask = ((1 << size.cpus) - 1).to_bytes(8 * -(-size.cpus // 64), "little")
        if room < len(mask) or room % 8:
            call.errno(22)  # EINVAL, as the kernel
            return
        call.write_at(call.args[2], mask)
        call.returns(len(mask))


@dataclass(frozen=True)
class _Size:
    memory: int
    swap: int
    cpus: int
    booted: float
    model: str
    used: Callable[[], Used]

    def _up(self) -> float:
        return max(0.0, time.time() - self.booted)

    def _now(self) -> tuple[Used, int, int]:
        """Return what is used, and bytes of memory and swap that are free."""
        used = self.used()
        return used, max(0, self.memory - used.memory), max(0, self.swap - used.swap)

    def meminfo(self) -> str:
        _, free, swap = self._now()
        lines = {
            "MemTotal": self.memory, "MemFree": free, "MemAvailable": free, "Buffers": 0, "Cached": 0, "SwapCached": 0,
            "Active": self.memory - free, "Inactive": 0, "SwapTotal": self.swap, "SwapFree": swap, "Shmem": 0, "Slab": 0,
        }  # fmt: skip
        return "".join(f"{name + ':':<16}{value // _KIB:>8} kB\n" for name, value in lines.items())

    def cpuinfo(self) -> str:
        return "".join(
            f"processor\t: {number}\nvendor_id\t: GenuineIntel\nmodel name\t: {self.model}\ncpu MHz\t\t: 2000.000\n"
            f"physical id\t: 0\nsiblings\t: {self.cpus}\ncore id\t\t: {number}\ncpu cores\t: {self.cpus}\nflags\t\t: fpu\n\n"
            for number in range(self.cpus)
        )

    def stat(self) -> str:
        used, _, _ = self._now()
        busy, up = int(used.cpu_seconds * _TICK), int(self._up() * _TICK)
        each, idle = busy // self.cpus, max(0, up - busy // self.cpus)
        rows = [f"cpu  {busy} 0 0 {idle * self.cpus} 0 0 0 0 0 0"]
        rows += [f"cpu{number} {each} 0 0 {idle} 0 0 0 0 0 0" for number in range(self.cpus)]
        rows += ["intr 0", "ctxt 0", f"btime {int(self.booted)}", f"processes {used.processes}", "procs_running 1", "procs_blocked 0"]
        return "\n".join(rows) + "\n"

    def uptime_file(self) -> str:
        used, up = self.used(), self._up()
        return f"{up:.2f} {max(0.0, up * self.cpus - used.cpu_seconds):.2f}\n"

    def loadavg(self) -> str:
        used = self.used()
        return "{:.2f} {:.2f} {:.2f} ".format(*used.load) + f"1/{used.processes} {used.processes}\n"

    def swaps(self) -> str:
        head = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"
        if not self.swap:
            return head
        used, _, _ = self._now()
        return f"{head}/dev/swap                               partition\t{self.swap // _KIB}\t\t{used.swap // _KIB}\t\t-2\n"

    def sysinfo(self) -> dict[str, int | str | bytes]:
        used, free, swap = self._now()
        one, five, fifteen = (int(load * 65536) for load in used.load)
        return {
            "uptime": int(self._up()), "load1": one, "load5": five, "load15": fifteen, "totalram": self.memory, "freeram": free,
            "totalswap": self.swap, "freeswap": swap, "procs": min(used.processes, 65535), "mem_unit": 1,
        }  # fmt: skip
