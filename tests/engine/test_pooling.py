"""A pooling model is warmed up by embeddings, a Unix socket is as good as a port, and the gateway
is told the truth all through the life."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from harness import worker

pytestmark = pytest.mark.engine


class Gateway(ThreadingHTTPServer):
    """Keeps every beat that it is sent."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Beats)
        self.beats: list[dict[str, Any]] = []


class _Beats(BaseHTTPRequestHandler):
    server: Gateway

    def do_POST(self) -> None:
        assert self.path == "/v1/workers/heartbeat"
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.beats.append(json.loads(body))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    with Gateway() as serving:
        thread = threading.Thread(target=serving.serve_forever)
        thread.start()
        yield serving
        serving.shutdown()
        thread.join()


def test_a_pooling_model_on_a_unix_socket_beats_to_its_gateway(
    model: str, tmp_path: Path, gateway: Gateway
) -> None:
    uds = str(tmp_path / "main.sock")
    flags = ["--runner", "pooling", "--convert", "embed", "--uds", uds, "--worker-id", "w1"]
    flags += ["--gateway-address", f"127.0.0.1:{gateway.server_port}"]
    with worker("--model-path", model, "--served-model-name", "demo", *flags) as serving:
        serving.wait_for_state("READY")
        assert "embed" in serving.get("/lifecycle/engine").json()["tasks"]
        with httpx.Client(transport=httpx.HTTPTransport(uds=uds), base_url="http://x") as client:
            body = {"model": "demo", "input": "Hello"}
            assert client.post("/v1/embeddings", json=body, timeout=60).status_code == 200
        serving.signal()
        assert serving.wait() == 0
    assert not Path(uds).exists()
    states = [beat["state"] for beat in gateway.beats]
    assert sorted(set(states), key=states.index) == ["initializing", "ready", "terminating"]
    first = gateway.beats[0]
    assert first["worker_id"] == "w1"
    assert first["model_name"] == "demo"
    assert first["model_path"] == model
    assert first["backend"] == "vllm"
