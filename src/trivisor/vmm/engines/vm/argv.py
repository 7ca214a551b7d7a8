"""A machine's shape to QEMU's command line. Pure: nothing is run, the result can be printed and compared.

Every path is the one inside the jail and every descriptor has a fixed number, so two machines of one shape have the
same command line: what ice is keyed by. (Where the host forbids namespaces nothing can be moved, and the paths are the host's.)
Device addresses are given, not left to QEMU, for the same reason: a clone must have each device where the frozen
machine had it.

The options exist from QEMU 7.2 on. What differs is asked of the binary (`Qemu.rom_option`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trivisor.core.units import MIB

PORT = "trivisor.line"
LINE, SERIAL, QMP, NET, RAM_FD, EVENTS = 10, 11, 12, 13, 14, 15
SHARE = 20
"""The first of the descriptors to virtiofs daemons."""
MAX_SHARES = 7
SPARE_PORTS = 8
"""PCIe root ports with nothing in them, for devices that come while the machine runs."""
_UARTS = 4 + SPARE_PORTS
"""Serial ports that the guest has room for: those at the addresses that a PC has, of which one is there, and one in each spare port."""
GROWTH, GROWTH_BLOCK = "growth", 4 * MIB
"""The device of memory that comes while the machine runs, and what a guest takes or gives at once: Linux's largest order of pages."""
DUMMY = 1 << 40
"""Size of the dummy disks that a blank ice is bound to: no real disk may be larger."""

_MACHINE = (
    "q35,memory-backend=ram,sata=off,smbus=off,smm=off,vmport=off,hpet=off,i8042=off,graphics=off,usb=off,"
    "dump-guest-core=off,mem-merge=off,suppress-vmdesc=on"
)
TCG_CPU = "max,-erms,-fsrm"
"""The kernel copies by `rep movsb` where these say that it is quick; the translator does it byte by byte, at a third of the speed."""
_SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
_DISK_DEVICE = "num-queues=1,logical_block_size=512,physical_block_size=512,write-cache=on,discard=on,write-zeroes=on,werror=report"
"""What cannot be written, on a full disk of the host's, is the guest's to hear: QEMU's default would freeze the machine unseen."""

Accel = Literal["kvm", "tcg"]


@dataclass(frozen=True)
class Shares:
    """Shared folders: one entry each, whether it is read-only. virtiofs needs RAM that is shared with its daemon."""

    kind: Literal["virtiofs", "9p"]
    readonly: tuple[bool, ...]


@dataclass(frozen=True)
class Shape:
    """What the guest sees of its hardware, and what runs it. Sizes are bytes."""

    accel: Accel
    cpus: int
    memory: int
    upper: bool
    """Whether there is a second disk for the writable layer."""
    network: bool
    fixed_addresses: bool = False
    """Programs are loaded at the same addresses each time (see `append`)."""
    tap: bool = False
    """The network is a tap, else a socket pair to passt. The guest sees the difference: a tap takes work off it."""
    shares: Shares | None = None
    """Folders shared with the host; a machine that has some is booted, not cloned."""
    spare_cpus: int = 0
    """vCPUs beyond `cpus` that are there and that the guest has not brought up: it does so when the machine is given more (growth.py)."""
    room: int = 0
    """How much memory the guest's addresses leave room for beyond `memory`."""

    @property
    def translation_mib(self) -> int:
        """TCG's buffer of translated code, in MiB; only what is used of it becomes resident."""
        return 32 if self.cpus == 1 else 64


@dataclass(frozen=True)
class More:
    """Memory that a machine was given while it ran (growth.py), for a copy of it to have. Bytes."""

    physical: int
    asked: int
    most: int
    reach: int
    """How far into it the guest may have written."""
    shared: bool
    """Whether others can map it."""
    port: str


@dataclass(frozen=True)
class Places:
    """Where QEMU finds its files: by default, inside the jail."""

    root: str = "/machine/root.squashfs"
    disk: str = "/machine/disk.qcow2"
    ram: str = "/machine/ram"
    kernel: str = "/kit/kernel"
    initramfs: str = "/kit/initramfs"


Memory = Literal["anonymous", "file", "ice", "sealed", "copy", "shared"]
"""Where guest RAM is.

anonymous: of the process alone. file: in a file, written through; how ice is made. ice: mapped privately from a
file that is only readable, which takes QEMU's rom= option. A QEMU without that insists on a file that it can write to:
sealed is a memfd in descriptor RAM_FD, sealed against writing; copy is a file of the machine's own. shared: a memfd of the machine's own
in RAM_FD, written through, for others to map.
"""


def command(
    qemu: str,
    shape: Shape,
    memory: Memory,
    *,
    boot: bool,
    blank: bool,
    hold: bool = False,
    places: Places = Places(),
    name: str = "ice",
    more: More | None = None,
) -> list[str]:
    """Return QEMU's argv. `boot` starts the kernel, else QEMU waits for a frozen state, and with `hold` stands still when it has it;
    `blank` binds the disks to dummies that a clone's real disks take the place of."""
    accel = f"tcg,tb-size={shape.translation_mib}" if shape.accel == "tcg" else "kvm"
    argv = [qemu, "-name", f"guest={name}", "-nodefaults", "-no-user-config", "-display", "none", "-sandbox", _SANDBOX]
    argv += ["-machine", _MACHINE, "-accel", accel, "-cpu", TCG_CPU if shape.accel == "tcg" else "host"]
    vcpus = shape.cpus + shape.spare_cpus
    argv += ["-smp", f"cpus={vcpus},sockets=1,cores={vcpus},threads=1", "-m", _size(shape)]
    argv += ["-object", _memory(shape, memory, places), "-no-reboot", "-global", "migration.send-configuration=off"]
    # The line and the console are connected sockets; only QMP listens, on a socket that was bound before.
    argv += ["-chardev", f"socket,id=qmp,fd={QMP},server=on,wait=off", "-mon", "chardev=qmp,mode=control"]
    # A second monitor, to which nothing is said but that it may talk: what happens goes to the keeper's log.
    argv += ["-chardev", f"socket,id=events,fd={EVENTS}", "-mon", "chardev=events,mode=control"]
    argv += ["-chardev", f"socket,id=serial,fd={SERIAL}", "-serial", "chardev:serial"]
    argv += ["-chardev", f"socket,id=line,fd={LINE}", "-device", "virtio-serial-pci,id=ports,max_ports=2,addr=0x3"]
    argv += ["-device", f"virtserialport,bus=ports.0,nr=1,chardev=line,name={PORT}"]
    argv += _disk("root", "0x4", None if blank else ("raw", places.root), read_only=True)
    if shape.upper:
        argv += _disk("upper", "0x5", None if blank else ("qcow2", places.disk), read_only=False)
    if shape.network:
        netdev = f"tap,id=net,fd={NET}" if shape.tap else f"stream,id=net,server=off,addr.type=fd,addr.str={NET}"
        argv += ["-netdev", netdev]
        argv += ["-device", "virtio-net-pci,netdev=net,id=nic,addr=0x6,mac=52:54:00:00:00:01,romfile="]
    argv += _shares(shape.shares) if shape.shares else []
    argv += ["-object", "rng-builtin,id=rng", "-device", "virtio-rng-pci,rng=rng,id=random,addr=0x7"]
    argv += ["-device", "vmgenid,guid=auto,id=generation"]
    for spare in range(1, SPARE_PORTS + 1):
        argv += ["-device", f"pcie-root-port,id=spare{spare},chassis={spare},slot={spare},addr=0x{15 + spare:x}"]
    if more is not None:
        backend = f"memory-backend-memfd,id={GROWTH}-ram,share=on" if more.shared else f"memory-backend-ram,id={GROWTH}-ram"
        device = f"virtio-mem-pci,id={GROWTH},memdev={GROWTH}-ram,bus={more.port},memaddr={more.physical},requested-size={more.asked}"
        argv += ["-object", f"{backend},size={more.most}", "-device", f"{device},block-size={GROWTH_BLOCK}"]
    if not boot:
        return [*argv, *(["-S"] if hold else []), "-incoming", "defer"]
    return [*argv, "-kernel", places.kernel, "-initrd", places.initramfs, "-append", append(shape)]


def append(shape: Shape) -> str:
    """Return the kernel's command line (Documentation/admin-guide/kernel-parameters.rst).

    Under TCG no speculation leaks between guest programs through the translator as it would on the processor, and
    the mitigations cost a tenth of a boot, so they are off there and only there. The clock words spare calibration
    loops that measure the translator; noreplace-smp spares patching the kernel's text, which throws away translations.
    Security modules are left as the kernel has them; audit is off.

    QEMU before 8.0 translates a program's code again whenever it lies at another address, so with random addresses every
    exec pays for its libraries anew: 27 ms against 7 for /bin/true, and private memory grows. There norandmaps makes them fixed;
    a guest can have them back (kernel.randomize_va_space).
    """
    words = f"console=ttyS0 quiet panic=-1 8250.nr_uarts={_UARTS} random.trust_cpu=on cryptomgr.notests rcupdate.rcu_expedited=1 audit=0"
    if shape.accel == "tcg":
        words += " tsc=reliable no_timer_check lpj=4000000 mitigations=off"
        if shape.cpus == 1:
            words += " noreplace-smp"
        if shape.fixed_addresses:
            words += " norandmaps"
    if shape.spare_cpus:
        words += f" maxcpus={shape.cpus}"
    if shape.room:
        # Memory that comes is used at once, and as far as that is sound for nothing that cannot be moved: so it can go again.
        words += " memhp_default_state=online memory_hotplug.online_policy=auto-movable"
        # For memory above 4 GiB the kernel sets 64 MiB aside, from which devices with short addresses can read: none is there.
        words += " swiotlb=512"
    return words


def _size(shape: Shape) -> str:
    size = f"size={shape.memory // MIB}M"
    return f"{size},maxmem={(shape.memory + shape.room) // MIB}M" if shape.room else size


def _memory(shape: Shape, memory: Memory, places: Places) -> str:
    size = f"id=ram,size={shape.memory // MIB}M"
    if memory == "anonymous" and shape.shares and shape.shares.kind == "virtiofs":
        return f"memory-backend-memfd,{size},share=on"
    if memory == "anonymous":
        return f"memory-backend-ram,{size}"
    if memory == "sealed":
        return f"memory-backend-file,{size},mem-path=/proc/self/fd/{RAM_FD},share=off"
    if memory == "shared":
        return f"memory-backend-file,{size},mem-path=/proc/self/fd/{RAM_FD},share=on"
    mode = {"file": "share=on", "ice": "share=off,readonly=on,rom=off", "copy": "share=off"}[memory]
    return f"memory-backend-file,{size},mem-path={places.ram},{mode}"


def _shares(shares: Shares) -> list[str]:
    argv = []
    for number, readonly in enumerate(shares.readonly):
        tag, address = f"share{number}", f"addr=0x{8 + number:x}"
        if shares.kind == "virtiofs":
            argv += ["-chardev", f"socket,id={tag},fd={SHARE + number}", "-device", f"vhost-user-fs-pci,chardev={tag},tag={tag},{address}"]
        else:
            mode = "on" if readonly else "off"
            argv += ["-fsdev", f"local,id={tag},path=/shares/{number},security_model=mapped-xattr,readonly={mode}"]
            argv += ["-device", f"virtio-9p-pci,fsdev={tag},mount_tag={tag},{address}"]
    return argv


def _disk(node: str, address: str, file: tuple[str, str] | None, *, read_only: bool) -> list[str]:
    mode = "read-only=on" if read_only else "read-only=off"
    if file is None:
        drive = f"driver=null-co,node-name={node},size={DUMMY},read-zeroes=on,{mode}"
    else:
        driver, path = file
        drive = f"driver={driver},node-name={node},{mode},file.driver=file,file.filename={path},discard=unmap,detect-zeroes=unmap"
        if read_only:
            drive = f"driver={driver},node-name={node},{mode},file.driver=file,file.filename={path},file.locking=off"
    return ["-blockdev", drive, "-device", f"virtio-blk-pci,drive={node},id={node}-disk,addr={address},{_DISK_DEVICE}"]
