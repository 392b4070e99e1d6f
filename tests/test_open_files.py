"""Liveness where file descriptors run short: both ports of a worker, in a process of their own."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

PROGRAM = Path(__file__).with_name("limited_worker.py")
OPEN_FILES, SILENT = 512, 600
DEADLINE_S = 30.0


class Worker:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.ports = self._read()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def order(self, command: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        self._read()

    def url(self, which: str) -> str:
        return f"http://127.0.0.1:{self.ports[which]}"

    def dial(self, which: str) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.ports[which]), timeout=DEADLINE_S)


@pytest.fixture
def worker() -> Iterator[Worker]:
    pipe = subprocess.PIPE
    command = [sys.executable, str(PROGRAM), str(OPEN_FILES)]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        try:
            yield Worker(process)
            assert process.stdin is not None
            process.stdin.close()
            assert process.wait(DEADLINE_S) == 0
        finally:
            process.kill()


def statuses(worker: Worker, *paths: tuple[str, str]) -> list[int]:
    return [
        httpx.get(worker.url(which) + path, timeout=DEADLINE_S).status_code for which, path in paths
    ]


@pytest.mark.parametrize("silent_on", ["main", "control"])
def test_silent_connections_lock_nobody_out(worker: Worker, silent_on: str) -> None:
    """As many as there are descriptors: both ports answer on, and refuse inference as before."""
    with contextlib.ExitStack() as stack:
        for _ in range(SILENT):
            stack.enter_context(worker.dial(silent_on))
        assert statuses(worker, ("main", "/livez"), ("control", "/livez")) == [200, 200]
        answer = httpx.post(worker.url("main") + "/v1/completions", content=b"x")
        assert answer.status_code == 503


def test_the_control_plane_answers_without_a_file_descriptor_left(worker: Worker) -> None:
    """Whoever took them: a leak, the engine, a log. It has some of its own, again and again."""
    worker.order("exhaust")
    for _ in range(5):
        assert statuses(worker, ("control", "/livez")) == [200]
    with worker.dial("main") as waiting:  # accepted once there is one
        waiting.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        assert statuses(worker, ("control", "/livez")) == [200]
        worker.order("release")
        assert waiting.recv(100).startswith(b"HTTP/1.1 200 ")
    assert statuses(worker, ("main", "/livez"), ("control", "/livez")) == [200, 200]
