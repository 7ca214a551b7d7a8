"""Names of flags and enumerations in system calls' arguments, as their man pages call them.

Numbers are written down here rather than taken from this Python's `os`: what runs in a machine need not be of this host's
architecture (open(2)'s differ on arm64).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Group:
    """Bits by name. Those under `mask` are no bits but one number, named in `values` (O_RDONLY is 0)."""

    bits: Mapping[str, int]
    mask: int = 0
    values: Mapping[int, str] = ()  # type: ignore[assignment]


class Flags(int):
    """A number that knows its flags: `"O_CREAT" in flags`, `str(flags)` is O_WRONLY|O_CREAT, `list(flags)` the names."""

    group: Group

    def __new__(cls, number: int, group: Group) -> Flags:
        made = super().__new__(cls, number)
        made.group = group
        return made

    def __iter__(self) -> Iterator[str]:
        group, rest = self.group, int(self)
        if group.mask or group.values:
            mask = group.mask or ~0
            name = group.values.get(rest & mask)
            if name is not None:
                yield name
                rest &= ~mask
        for name, bits in group.bits.items():
            if bits and rest & bits == bits:
                yield name
                rest &= ~bits
        if rest:
            yield hex(rest)

    def __contains__(self, name: object) -> bool:
        bits = self.group.bits.get(name)  # type: ignore[call-overload]
        if bits is not None:
            return bool(bits) and self & bits == bits
        return any(name == known for known in self)

    def __str__(self) -> str:
        return "|".join(self) or "0"

    def __repr__(self) -> str:
        return f"<{self}>"


def flags(kind: str, number: int, machine: str = "x86_64") -> Flags:
    """Return `number` as the flags that `kind` (of FLAGS) means on `machine`."""
    group = _OPEN_ARM if kind == "OPEN" and machine == "aarch64" else FLAGS[kind]
    return Flags(number & 0xFFFFFFFFFFFFFFFF, group)


def _bits(text: str) -> dict[str, int]:
    return {name: int(number, 0) for name, number in (word.split("=") for word in text.split())}


def _names(text: str, prefix: str = "") -> dict[int, str]:
    return {number: prefix + name for number, name in enumerate(text.split()) if name != "-"}


_ACCESS_MODES = {0: "O_RDONLY", 1: "O_WRONLY", 2: "O_RDWR"}
# O_TMPFILE holds O_DIRECTORY, O_SYNC holds O_DSYNC: the wider one first.
_OPEN = _bits(
    """O_TMPFILE=0x410000 O_SYNC=0x101000 O_CREAT=0x40 O_EXCL=0x80 O_NOCTTY=0x100 O_TRUNC=0x200 O_APPEND=0x400 O_NONBLOCK=0x800
    O_DSYNC=0x1000 O_ASYNC=0x2000 O_DIRECT=0x4000 O_LARGEFILE=0x8000 O_DIRECTORY=0x10000 O_NOFOLLOW=0x20000 O_NOATIME=0x40000
    O_CLOEXEC=0x80000 O_PATH=0x200000"""
)
_ON_ARM = _bits("O_TMPFILE=0x404000 O_DIRECTORY=0x4000 O_NOFOLLOW=0x8000 O_DIRECT=0x10000 O_LARGEFILE=0x20000")
_OPEN_ARM = Group({**_OPEN, **_ON_ARM}, 3, _ACCESS_MODES)

_CLONE = _bits(
    """CLONE_NEWTIME=0x80 CLONE_VM=0x100 CLONE_FS=0x200 CLONE_FILES=0x400 CLONE_SIGHAND=0x800 CLONE_PIDFD=0x1000 CLONE_PTRACE=0x2000
    CLONE_VFORK=0x4000 CLONE_PARENT=0x8000 CLONE_THREAD=0x10000 CLONE_NEWNS=0x20000 CLONE_SYSVSEM=0x40000 CLONE_SETTLS=0x80000
    CLONE_PARENT_SETTID=0x100000 CLONE_CHILD_CLEARTID=0x200000 CLONE_UNTRACED=0x800000 CLONE_CHILD_SETTID=0x1000000
    CLONE_NEWCGROUP=0x2000000 CLONE_NEWUTS=0x4000000 CLONE_NEWIPC=0x8000000 CLONE_NEWUSER=0x10000000 CLONE_NEWPID=0x20000000
    CLONE_NEWNET=0x40000000 CLONE_IO=0x80000000"""
)
_SIGNALS = """- HUP INT QUIT ILL TRAP ABRT BUS FPE KILL USR1 SEGV USR2 PIPE ALRM TERM STKFLT CHLD CONT STOP TSTP TTIN TTOU URG XCPU
    XFSZ VTALRM PROF WINCH IO PWR SYS"""
_FAMILIES = """UNSPEC UNIX INET AX25 IPX APPLETALK NETROM BRIDGE ATMPVC X25 INET6 ROSE DECnet NETBEUI SECURITY KEY NETLINK PACKET ASH ECONET
    ATMSVC RDS SNA IRDA PPPOX WANPIPE LLC IB MPLS CAN TIPC BLUETOOTH IUCV RXRPC ISDN PHONET IEEE802154 CAIF ALG NFC VSOCK KCM QIPCRTR
    SMC XDP MCTP"""

FLAGS: Mapping[str, Group] = {
    "OPEN": Group(_OPEN, 3, _ACCESS_MODES),
    "AT": Group(
        _bits(
            """AT_SYMLINK_NOFOLLOW=0x100 AT_EACCESS=0x200 AT_SYMLINK_FOLLOW=0x400 AT_NO_AUTOMOUNT=0x800
            AT_EMPTY_PATH=0x1000 AT_RECURSIVE=0x8000"""
        )
    ),
    "AT_UNLINK": Group(_bits("AT_REMOVEDIR=0x200")),
    "ACCESS": Group(_bits("R_OK=4 W_OK=2 X_OK=1"), 7, {0: "F_OK"}),
    "PROT": Group(
        _bits("PROT_READ=1 PROT_WRITE=2 PROT_EXEC=4 PROT_SEM=8 PROT_GROWSDOWN=0x1000000 PROT_GROWSUP=0x2000000"), 0xF, {0: "PROT_NONE"}
    ),
    "MAP": Group(
        _bits(
            """MAP_FIXED=0x10 MAP_ANONYMOUS=0x20 MAP_GROWSDOWN=0x100 MAP_DENYWRITE=0x800 MAP_EXECUTABLE=0x1000 MAP_LOCKED=0x2000
            MAP_NORESERVE=0x4000 MAP_POPULATE=0x8000 MAP_NONBLOCK=0x10000 MAP_STACK=0x20000 MAP_HUGETLB=0x40000 MAP_SYNC=0x80000
            MAP_FIXED_NOREPLACE=0x100000 MAP_32BIT=0x40"""
        ),
        0xF,
        {1: "MAP_SHARED", 2: "MAP_PRIVATE", 3: "MAP_SHARED_VALIDATE", 8: "MAP_DROPPABLE"},
    ),
    "CLONE": Group(_CLONE, 0xFF, {n: f"SIG{name}" for n, name in _names(_SIGNALS).items()}),
    "MOUNT": Group(
        _bits(
            """MS_RDONLY=1 MS_NOSUID=2 MS_NODEV=4 MS_NOEXEC=8 MS_SYNCHRONOUS=0x10 MS_REMOUNT=0x20 MS_MANDLOCK=0x40 MS_DIRSYNC=0x80
            MS_NOSYMFOLLOW=0x100 MS_NOATIME=0x400 MS_NODIRATIME=0x800 MS_BIND=0x1000 MS_MOVE=0x2000 MS_REC=0x4000 MS_SILENT=0x8000
            MS_POSIXACL=0x10000 MS_UNBINDABLE=0x20000 MS_PRIVATE=0x40000 MS_SLAVE=0x80000 MS_SHARED=0x100000 MS_RELATIME=0x200000
            MS_STRICTATIME=0x1000000 MS_LAZYTIME=0x2000000"""
        )
    ),
    "UMOUNT": Group(_bits("MNT_FORCE=1 MNT_DETACH=2 MNT_EXPIRE=4 UMOUNT_NOFOLLOW=8")),
    "MSG": Group(
        _bits(
            """MSG_OOB=1 MSG_PEEK=2 MSG_DONTROUTE=4 MSG_CTRUNC=8 MSG_TRUNC=0x20 MSG_DONTWAIT=0x40 MSG_EOR=0x80 MSG_WAITALL=0x100
            MSG_CONFIRM=0x800 MSG_ERRQUEUE=0x2000 MSG_NOSIGNAL=0x4000 MSG_MORE=0x8000 MSG_WAITFORONE=0x10000 MSG_ZEROCOPY=0x4000000
            MSG_FASTOPEN=0x20000000 MSG_CMSG_CLOEXEC=0x40000000"""
        )
    ),
    "SOCK": Group(
        _bits("SOCK_NONBLOCK=0x800 SOCK_CLOEXEC=0x80000"), 0xF, _names("- STREAM DGRAM RAW RDM SEQPACKET DCCP - - - PACKET", "SOCK_")
    ),
    "AF": Group({}, 0, _names(_FAMILIES, "AF_")),
    "SEEK": Group({}, 0, _names("SET CUR END DATA HOLE", "SEEK_")),
    "LOCK": Group(_bits("LOCK_NB=4"), 0xB, {1: "LOCK_SH", 2: "LOCK_EX", 8: "LOCK_UN"}),
    "RENAME": Group(_bits("RENAME_NOREPLACE=1 RENAME_EXCHANGE=2 RENAME_WHITEOUT=4")),
    "GRND": Group(_bits("GRND_NONBLOCK=1 GRND_RANDOM=2 GRND_INSECURE=4")),
    "MFD": Group(_bits("MFD_CLOEXEC=1 MFD_ALLOW_SEALING=2 MFD_HUGETLB=4 MFD_NOEXEC_SEAL=8 MFD_EXEC=0x10")),
    "RWF": Group(_bits("RWF_HIPRI=1 RWF_DSYNC=2 RWF_SYNC=4 RWF_NOWAIT=8 RWF_APPEND=0x10 RWF_NOAPPEND=0x20 RWF_ATOMIC=0x40")),
    "CLOSE_RANGE": Group(_bits("CLOSE_RANGE_UNSHARE=2 CLOSE_RANGE_CLOEXEC=4")),
    "EPOLL_CTL": Group({}, 0, _names("- ADD DEL MOD", "EPOLL_CTL_")),
    "FCNTL": Group(
        {},
        0,
        {
            **_names("DUPFD GETFD SETFD GETFL SETFL GETLK SETLK SETLKW SETOWN GETOWN", "F_"),
            1030: "F_DUPFD_CLOEXEC",
            1031: "F_SETPIPE_SZ",
            1032: "F_GETPIPE_SZ",
            1033: "F_ADD_SEALS",
            1034: "F_GET_SEALS",
        },
    ),
    "CLOCK": Group(
        {},
        0,
        _names(
            """REALTIME MONOTONIC PROCESS_CPUTIME_ID THREAD_CPUTIME_ID MONOTONIC_RAW REALTIME_COARSE MONOTONIC_COARSE BOOTTIME
            REALTIME_ALARM BOOTTIME_ALARM - TAI""",
            "CLOCK_",
        ),
    ),
}
"""By the kind of argument (table.py). OPEN is x86-64's; `flags` knows arm64's."""
