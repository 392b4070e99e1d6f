"""An engine that is silent for a while, and the traces of such a life in a collector.

What else may happen to an engine: see test_fault_matrix.py.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator

import httpx
import psutil
import pytest
from collector import Collector, collecting, parts, root
from harness import Worker, wait_for, worker

pytestmark = pytest.mark.engine

# Faster than the defaults, so that the suite is; the ratios are the same.
HEALTH = ("--set", "health.interval=1", "--set", "health.timeout=2")


def core_of(serving: Worker) -> psutil.Process:
    return serving.engine_pids("EngineCore")[0]


def ask(serving: Worker, **more: object) -> int:
    body = {"model": "demo", "prompt": "Hello", "max_tokens": 4, **more}
    return httpx.post(serving.main + "/v1/completions", json=body, timeout=60).status_code


@pytest.fixture(scope="module")
def collector() -> Iterator[tuple[Collector, str]]:
    with collecting() as running:
        yield running


@pytest.fixture(scope="module")
def serving(model: str, collector: tuple[Collector, str]) -> Iterator[Worker]:
    flags = ("--served-model-name", "demo", "--otlp-traces-endpoint", collector[1], *HEALTH)
    with worker("--model-path", model, *flags) as started:
        started.wait_for_state("READY")
        yield started


def test_code_that_is_compiled_when_a_request_first_needs_it_is_waited_for(serving: Worker) -> None:
    """vLLM 0.32 has what counts ranks compiled for the first request with logprobs."""
    assert ask(serving, logprobs=3) == 200
    history = serving.get("/lifecycle/history").json()
    compilers = {v["compiling"] for v in history["verdicts"] if v["kind"] == "busy"}
    assert compilers - {""}, json.dumps(history["verdicts"], indent=1)
    assert history["transitions"][-1]["trigger"] == "become_ready"


def test_a_stopped_engine_is_noticed_and_one_that_goes_on_recovers_without_a_restart(
    serving: Worker,
) -> None:
    core = core_of(serving)
    core.send_signal(signal.SIGSTOP)
    try:
        serving.wait_for_state("DEGRADED", 60)
        document = serving.get("/lifecycle").json()
        assert document["reason"]["code"] == "engine_unresponsive"
        assert serving.get("/readyz").status_code == 503
        assert serving.get("/livez").status_code == 200
        assert httpx.get(serving.main + "/health").status_code == 503
        assert ask(serving) == 503
    finally:
        core.send_signal(signal.SIGCONT)
    serving.wait_for_state("READY", 60)
    assert ask(serving) == 200
    assert core_of(serving).pid == core.pid
    triggers = [t["trigger"] for t in serving.get("/lifecycle/history").json()["transitions"]]
    assert triggers[-2:] == ["degrade", "recover"]
    assert serving.get("/lifecycle").json()["restarts"] == 0


def test_a_start_a_recovery_and_a_stop_are_a_trace_each(
    serving: Worker, collector: tuple[Collector, str]
) -> None:
    """Last: it ends the worker. gRPC is loaded when the next engine is forked."""
    kept, _ = collector
    wait_for(lambda: "lifecycle start" in kept.traces(), "the trace of the start")
    wait_for(lambda: any(s.name == "llm_request" for s in kept.spans), "vLLM's own trace")
    kept.forget("lifecycle recovery")  # that of the test before
    core_of(serving).kill()
    wait_for(lambda: "lifecycle recovery" in kept.traces(), "the trace of the recovery")
    serving.wait_for_state("READY")
    assert ask(serving) == 200
    serving.signal()
    assert serving.wait() == 0
    wait_for(lambda: "lifecycle stop" in kept.traces(), "the trace of the stop")
    traces = kept.traces()
    load = ["importing", "configuring", "starting_engine", "loading_weights", "warm_up"]
    assert [part for part in parts(traces["lifecycle start"]) if part in load] == load
    assert {"starting_engine", "loading_weights"} <= set(parts(traces["lifecycle recovery"]))
    assert "drain" in parts(traces["lifecycle stop"])
    for spans in traces.values():
        whole = root(spans)
        assert {span.trace_id for span in spans} == {whole.trace_id}
        for span in spans:
            assert whole.start_time_unix_nano <= span.start_time_unix_nano
            assert span.end_time_unix_nano <= whole.end_time_unix_nano
