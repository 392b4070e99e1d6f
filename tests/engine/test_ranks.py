"""Two data-parallel ranks on one machine: one that hangs is found and named while the other serves.

The same engine then shows two things more: requests in the background are waited for by a drain,
and what a paused engine is asked for passes.
"""

from __future__ import annotations

import contextlib
import json
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from harness import Worker, worker

pytestmark = [pytest.mark.engine, pytest.mark.untimed]

RANKS = (0, 1)
BODY = {"model": "demo", "prompt": "Hello", "max_tokens": 64, "ignore_eos": True}
LONG = {
    **{"model": "demo", "input": "Hello", "max_output_tokens": 400, "ignore_eos": True},
    **{"background": True, "store": True},
}
CHECK = {"method": "check_health"}  # of vLLM's workers
# vLLM's administrative routes, and its store of responses, without which none is in the background.
ROUTES = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ENABLE_RESPONSES_API_STORE": "1"}


@contextlib.contextmanager
def traffic(serving: Worker, *ranks: int) -> Iterator[None]:
    """Requests to these ranks, one after the other each, whatever they get."""
    enough = threading.Event()

    def ask(rank: int) -> None:
        headers = {"X-data-parallel-rank": str(rank)}
        with httpx.Client(base_url=serving.main, headers=headers, timeout=90) as client:
            while not enough.is_set():
                with contextlib.suppress(httpx.HTTPError):
                    client.post("/v1/completions", json=BODY)

    threads = [threading.Thread(target=ask, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        enough.set()
        for thread in threads:
            thread.join()


def worker_of(serving: Worker, rank: int) -> Any:
    (core,) = serving.engine_pids(f"EngineCore_DP{rank}")
    return next(p for p in core.children() if "Worker" in " ".join(p.cmdline()))


def reason(serving: Worker) -> dict[str, Any]:
    return serving.get("/lifecycle").json()["reason"] or {}


def assert_a_paused_engine_can_be_administered(serving: Worker) -> None:
    """vLLM counts one that is paused as asleep: clients are refused, and who paused it is not."""
    with httpx.Client(base_url=serving.main, timeout=60) as client:
        assert client.post("/pause").is_success
        serving.wait_for_state("DEGRADED", 60)
        assert reason(serving)["code"] == "asleep"
        assert client.post("/v1/completions", json=BODY).status_code == 503
        for path, body in (("/reset_prefix_cache", {}), ("/collective_rpc", CHECK)):
            answer = client.post(path, json=body)
            assert answer.status_code == 200, answer.text
        assert client.post("/resume").is_success
        serving.wait_for_state("READY", 60)
        assert client.post("/v1/completions", json=BODY).status_code == 200


def assert_a_stop_waits_for_the_background(serving: Worker) -> None:
    """Nothing else is in flight; and its answer can be asked for meanwhile."""
    with httpx.Client(base_url=serving.main, timeout=60) as client:
        asked = client.post("/v1/responses", json=LONG)
        assert (asked.status_code, asked.json()["status"]) == (200, "queued"), asked.text
        serving.signal()
        serving.wait_for_state("STOPPING", 60)
        held = client.get(f"/v1/responses/{asked.json()['id']}")
        assert held.status_code == 200
        assert held.json()["status"] in {"queued", "in_progress"}
    assert serving.wait() == 0
    lines = [json.loads(line) for line in serving.log.read_text().splitlines() if line[:1] == "{"]
    (end,) = (line for line in lines if line["event"] == "ended")
    assert (end["completed"], end["cut"]) == (1, 0)


@pytest.mark.timeout(600)  # two starts, two hangs, a pause and a stop: 180 s on a busy machine
def test_a_rank_that_hangs_is_found_and_named_under_traffic_and_idle(model: str) -> None:
    flags = ["--served-model-name", "demo", "--data-parallel-size", "2"]
    settings = ["--set", "health.give_up_after=60"]
    with worker("--model-path", model, *flags, *settings, **ROUTES) as serving:
        serving.wait_for_state("READY")
        for busy, hung in ((RANKS, 1), ((0,), 1)):  # under traffic to both, and idle
            victim = worker_of(serving, hung)
            with traffic(serving, *busy):
                time.sleep(2)  # both are in the middle of their work
                victim.send_signal(signal.SIGSTOP)
                try:
                    serving.wait_for_state("DEGRADED", 60)
                    found = reason(serving)
                finally:
                    victim.send_signal(signal.SIGCONT)
            assert "rank 1 of the engine" in found["message"], found
            verdicts = serving.get("/lifecycle/history").json()["verdicts"]
            assert any(v["kind"] == "hung" and v["ranks"] == [hung] for v in verdicts)
            serving.wait_for_state("READY", 60)
        (coordinator,) = serving.engine_pids("DPCoordinator")
        coordinator.kill()  # vLLM itself does not notice
        serving.wait_for_state("DEGRADED", 60)
        assert "VLLM_DP_Coordinator" in reason(serving)["message"]
        serving.wait_for_state("READY")
        assert_a_paused_engine_can_be_administered(serving)
        assert_a_stop_waits_for_the_background(serving)
