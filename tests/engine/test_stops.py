"""Ctrl-C in a terminal in the middle of a start: exit code 0, and no process left."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from harness import ENGINE_ENVIRONMENT, ENGINE_FLAGS, free_port, living_in, wait_for

pytestmark = pytest.mark.engine


def test_ctrl_c_in_a_terminal_ends_a_load_that_is_shown_live(model: str, tmp_path: Path) -> None:
    parent = pty.openpty()
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "ichat_lifecycle", "serve", "--model-path", model),
            *("--port", str(free_port()), "--control-port", "0", *ENGINE_FLAGS),
        ],
        cwd=tmp_path,
        env={**os.environ, **ENGINE_ENVIRONMENT, "TERM": "xterm"},
        stdin=parent[1],
        stdout=parent[1],
        stderr=parent[1],
        start_new_session=True,
        preexec_fn=_take_terminal,  # noqa: PLW1509  # this process has no other threads here
    )
    os.close(parent[1])
    seen = b""

    def shows(text: bytes) -> bool:
        nonlocal seen
        seen += os.read(parent[0], 65536)
        return text in seen

    try:
        wait_for(lambda: shows(b"PARSED: importing"), "the live view of the import")
        wait_for(lambda: shows(b"BOUND: "), "the live view of the load")
        os.write(parent[0], b"\x03")
        wait_for(lambda: process.poll() is not None or not shows(b"\0"), "the end", 60)
        assert process.wait(60) == 0
        wait_for(lambda: not living_in(tmp_path), "nothing is left", 5)
    finally:
        for left in living_in(tmp_path):
            left.kill()
        process.wait()
        os.close(parent[0])


def _take_terminal() -> None:
    """Makes the pseudo-terminal the controlling one, so that Ctrl-C becomes a SIGINT."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
