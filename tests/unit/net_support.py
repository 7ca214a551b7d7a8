"""A host of the tests' own: a program run in fresh network and mount namespaces, so that it may do what root does to a network.

The host has `lo`, and `up0`, which leads to an "internet" with a few addresses; on 203.0.113.1 port 80 something answers
with the address it was asked from.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PRELUDE = r'''
import contextlib, ctypes, os, socket, subprocess, sys, threading, time
from pathlib import Path
from trivisor.launch.net import host, links, netlink, pool
from trivisor.launch.net.netlink import Netlink

libc = ctypes.CDLL(None, use_errno=True)

def inside(fd, work):
    """Do `work` in the network namespace of `fd`."""
    found = []
    def run():
        assert libc.setns(fd, 0x40000000) == 0
        found.append(work())
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0]

def serve(address, port, kind=socket.SOCK_STREAM):
    """Answer every connection with the address it came from."""
    server = socket.socket(socket.AF_INET, kind)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.bind((address, port))
    server.listen()
    def loop():
        while True:
            client, peer = server.accept()
            with client, contextlib.suppress(OSError):
                client.sendall(peer[0].encode())
    threading.Thread(target=loop, daemon=True).start()
    return server

SURE = 30  # seconds in which what is let through is answered, on a host that has much else to do

def ask(address, port, timeout=0.7):
    """What is answered, or the error's name. `timeout`: what is to be dropped need not be waited for as long as what is to be answered."""
    with socket.socket() as client:
        client.settimeout(timeout)
        try:
            client.connect((address, port))
            return client.recv(100).decode()
        except OSError as error:
            return type(error).__name__

def internet():
    fd = links.loopback()
    with Netlink() as here:
        here.ask([netlink.new_veth(50, "up0", "02:00:00:00:00:01", 1400, peer="eth0", peer_namespace=fd)])
        here.ask([netlink.up(1), netlink.address(50, "192.0.2.2", 24), netlink.up(50), netlink.default_route(50, "192.0.2.1")])
    def build():
        with Netlink() as there:
            index = socket.if_nametoindex("eth0")
            there.ask([netlink.address(index, address, 24) for address in ("192.0.2.1", "203.0.113.1")])
            for address in ("169.254.169.254", "100.100.100.200"):
                there.ask([netlink.address(index, address, 32)])
            there.ask([netlink.up(index)])
        serve("0.0.0.0", 80)
    inside(fd, build)
    return fd

away = internet()

def machine(name, network=None):
    """A machine's namespace as engines get it."""
    return links.veth(pool.blocks(host.ready(), name, network), name, "52:54:00:00:00:01")
'''


def run(code: str, tmp_path: Path, *, timeout: float = 150) -> str:
    """Run Python `code` after PRELUDE on such a host; return what it prints."""
    if os.geteuid() != 0:
        pytest.skip("needs root: a host's network")
    if shutil.which("unshare") is None:
        pytest.skip("needs unshare (util-linux)")
    program = tmp_path / "program.py"
    program.write_text(PRELUDE + code)
    # /proc/sys/net and /sys are those of the namespace; /run is not the host's.
    shell = 'mount -t tmpfs tmpfs /run && mount -t sysfs sysfs /sys && exec "$@"'
    command = ["unshare", "--net", "--mount", "sh", "-c", shell, "sh", sys.executable, str(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
