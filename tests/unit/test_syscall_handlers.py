"""Handlers answer the calls of a real program under a real filter: what they see of a call, and what the program gets."""

from __future__ import annotations

import array
import ctypes
import errno
import mmap
import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from syscall_support import On, answered, call, libc

from trivisor.core.errors import BadArgument
from trivisor.vos.syscalls import decode
from trivisor.vos.syscalls.call import Call

pytestmark = pytest.mark.skipif(os.geteuid() != 0 and not os.access("/proc/self/mem", os.W_OK), reason="needs to read its child's memory")


def outcome(function: Callable[[], object], *handlers: On, **options: object) -> str:
    with answered(function, *handlers, **options) as (child, attachment):
        result = child.result()
        assert not attachment.failures, attachment.failures
        return result


def test_return_errno_and_proceed() -> None:
    handlers = (
        On(("getppid",), lambda call: call.returns(4242)),
        On(("getuid",), lambda call: call.errno(errno.EILSEQ)),
        On(("getpgid",), lambda call: call.proceed()),
    )
    expected = (4242, -errno.EILSEQ, os.getpgid(0), -1 << 62)
    last = On(("getsid",), lambda call: call.returns(-1 << 62))
    assert outcome(lambda: (call("getppid"), call("getuid"), call("getpgid", 0), call("getsid", 0)), *handlers, last) == repr(expected)


def test_what_a_call_is() -> None:
    seen: list[object] = []

    def handler(call: Call) -> None:
        seen.extend(
            (call.name, call.pid, call.path(), call.flags, "O_CREAT" in call.flags, call["mode"], call["dirfd"], call.args[3], call.valid)
        )
        call.errno(errno.EACCES)

    with answered(lambda: call("openat", -100, b"a/\xff", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o640), On(("openat",), handler)) as (
        child,
        _,
    ):
        assert child.result() == str(-errno.EACCES)
        pid = child.pid
    assert str(seen.pop(3)) == "O_WRONLY|O_CREAT|O_CLOEXEC"
    assert seen == ["openat", pid, "a/\udcff", True, 0o640, -100, 0o640, True]


def test_paths_are_made_whole() -> None:
    seen: list[str] = []

    def handler(call: Call) -> None:
        seen.append(call.full_path())
        call.returns(0)

    def program() -> None:
        os.chdir("/usr")
        folder = os.open("/etc", os.O_RDONLY)
        for dirfd, path in ((-100, b"x/../y"), (folder, b"passwd"), (folder, b"/abs//olute"), (99, b"none")):
            call("mkdirat", dirfd, path, 0o755)

    outcome(program, On(("mkdirat",), handler))
    assert seen == ["/usr/y", "/etc/passwd", "/abs/olute"]  # the last got EBADF


def test_buffers_vectors_messages() -> None:
    seen: list[object] = []

    def written(call: Call) -> None:
        seen.append((call.name, call.buffer()))
        call.returns(len(call.buffer()))

    def sent(call: Call) -> None:
        (control,) = call.controls()
        seen.append((call.buffer(), str(call.sockaddr()), control.fds, call.flags & 0xFF))
        call.returns(7)

    def program() -> object:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [1, 2]))]
            done = sock.sendmsg([b"he", b"llo"], rights, socket.MSG_OOB, "@nobody".replace("@", "\0"))
            return os.pwritev(1, [b"one", b"", b"two"], 0), os.pwrite(1, b"plain", 0), done

    on_write = On(("pwritev", "pwrite64", "pwritev2"), written)
    assert outcome(program, on_write, On(("sendmsg",), sent)) == "(6, 5, 7)"
    assert seen == [(b"hello", "@nobody", (1, 2), 1), ("pwritev2", b"onetwo"), ("pwrite64", b"plain")]


def test_addresses() -> None:
    seen: list[str] = []

    def connected(call: Call) -> None:
        seen.append(str(call.sockaddr()))
        call.errno(errno.ECONNREFUSED)

    def program() -> None:
        for family, where in ((socket.AF_INET, ("1.2.3.4", 80)), (socket.AF_INET6, ("::1", 81)), (socket.AF_UNIX, "/run/x")):
            with socket.socket(family) as sock:
                sock.connect_ex(where)

    outcome(program, On(("connect",), connected))
    assert seen == ["1.2.3.4:80", "[::1]:81", "/run/x"]


def test_structs_are_written() -> None:
    def named(call: Call) -> None:
        call.write_struct("buf", {"sysname": "Plan9", "nodename": "x" * 80})
        call.returns(0)

    def clock(call: Call) -> None:
        call.write_struct("tp", {"tv_sec": 1 << 33, "tv_nsec": 5})
        call.returns(0)

    def random(call: Call) -> None:
        call.returns(call.write("buf", bytes(range(200))))

    def program() -> object:
        time = ctypes.create_string_buffer(16)
        call("clock_gettime", 0, time)
        named = os.uname()
        return named.sysname, named.nodename, struct.unpack("<qq", time.raw), os.getrandom(4)

    handlers = On(("uname",), named), On(("clock_gettime",), clock), On(("getrandom",), random)
    assert outcome(program, *handlers) == repr(("Plan9", "x" * 64, (1 << 33, 5), b"\0\1\2\3"))


def test_vectors_and_addresses_are_written() -> None:
    def read(call: Call) -> None:
        call.returns(call.write("iov", b"abcdefgh"))

    def peer(call: Call) -> None:
        call.write_sockaddr("addr", decode.encode_address("9.8.7.6", 5))
        call.returns(0)

    def program() -> object:
        first, second = bytearray(3), bytearray(4)
        with socket.socket() as sock:
            return os.preadv(0, [first, second], 0), bytes(first + second), sock.getpeername()

    assert outcome(program, On(("preadv", "preadv2"), read), On(("getpeername",), peer)) == repr((7, b"abcdefg", ("9.8.7.6", 5)))


def test_bytes_are_given_as_an_unchangeable_file() -> None:
    def opened(call: Call) -> None:
        if call.path() == "/virtual":
            call.give(b"from Python\n")
        else:
            call.proceed()

    def program() -> object:
        fd = os.open("/virtual", os.O_RDONLY)
        other = os.open("/virtual", os.O_RDONLY)
        os.set_inheritable(other, True)
        content = os.read(fd, 100), os.read(other, 4), os.get_inheritable(fd)
        return content, call("write", fd, b"x", 1), call("ftruncate", fd, 1), os.fstat(fd).st_size

    assert outcome(program, On(("openat",), opened)) == repr(((b"from Python\n", b"from", False), -errno.EBADF, -errno.EINVAL, 12))


def test_a_file_is_given_and_may_be_closed(tmp_path: object) -> None:
    path = os.path.join(str(tmp_path), "real")
    with open(path, "w") as file:
        file.write("real")

    def opened(call: Call) -> None:
        if call.path() != "/virtual":
            return call.proceed()
        with open(path) as file:
            call.give(file, cloexec=False)
        return None

    assert outcome(lambda: Path("/virtual").read_text(), On(("openat",), opened)) == repr("real")


def test_connect_is_answered_with_a_socket() -> None:
    ends: list[socket.socket] = []

    def connected(call: Call) -> None:
        ours, theirs = socket.socketpair()
        call.give(theirs, fd=call["sockfd"])
        theirs.close()
        ours.sendall(b"hello " + str(call.sockaddr()).encode())
        ours.shutdown(socket.SHUT_WR)
        ends.append(ours)

    def program() -> object:
        with socket.create_connection(("192.0.2.1", 25)) as sock:
            sock.sendall(b"bye")
            return sock.recv(100)

    assert outcome(program, On(("connect",), connected)) == repr(b"hello 192.0.2.1:25")
    with ends[0] as ours:
        assert ours.recv(10) == b"bye"


def test_two_descriptors_of_a_pipe() -> None:
    def piped(call: Call) -> None:
        with open("/dev/null", "wb") as null:
            numbers = call.install(b"canned"), call.install(null)
        call.write_at(call["pipefd"], struct.pack("<ii", *numbers))
        call.returns(0)

    def program() -> object:
        reading, writing = os.pipe()
        return os.read(reading, 10), os.write(writing, b"gone")

    assert outcome(program, On(("pipe2", "pipe"), piped)) == repr((b"canned", 4))


def test_delay_holds_one_call_and_no_other() -> None:
    def slow(call: Call) -> None:
        call.delay(0.3)
        call.returns(1)

    def program() -> object:
        """A host that stands still for a moment may have the delay over before the others are done: then once more."""
        others = False
        for _ in range(20):
            began = time.monotonic()
            thread = threading.Thread(target=libc.getppid)
            thread.start()
            for _ in range(20):
                call("getpgid", 0)
            others = thread.is_alive()
            thread.join()
            held = time.monotonic() - began >= 0.29
            if others or not held:
                break
        return others, held

    assert outcome(program, On(("getppid",), slow), On(("getpgid",), lambda call: call.returns(3))) == "(True, True)"


@pytest.mark.parametrize("address", [1, 0xFFFF_8000_0000_0000, (1 << 64) - 8])
def test_bad_pointers_are_efault_as_in_the_kernel(address: int) -> None:
    errors: list[int] = []

    def handler(call: Call) -> None:
        try:
            call.path()
        except BadArgument as error:
            errors.append(error.errno)
            raise

    assert outcome(lambda: call("rmdir", address), On(("rmdir",), handler)) == str(-errno.EFAULT)
    assert errors == [errno.EFAULT]


def test_a_string_may_end_where_memory_does() -> None:
    def program() -> object:
        memory = mmap.mmap(-1, 2 * mmap.PAGESIZE)
        at = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        libc.munmap(ctypes.c_void_p(at + mmap.PAGESIZE), mmap.PAGESIZE)
        memory[mmap.PAGESIZE - 4 : mmap.PAGESIZE] = b"end\0"
        whole = call("rmdir", at + mmap.PAGESIZE - 4)
        memory[mmap.PAGESIZE - 1 : mmap.PAGESIZE] = b"x"
        return whole, call("rmdir", at + mmap.PAGESIZE - 4), call("rmdir", b"x" * 5000)

    def handler(call: Call) -> None:
        call.returns(len(call.path()))

    assert outcome(program, On(("rmdir",), handler)) == repr((3, -errno.EFAULT, -errno.ENAMETOOLONG))


def test_what_was_read_stays(tmp_path: object) -> None:
    """Another thread of the program changes the path while the handler looks at it: it sees one copy."""
    torn: list[tuple[str, str]] = []

    def handler(call: Call) -> None:
        first = call.path()
        second = call.path()
        if first != second:
            torn.append((first, second))
        call.returns(0)

    def program() -> object:
        path = ctypes.create_string_buffer(b"/good")
        done = threading.Event()

        def change() -> None:
            while not done.is_set():
                path.value = b"/evil"
                path.value = b"/good"

        thread = threading.Thread(target=change)
        thread.start()
        for _ in range(300):
            call("rmdir", path)
        done.set()
        thread.join()

    outcome(program, On(("rmdir",), handler))
    assert not torn


def test_huge_lengths_are_bounded() -> None:
    seen: list[int] = []

    def handler(call: Call) -> None:
        seen.append(len(call.buffer(most=100)))
        call.returns(0)

    def vector(call: Call) -> None:
        call.buffer()

    def program() -> object:
        return call("write", 1, b"x" * 200, (1 << 63) - 1), call("writev", 1, b"x" * 64, 1 << 20), call("connect", 1, b"x" * 300, 299)

    names = On(("connect",), lambda call: call.sockaddr())
    assert outcome(program, On(("write",), handler), On(("writev",), vector), names) == repr((0, -errno.EINVAL, -errno.EINVAL))
    assert seen == [100]
