"""The command line as a process of its own: signals, readers that go away, a terminal."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from cli_support import Cli, argv, process, states
from machine_home import IMAGE, TestHome


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_run_that_is_ended_leaves_nothing(cli: Cli, home: TestHome, number: int, status: int) -> None:
    with process(home, "run", IMAGE, "sh", "-c", "echo ready; exec sleep 100") as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "ready\n"
        running.send_signal(number)
        _, err = running.communicate(timeout=30)
    assert (running.returncode, err) == (status, "")
    assert states(cli) == {}


def test_exec_whose_reader_goes_away_ends(cli: Cli, home: TestHome, web: str) -> None:
    with process(home, "exec", web, "yes") as running:
        assert running.stdout is not None and running.stderr is not None
        assert running.stdout.readline() == "y\n"
        running.stdout.close()
        assert running.wait(30) == 128 + signal.SIGPIPE
        assert running.stderr.read() == ""


def test_forward(cli: Cli, home: TestHome, web: str, tmp_path: Path) -> None:
    (tmp_path / "page").write_text("hello")
    serve = "import functools, http.server as h; handler = functools.partial(h.SimpleHTTPRequestHandler, directory={!r});"
    serve += " s = h.HTTPServer(('127.0.0.1', 0), handler); print(s.server_port, flush=True); s.serve_forever()"
    with subprocess.Popen(
        [sys.executable, "-c", serve.format(str(tmp_path))], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as server:
        assert server.stdout is not None
        try:
            with process(home, "forward", web, server.stdout.readline().strip()) as forwarding:
                assert forwarding.stdout is not None
                address = forwarding.stdout.readline().split()[0]
                assert urllib.request.urlopen(f"http://{address}/page", timeout=20).read() == b"hello"
                forwarding.send_signal(signal.SIGINT)
                assert forwarding.wait(20) == 0
        finally:
            server.kill()


def read_until(terminal: int, wanted: bytes, seconds: float = 20.0) -> bytes:
    """Return what the terminal shows up to `wanted`; fail after `seconds`."""
    shown = b""
    end = time.monotonic() + seconds
    while wanted not in shown:
        ready, _, _ = select.select([terminal], [], [], max(0.0, end - time.monotonic()))
        assert ready, f"{wanted!r} was not shown: {shown!r}"
        shown += os.read(terminal, 4096)
    return shown


def test_exec_on_a_terminal(home: TestHome, web: str) -> None:
    """Keys go to the command, Ctrl-C among them; its status is ours."""
    ours, theirs = pty.openpty()
    words = argv(
        home, "exec", "-it", web, "sh", "-c", "trap 'echo caught; exit 9' INT; test -t 0 && echo ready; while :; do sleep 0.05; done"
    )
    with subprocess.Popen(words, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True) as running:
        os.close(theirs)
        try:
            read_until(ours, b"ready")
            os.write(ours, b"\x03")
            read_until(ours, b"caught")
            assert running.wait(20) == 9
        finally:
            running.kill()
            os.close(ours)


def test_slow_steps_are_told_on_standard_error(home: TestHome, cli: Cli) -> None:
    """Nobody watches: a line for a step that lasts over a second, and none on standard output."""
    script = "import time; from trivisor.cli import render\nwith render.Steps() as s: s('quick'); s('slow\\x1b[2J'); time.sleep(1.3)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert (done.stdout, done.stderr) == ("", "trivisor: slow[2J\n")
