"""What the fault matrix measures with: it has to tell complete, broken and cut streams apart."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from faults.matrix import ROWS
from faults.measure import (
    COMPLETE,
    CUT,
    ERROR,
    Measured,
    Poller,
    Streams,
    not_200,
    outcomes,
)


def event(finish: str | None = None) -> str:
    return "data: " + json.dumps({"choices": [{"text": "a", "finish_reason": finish}]}) + "\n\n"


FAILED = 'data: {"error": {"message": "cut"}}\n\n'
DONE = "data: [DONE]\n\n"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Fake

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self._answer(self.server.status, self.server.stream)

    def do_GET(self) -> None:
        self._answer(self.server.status, "{}")

    def _answer(self, status: int, body: str) -> None:
        self.send_response(status)
        # As long as the whole would be: a stream that ends before has been cut.
        self.send_header("content-length", str(len(body) + self.server.missing))
        self.end_headers()
        self.wfile.write(body.encode())
        self.close_connection = bool(self.server.missing)

    def log_message(self, *_: Any) -> None:
        """Quiet."""


class Fake(ThreadingHTTPServer):
    """Answers every stream with the same text."""

    stream, status, missing = "", 200, 0

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"


@contextmanager
def fake(stream: str = "", *, missing: int = 0) -> Iterator[Fake]:
    with Fake() as server:
        server.stream, server.missing = stream, missing
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("text", "missing", "outcome"),
    [
        (event() + event("length") + DONE, 0, COMPLETE),
        (event() + DONE, 0, CUT),  # an end without a reason is none
        (event() + event("length"), 0, CUT),
        (event() + FAILED, 0, ERROR),
        (event() + FAILED + DONE, 0, ERROR),  # as vLLM ends a stream that broke
        (event() + FAILED, 100, ERROR),
        (event(), 100, CUT),
        ("", 0, CUT),
    ],
)
def test_the_end_of_a_stream_is_told(text: str, missing: int, outcome: str) -> None:
    with fake(text, missing=missing) as server, Streams(server.url, 2) as streams:
        ended = streams.ended(10)
    assert outcomes(ended) == f"2 {outcome}"


def test_a_refused_stream_is_told_with_its_status() -> None:
    with fake() as server:
        server.status = 503
        with Streams(server.url, 1) as streams:
            assert outcomes(streams.ended(10)) == "1 refused 503"


def test_a_poller_finds_the_first_answer_after_a_moment() -> None:
    with fake() as server, Poller(f"{server.url}/readyz") as poller:
        assert poller.first(not_200, 0) is None
        changed = time.monotonic()
        server.status = 503
        found = poller.wait_first(not_200, changed, 10)
    assert found is not None
    assert 0 <= found < 5
    assert poller.first(not_200, time.monotonic()) is None


def test_only_limits_are_stretched_on_a_slow_machine() -> None:
    measured = Measured()
    measured.within("slow", 1.5, 1.0)
    measured.within("hung", None, 1.0)
    measured.claim("wrong", False, 42)
    measured.claim("right", True, 42)
    assert measured.failed() == [
        "slow within 1 s (seen: 1.5)",
        "hung within 1 s (seen: None)",
        "wrong (seen: 42)",
    ]
    assert measured.failed(2.0) == ["hung within 1 s (seen: None)", "wrong (seen: 42)"]


def test_the_readme_has_every_fault() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    told = [int(number) for number in re.findall(r"^\| (\d+)\. \|", readme, re.MULTILINE)]
    assert told == sorted(row.number for row in ROWS)
