"""trivisor memory ps, symbols, read, write, search, watch, dump: what is in one machine's memory, seen from outside."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import click

from trivisor.cli import render
from trivisor.cli.options import json_option, machine_argument, open_vmm, verb
from trivisor.core.errors import NotFound
from trivisor.core.units import format_size, parse_size
from trivisor.vos.memory.service import Memory

_ROW = 16
_pid = click.option("-p", "--pid", type=int, help="Of this process, as it is numbered in the machine; without: the kernel's.")
_physical = click.option("--physical", is_flag=True, help="ADDRESS is a physical one.")
_address = click.argument("address", metavar="ADDRESS|SYMBOL[+OFFSET]")


@verb("ps")
@machine_argument
@json_option
def ps(machine: str, as_json: bool) -> None:
    """List processes, as kernel memory shows them."""
    found = open_vmm().get(machine).memory.processes()
    if as_json:
        render.emit(found)
        return
    rows = [(one.pid, one.parent, one.uid, " ".join(one.argv) if one.argv else f"[{one.name}]") for one in found]
    render.table(("PID", "PARENT", "UID", "COMMAND"), rows)


@verb("symbols")
@machine_argument
@click.argument("names", nargs=-1, metavar="[NAME...]")
@json_option
def symbols(machine: str, names: Sequence[str], as_json: bool) -> None:
    """Print where symbols of the kernel are.

    Of a virtual machine's; all of them if none is named.
    """
    memory = open_vmm().get(machine).memory
    found = {name: _symbol(memory, name) for name in names} if names else dict(memory.symbols)
    if as_json:
        render.emit(found)
        return
    for name, address in found.items():
        click.echo(f"{address:016x} {name}")


@verb("read")
@machine_argument
@_address
@click.argument("size", default="64", metavar="[SIZE]")
@_pid
@_physical
@click.option("--raw", is_flag=True, help="Print the bytes as they are.")
def read(machine: str, address: str, size: str, pid: int | None, physical: bool, raw: bool) -> None:
    """Print what is in memory at an address.

    64 bytes unless SIZE is given, as numbers and letters.
    """
    memory = open_vmm().get(machine).memory
    where, count = _where(memory, address), parse_size(size)
    data = memory.read_physical(where, count) if _one(pid, physical) else memory.read(where, count, pid=pid)
    if raw:
        click.echo(data, nl=False)
        return
    for line in hexdump(where, data):
        click.echo(line)


@verb("write")
@machine_argument
@_address
@click.argument("data", metavar="HEX")
@_pid
@_physical
def write(machine: str, address: str, data: str, pid: int | None, physical: bool) -> None:
    """Write to memory at an address.

    HEX is bytes as pairs of hexadecimal digits.
    """
    memory = open_vmm().get(machine).memory
    where, wanted = _where(memory, address), _hex(data)
    if _one(pid, physical):
        memory.write_physical(where, wanted)
    else:
        memory.write(where, wanted, pid=pid)


@verb("search")
@machine_argument
@click.argument("pattern")
@click.option("-p", "--pid", type=int, help="In this process, as it is numbered in the machine; without: in physical memory.")
@click.option("-x", "--hex", "as_hex", is_flag=True, help="PATTERN is pairs of hexadecimal digits.")
@click.option("-e", "--regex", is_flag=True, help="PATTERN is a regular expression, as Python's.")
@click.option("--limit", type=click.IntRange(min=1), default=1000, show_default=True, help="Stop after so many places.")
@json_option
def search(machine: str, pattern: str, pid: int | None, as_hex: bool, regex: bool, limit: int, as_json: bool) -> int:
    """Print where in memory a text is.

    Exit status 1 if it is nowhere.
    """
    if as_hex and regex:
        raise click.UsageError("give --hex or --regex, not both")
    wanted: bytes | re.Pattern[bytes] = _hex(pattern) if as_hex else pattern.encode()
    if regex:
        try:
            wanted = re.compile(pattern.encode(), re.DOTALL)
        except re.error as error:
            raise click.UsageError(f"{pattern!r} is no regular expression: {error}") from error
    found = open_vmm().get(machine).memory.search(wanted, pid=pid, limit=limit)
    if as_json:
        render.emit(found)
    else:
        for address in found:
            click.echo(f"{address:#x}")
    return 0 if found else 1


@verb("watch")
@machine_argument
@_address
@click.argument("size", default="8", metavar="[SIZE]")
@_pid
@click.option("--timeout", type=float, help="Seconds, after which it fails.")
def watch(machine: str, address: str, size: str, pid: int | None, timeout: float | None) -> None:
    """Wait until memory at an address changes.

    Prints what it was and became: 8 bytes unless SIZE is given.
    """
    memory = open_vmm().get(machine).memory
    change = memory.watch(_where(memory, address), parse_size(size), pid=pid, timeout=timeout)
    click.echo(f"{change.address:#x}: {change.before.hex()} -> {change.after.hex()}")


@verb("dump")
@machine_argument
@click.argument("file", type=click.Path(path_type=Path))
def dump(machine: str, file: Path) -> None:
    """Write physical memory to a new file.

    Of a virtual machine, which stands still meanwhile; each byte lies at its address.
    """
    click.echo(f"{file}: {format_size(open_vmm().get(machine).memory.dump(file))}")


def hexdump(start: int, data: bytes) -> Iterator[str]:
    """Yield lines of bytes as hexdump -C writes them."""
    for offset in range(0, len(data), _ROW):
        row = data[offset : offset + _ROW]
        halves = "  ".join(row[at : at + 8].hex(" ") for at in range(0, len(row), 8))
        text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in row)
        yield f"{start + offset:016x}  {halves:<48}  |{text}|"


def _where(memory: Memory, text: str) -> int:
    """Return the address that is meant: a number, a symbol of the kernel, or one with an offset."""
    try:
        return int(text, 0)
    except ValueError:
        name, _, offset = text.partition("+")
    try:
        more = int(offset or "0", 0)
    except ValueError:
        raise click.UsageError(f"{text!r} is no address: 0x... or a symbol, with +OFFSET or without") from None
    return _symbol(memory, name) + more


def _symbol(memory: Memory, name: str) -> int:
    try:
        return memory.symbols[name]
    except KeyError:
        raise NotFound(
            f"the machine's kernel has no symbol {name}", hint="`trivisor memory symbols MACHINE` lists those there are"
        ) from None


def _one(pid: int | None, physical: bool) -> bool:
    if physical and pid is not None:
        raise click.UsageError("give --pid or --physical, not both")
    return physical


def _hex(text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError:
        raise click.UsageError(f"{text!r} is not pairs of hexadecimal digits") from None


COMMANDS = (ps, symbols, read, write, search, watch, dump)
