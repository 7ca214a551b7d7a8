"""What the arguments of each system call are: one line a call, in the words of its man page.

`NAME argument:kind ...`. Kinds:

    int uint size pid uid sig   numbers (int and fd are signed, 32 bits)
    fd dirfd                    a descriptor; dirfd is what the path after it starts at (AT_FDCWD)
    mode dev                    permission bits, a device number
    path str                    a string: path is the name of a file
    in=N out=N                  a buffer, its length in argument N; in is read by the call, out is written
    iovec=N                     an array of struct iovec, N of them: iovec is read, iovec_out is written
    sockaddr=N sockaddr_out=N   an address, its length in argument N (for out: behind the pointer N)
    msghdr strings              struct msghdr; an argv
    ptr                         anything else in memory
    timespec timeval utsname .. a struct of decode.STRUCTS; with _out: written by the call
    OPEN PROT ...               flags or an enumeration of decode.FLAGS

A call that is not here has six arguments arg0 to arg5. The tables of numbers are launch/syscalls.py.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from trivisor.launch.syscalls import SYSCALLS

_CALLS = """
read fd:fd buf:out=count count:size
write fd:fd buf:in=count count:size
pread64 fd:fd buf:out=count count:size offset:int64
pwrite64 fd:fd buf:in=count count:size offset:int64
readv fd:fd iov:iovec_out=iovcnt iovcnt:int
writev fd:fd iov:iovec=iovcnt iovcnt:int
preadv fd:fd iov:iovec_out=iovcnt iovcnt:int pos_l:uint pos_h:uint
pwritev fd:fd iov:iovec=iovcnt iovcnt:int pos_l:uint pos_h:uint
preadv2 fd:fd iov:iovec_out=iovcnt iovcnt:int pos_l:uint pos_h:uint flags:RWF
pwritev2 fd:fd iov:iovec=iovcnt iovcnt:int pos_l:uint pos_h:uint flags:RWF
open pathname:path flags:OPEN mode:mode
creat pathname:path mode:mode
openat dirfd:dirfd pathname:path flags:OPEN mode:mode
openat2 dirfd:dirfd pathname:path how:open_how size:size
close fd:fd
close_range first:uint last:uint flags:CLOSE_RANGE
stat pathname:path statbuf:ptr
lstat pathname:path statbuf:ptr
fstat fd:fd statbuf:ptr
newfstatat dirfd:dirfd pathname:path statbuf:ptr flags:AT
statx dirfd:dirfd pathname:path flags:AT mask:uint statxbuf:ptr
statfs path:path buf:ptr
fstatfs fd:fd buf:ptr
access pathname:path mode:ACCESS
faccessat dirfd:dirfd pathname:path mode:ACCESS
faccessat2 dirfd:dirfd pathname:path mode:ACCESS flags:AT
readlink pathname:path buf:out=bufsiz bufsiz:size
readlinkat dirfd:dirfd pathname:path buf:out=bufsiz bufsiz:size
mkdir pathname:path mode:mode
mkdirat dirfd:dirfd pathname:path mode:mode
rmdir pathname:path
unlink pathname:path
unlinkat dirfd:dirfd pathname:path flags:AT_UNLINK
rename oldpath:path newpath:path
renameat olddirfd:dirfd oldpath:path newdirfd:dirfd newpath:path
renameat2 olddirfd:dirfd oldpath:path newdirfd:dirfd newpath:path flags:RENAME
link oldpath:path newpath:path
linkat olddirfd:dirfd oldpath:path newdirfd:dirfd newpath:path flags:AT
symlink target:str linkpath:path
symlinkat target:str newdirfd:dirfd linkpath:path
mknod pathname:path mode:mode dev:dev
mknodat dirfd:dirfd pathname:path mode:mode dev:dev
chmod pathname:path mode:mode
fchmod fd:fd mode:mode
fchmodat dirfd:dirfd pathname:path mode:mode
fchmodat2 dirfd:dirfd pathname:path mode:mode flags:AT
chown pathname:path owner:uid group:uid
lchown pathname:path owner:uid group:uid
fchown fd:fd owner:uid group:uid
fchownat dirfd:dirfd pathname:path owner:uid group:uid flags:AT
truncate path:path length:int64
ftruncate fd:fd length:int64
fallocate fd:fd mode:int offset:int64 len:int64
utimensat dirfd:dirfd pathname:path times:timespec2 flags:AT
utimes filename:path times:timeval2
utime filename:path times:ptr
chdir path:path
fchdir fd:fd
chroot path:path
getcwd buf:out=size size:size
getdents fd:fd dirp:out=count count:size
getdents64 fd:fd dirp:out=count count:size
lseek fd:fd offset:int64 whence:SEEK
fsync fd:fd
fdatasync fd:fd
sync_file_range fd:fd offset:int64 nbytes:int64 flags:uint
syncfs fd:fd
flock fd:fd operation:LOCK
fcntl fd:fd cmd:FCNTL arg:uint
ioctl fd:fd request:uint argp:ptr
dup oldfd:fd
dup2 oldfd:fd newfd:fd
dup3 oldfd:fd newfd:fd flags:OPEN
pipe pipefd:ptr
pipe2 pipefd:ptr flags:OPEN
poll fds:ptr nfds:uint timeout:int
ppoll fds:ptr nfds:uint tmo:timespec sigmask:ptr sigsetsize:size
select nfds:int readfds:ptr writefds:ptr exceptfds:ptr timeout:timeval
pselect6 nfds:int readfds:ptr writefds:ptr exceptfds:ptr timeout:timespec sigmask:ptr
epoll_create size:int
epoll_create1 flags:OPEN
epoll_ctl epfd:fd op:EPOLL_CTL fd:fd event:epoll_event
epoll_wait epfd:fd events:ptr maxevents:int timeout:int
epoll_pwait epfd:fd events:ptr maxevents:int timeout:int sigmask:ptr sigsetsize:size
eventfd2 initval:uint flags:OPEN
inotify_add_watch fd:fd pathname:path mask:uint
sendfile out_fd:fd in_fd:fd offset:ptr count:size
splice fd_in:fd off_in:ptr fd_out:fd off_out:ptr len:size flags:uint
copy_file_range fd_in:fd off_in:ptr fd_out:fd off_out:ptr len:size flags:uint
memfd_create name:str flags:MFD
getxattr path:path name:str value:out=size size:size
lgetxattr path:path name:str value:out=size size:size
fgetxattr fd:fd name:str value:out=size size:size
setxattr path:path name:str value:in=size size:size flags:uint
lsetxattr path:path name:str value:in=size size:size flags:uint
fsetxattr fd:fd name:str value:in=size size:size flags:uint
listxattr path:path list:out=size size:size
removexattr path:path name:str
mount source:str target:path filesystemtype:str mountflags:MOUNT data:str
umount2 target:path flags:UMOUNT
pivot_root new_root:path put_old:path
swapon path:path swapflags:uint
swapoff path:path
socket domain:AF type:SOCK protocol:int
socketpair domain:AF type:SOCK protocol:int sv:ptr
bind sockfd:fd addr:sockaddr=addrlen addrlen:size
connect sockfd:fd addr:sockaddr=addrlen addrlen:size
listen sockfd:fd backlog:int
accept sockfd:fd addr:sockaddr_out=addrlen addrlen:ptr
accept4 sockfd:fd addr:sockaddr_out=addrlen addrlen:ptr flags:SOCK
getsockname sockfd:fd addr:sockaddr_out=addrlen addrlen:ptr
getpeername sockfd:fd addr:sockaddr_out=addrlen addrlen:ptr
sendto sockfd:fd buf:in=len len:size flags:MSG dest_addr:sockaddr=addrlen addrlen:size
recvfrom sockfd:fd buf:out=len len:size flags:MSG src_addr:sockaddr_out=addrlen addrlen:ptr
sendmsg sockfd:fd msg:msghdr flags:MSG
recvmsg sockfd:fd msg:msghdr_out flags:MSG
sendmmsg sockfd:fd msgvec:ptr vlen:uint flags:MSG
recvmmsg sockfd:fd msgvec:ptr vlen:uint flags:MSG timeout:timespec
setsockopt sockfd:fd level:int optname:int optval:in=optlen optlen:size
getsockopt sockfd:fd level:int optname:int optval:ptr optlen:ptr
shutdown sockfd:fd how:int
mmap addr:ptr length:size prot:PROT flags:MAP fd:fd offset:int64
mprotect addr:ptr len:size prot:PROT
munmap addr:ptr length:size
mremap old_address:ptr old_size:size new_size:size flags:uint new_address:ptr
madvise addr:ptr length:size advice:int
brk addr:ptr
execve pathname:path argv:strings envp:strings
execveat dirfd:dirfd pathname:path argv:strings envp:strings flags:AT
exit status:int
exit_group status:int
fork
vfork
clone flags:CLONE stack:ptr parent_tid:ptr child_tid:ptr tls:ptr
clone3 cl_args:clone_args size:size
wait4 pid:pid wstatus:ptr options:int rusage:ptr
waitid idtype:int id:pid infop:ptr options:int rusage:ptr
kill pid:pid sig:sig
tkill tid:pid sig:sig
tgkill tgid:pid tid:pid sig:sig
rt_sigaction signum:sig act:ptr oldact:ptr sigsetsize:size
rt_sigprocmask how:int set:ptr oldset:ptr sigsetsize:size
getpid
getppid
gettid
getuid
geteuid
getgid
getegid
setuid uid:uid
setgid gid:uid
setreuid ruid:uid euid:uid
setregid rgid:uid egid:uid
setresuid ruid:uid euid:uid suid:uid
setresgid rgid:uid egid:uid sgid:uid
getresuid ruid:ptr euid:ptr suid:ptr
getresgid rgid:ptr egid:ptr sgid:ptr
getgroups size:int list:ptr
setgroups size:int list:ptr
getpgid pid:pid
setpgid pid:pid pgid:pid
setsid
getsid pid:pid
umask mask:mode
uname buf:utsname_out
sysinfo info:sysinfo_out
sethostname name:in=len len:size
setdomainname name:in=len len:size
times buf:ptr
time tloc:ptr
gettimeofday tv:timeval_out tz:ptr
settimeofday tv:timeval tz:ptr
clock_gettime clockid:CLOCK tp:timespec_out
clock_settime clockid:CLOCK tp:timespec
clock_getres clockid:CLOCK res:timespec_out
clock_nanosleep clockid:CLOCK flags:uint request:timespec remain:timespec_out
nanosleep req:timespec rem:timespec_out
timer_settime timerid:int flags:int new_value:itimerspec old_value:itimerspec_out
timerfd_create clockid:CLOCK flags:OPEN
timerfd_settime fd:fd flags:int new_value:itimerspec old_value:itimerspec_out
getrandom buf:out=buflen buflen:size flags:GRND
getrlimit resource:int rlim:rlimit_out
setrlimit resource:int rlim:rlimit
prlimit64 pid:pid resource:int new_limit:rlimit old_limit:rlimit_out
getrusage who:int usage:ptr
getpriority which:int who:pid
setpriority which:int who:pid prio:int
sched_yield
sched_getaffinity pid:pid cpusetsize:size mask:ptr
sched_setaffinity pid:pid cpusetsize:size mask:ptr
prctl option:int arg2:uint arg3:uint arg4:uint arg5:uint
arch_prctl code:int addr:ptr
ptrace request:int pid:pid addr:ptr data:ptr
unshare flags:CLONE
setns fd:fd nstype:CLONE
futex uaddr:ptr futex_op:int val:uint timeout:timespec uaddr2:ptr val3:uint
set_tid_address tidptr:ptr
set_robust_list head:ptr len:size
rseq rseq:ptr rseq_len:uint flags:int sig:uint
process_vm_readv pid:pid local_iov:iovec_out=liovcnt liovcnt:uint remote_iov:ptr riovcnt:uint flags:uint
process_vm_writev pid:pid local_iov:iovec=liovcnt liovcnt:uint remote_iov:ptr riovcnt:uint flags:uint
pidfd_open pid:pid flags:uint
"""


@dataclass(frozen=True, slots=True)
class Argument:
    """One argument: `length` is the index of the argument that says how long this one is, where one does."""

    name: str
    kind: str
    index: int
    length: int | None = None


@dataclass(frozen=True, slots=True)
class Signature:
    """A call and its arguments."""

    name: str
    arguments: tuple[Argument, ...]

    def find(self, name: str | int | None, kinds: frozenset[str]) -> Argument:
        """Return the argument called (or numbered) `name`; without, the first of `kinds`. Raises LookupError, saying what there is."""
        for argument in self.arguments:
            if argument.kind in kinds if name is None else name in (argument.name, argument.index):
                return argument
        what = f"no {' or '.join(sorted(kinds))} argument" if name is None else f"no argument {name!r}"
        known = ", ".join(f"{argument.name} ({argument.kind})" for argument in self.arguments)
        raise LookupError(f"{self.name} has {what}; it has {known or 'none'}")

    def before(self, argument: Argument) -> Argument | None:
        """Return the descriptor that the path `argument` starts at, if the call has one."""
        previous = self.arguments[argument.index - 1] if argument.index else None
        return previous if previous is not None and previous.kind == "dirfd" else None


@functools.cache
def signatures() -> dict[str, Signature]:
    """Return the calls whose arguments are known, by name."""
    return {name: Signature(name, _arguments(words)) for name, *words in map(str.split, _CALLS.strip().splitlines())}


@functools.cache
def names(machine: str) -> dict[int, str]:
    """Return number to name on `machine` (x86_64, aarch64)."""
    return {number: name for name, number in SYSCALLS[machine].items()}


@functools.cache
def signature(name: str) -> Signature:
    """Return what is known of call `name`."""
    known = signatures().get(name)
    return known or Signature(name, tuple(Argument(f"arg{index}", "uint", index) for index in range(6)))


def _arguments(words: list[str]) -> tuple[Argument, ...]:
    parts = [word.split(":") for word in words]
    order = [name for name, _ in parts]
    found = []
    for index, (name, kind) in enumerate(parts):
        kind, _, length = kind.partition("=")
        found.append(Argument(name, kind, index, order.index(length) if length else None))
    return tuple(found)
