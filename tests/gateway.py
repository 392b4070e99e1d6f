"""A Gateway that keeps to its documented contract, for whoever sends it heartbeats."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PATH = "/v1/workers/heartbeat"


class Gateway(ThreadingHTTPServer):
    """Keeps every beat that it is sent.

    Attributes:
        owners: which worker has a model name; another one that registers for it gets 409.
        silent: set while it takes beats and never answers.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Beats)
        self.beats: list[dict[str, Any]] = []
        self.owners: dict[str, str] = {}
        self.silent = threading.Event()
        self.closing = threading.Event()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server_port}"

    def states(self, model: str) -> list[str]:
        """What was said of a model, without repetitions."""
        said = [beat["state"] for beat in self.beats if beat["model_name"] == model]
        return sorted(set(said), key=said.index)


class _Beats(BaseHTTPRequestHandler):
    server: Gateway

    def do_POST(self) -> None:
        assert self.path == PATH
        beat = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.beats.append(beat)
        if self.server.silent.is_set():
            self.server.closing.wait()
            return
        owner = self.server.owners.setdefault(beat["model_name"], beat["worker_id"])
        self.send_response(200 if owner == beat["worker_id"] else 409)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Quiet."""


@contextlib.contextmanager
def running_gateway() -> Iterator[Gateway]:
    with Gateway() as gateway:
        thread = threading.Thread(target=gateway.serve_forever)
        thread.start()
        try:
            yield gateway
        finally:
            gateway.closing.set()
            gateway.shutdown()
            thread.join()
