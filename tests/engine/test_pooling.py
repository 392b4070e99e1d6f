"""A pooling model is warmed up by embeddings, a Unix socket is as good as a port, and the gateway
is told the truth all through the life."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from gateway import Gateway, running_gateway
from harness import worker

pytestmark = [pytest.mark.engine, pytest.mark.untimed]


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    with running_gateway() as serving:
        yield serving


def test_a_pooling_model_on_a_unix_socket_beats_to_its_gateway(
    model: str, tmp_path: Path, gateway: Gateway
) -> None:
    uds = str(tmp_path / "main.sock")
    flags = ["--runner", "pooling", "--convert", "embed", "--uds", uds, "--worker-id", "w1"]
    flags += ["--gateway-address", gateway.address]
    with worker("--model-path", model, "--served-model-name", "demo", *flags) as serving:
        serving.wait_for_state("READY")
        assert "embed" in serving.get("/lifecycle/engine").json()["tasks"]
        with httpx.Client(transport=httpx.HTTPTransport(uds=uds), base_url="http://x") as client:
            body = {"model": "demo", "input": "Hello"}
            assert client.post("/v1/embeddings", json=body, timeout=60).status_code == 200
        serving.signal()
        assert serving.wait() == 0
    assert not Path(uds).exists()
    assert gateway.states("demo") == ["initializing", "ready", "terminating"]
    first = gateway.beats[0]
    assert first["worker_id"] == "w1"
    assert first["model_name"] == "demo"
    assert first["model_path"] == model
    assert first["backend"] == "vllm"
