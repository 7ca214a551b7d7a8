"""Rules are data: what they decide holds when the process that gave them is gone, and needs nobody to be there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from trivisor import Machine, Policy

BOUND = 60.0
AUTHOR = """
import os, sys, time
from trivisor import VMM, Policy

policy = Policy("write:ENOSPC,path=/tmp/lasting/*,after=2,times=1", "fsync:delay=0.3s", "getppid:return=4711", "mkdir+mkdirat:EROFS")
program = '''
import os, time
open('/tmp/lasting-begun', 'w').close()
while not os.path.exists('/tmp/lasting-go'): time.sleep(0.01)
def tried(call, *args):
    try: return call(*args)
    except OSError as error: return -error.errno
os.chdir('/tmp/lasting')
file = os.open('file', os.O_CREAT | os.O_WRONLY)
said = [tried(os.write, file, b'x') for _ in range(4)]
began = time.monotonic()
os.fsync(file)
said += [time.monotonic() - began >= 0.3, os.getppid(), tried(os.mkdir, 'folder')]
with open('/tmp/said.new', 'w') as out: print(*said, file=out)
os.rename('/tmp/said.new', '/tmp/lasting-said')
'''
vmm = VMM(sys.argv[1])
vmm.get(sys.argv[2]).spawn(["python3", "-c", program], policy=policy, detach=True, stdin=False)
print("begun", flush=True)
time.sleep(60)
"""


def appears(machine: Machine, path: str) -> None:
    deadline = time.monotonic() + BOUND
    while not machine.files.exists(path):
        assert time.monotonic() < deadline, path
        time.sleep(0.02)  # whoever makes it knows nobody outside


@pytest.mark.walls("container", "vm")
def test_rules_hold_when_their_author_is_gone(running: Machine) -> None:
    """Those that need an answer: by path and count, a delay, a value. What the kernel answers by itself does so anyway."""
    running.exec("rm -rf /tmp/lasting* && mkdir /tmp/lasting", check=True)
    argv = [sys.executable, "-c", textwrap.dedent(AUTHOR), str(running._context.home.root), running.name]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as author:
        assert author.stdout is not None and author.stdout.readline() == b"begun\n"
        appears(running, "/tmp/lasting-begun")
        os.kill(author.pid, signal.SIGKILL)
    running.files.write("/tmp/lasting-go", b"")
    appears(running, "/tmp/lasting-said")
    assert running.files.read_text("/tmp/lasting-said").split() == ["1", "1", "-28", "1", "True", "4711", "-30"]


@pytest.mark.walls("container", "vm")
def test_a_call_kills_by_its_path(running: Machine) -> None:
    done = running.exec("mkdir /tmp/lives; mkdir /tmp/dies; echo $?", policy=Policy("mkdir+mkdirat:kill,path=/tmp/dies"), timeout=BOUND)
    assert done.text == f"{128 + signal.SIGKILL}\n"
    assert running.files.exists("/tmp/lives") and not running.files.exists("/tmp/dies")


@pytest.mark.walls("container")
def test_what_a_rule_logs_by_path_is_in_the_machines_log(running: Machine) -> None:
    running.exec("cat /etc/passwd /etc/hostname", policy=Policy("open+openat:log,path=/etc/hostname"), check=True, timeout=BOUND)
    deadline = time.monotonic() + BOUND
    while b"/etc/hostname" not in (said := b"".join(running.logs(source="answer"))):
        assert time.monotonic() < deadline, said
        time.sleep(0.02)  # it is written beside the command's end
    assert b"/etc/passwd" not in said


@pytest.mark.walls("vm", "container")
def test_a_setuid_program_and_what_it_starts_have_the_policy(running: Machine) -> None:
    """As root's and as another's, under rules of both kinds; it raises nothing under a policy."""
    running.exec("cp /usr/bin/python3 /tmp/raised && chown 0:0 /tmp/raised && chmod 4755 /tmp/raised", check=True)
    policy = Policy("rmdir+unlinkat:EDOM", "mkdir+mkdirat:ENOSPC,path=/tmp/*")
    code = """
import errno, os, subprocess
def tried(call, *args):
    try: call(*args)
    except OSError as error: return errno.errorcode[error.errno]
print(os.geteuid(), tried(os.mkdir, '/tmp/raised-a'), tried(os.rmdir, '/tmp'))
said = subprocess.run(['mkdir', '/tmp/raised-b'], capture_output=True, text=True).stderr
print('No space' in said)
"""
    for user, uid in (("nobody", "65534"), ("", "0")):
        done = running.exec(["/tmp/raised", "-c", code], policy=policy, user=user, timeout=BOUND)
        assert done.text == f"{uid} ENOSPC EDOM\nTrue\n", done.error_text
