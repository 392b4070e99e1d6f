"""A READY worker on the real engine, and what happens to its engine."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from harness import START_TIMEOUT_S, Worker, living_in, wait_for, worker

pytestmark = pytest.mark.engine

# Faster than the defaults, so that the suite is; the ratios are the same.
HEALTH = ("--set", "health.interval=1", "--set", "health.timeout=2")
NO_RESTART = (*HEALTH, "--set", "restart.max=0")


@pytest.fixture(scope="module")
def serving(model: str) -> Iterator[Worker]:
    with worker("--model-path", model, "--served-model-name", "demo", *NO_RESTART) as started:
        started.wait_for_state("READY")
        yield started


def core_of(serving: Worker) -> psutil.Process:
    return serving.engine_pids("EngineCore")[0]


def ask(serving: Worker) -> int:
    body = {"model": "demo", "prompt": "Hello", "max_tokens": 4}
    return httpx.post(serving.main + "/v1/completions", json=body, timeout=60).status_code


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


def test_a_killed_engine_ends_in_75_with_the_cause_and_nothing_left(serving: Worker) -> None:
    core_of(serving).kill()
    assert serving.wait() == 75
    last = serving.log.read_text().splitlines()[-1]
    assert last.startswith("ichat-lifecycle: error: EngineCore")
    assert "by signal 9" in last


def test_a_hung_engine_ends_in_75_even_if_it_never_answers_again(model: str) -> None:
    with worker("--model-path", model, *NO_RESTART, "--set", "health.give_up_after=2") as serving:
        serving.wait_for_state("READY")
        core_of(serving).send_signal(signal.SIGSTOP)
        assert serving.wait() == 75
        assert "the engine hangs: no answer" in serving.log.read_text().splitlines()[-1]


def test_a_new_engine_in_the_same_process_keeps_the_socket(model: str) -> None:
    with worker("--model-path", model, "--served-model-name", "demo", *HEALTH) as serving:
        serving.wait_for_state("READY")
        old = core_of(serving).pid
        core_of(serving).kill()
        refused = 0

        def ready_again() -> bool:
            nonlocal refused
            try:
                httpx.get(serving.main + "/health", timeout=20)
            except httpx.ConnectError:
                refused += 1
            document = serving.get("/lifecycle").json()
            return bool(document["ready"] and document["restarts"] == 1)

        wait_for(ready_again, "READY with a new engine")
        assert refused == 0
        assert core_of(serving).pid != old
        assert ask(serving) == 200
        serving.signal()
        assert serving.wait() == 0


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("moment", ["loading", "READY"])
def test_kill_9_of_the_worker_itself_leaves_nothing_behind(
    model: str, moment: str, method: str, tmp_path: Path
) -> None:
    """No process, and no socket; also with an engine that is spawned, as on a GPU."""
    chosen = {"VLLM_WORKER_MULTIPROC_METHOD": "spawn"} if method == "spawn" else {}
    with worker("--model-path", model, TMPDIR=str(tmp_path), **chosen) as serving:
        if moment == "READY":
            serving.wait_for_state("READY")
        # Ours, the guardian, the resource tracker, EngineCore, and its worker.
        wait_for(lambda: len(living_in(serving.directory)) >= 5, "all of the engine's processes")
        serving.process.kill()
        serving.process.wait()
        wait_for(lambda: not living_in(serving.directory), "nothing is left", 5)
        assert not [path for path in tmp_path.rglob("*") if path.is_socket()]
        assert not list(tmp_path.glob("ichat-*"))


def test_a_load_that_stalls_ends_in_70_with_the_phase_and_nothing_left(model: str) -> None:
    with worker("--model-path", model, "--set", "start.stall_timeout=8") as serving:
        wait_for(lambda: serving.engine_pids("EngineCore"), "EngineCore")
        core_of(serving).send_signal(signal.SIGSTOP)
        assert serving.wait(START_TIMEOUT_S) == 70
        last = serving.log.read_text().splitlines()[-1]
        assert "the load has stalled in the phase " in last  # the worker may get further
        assert "EngineCore" in last
        assert "stopped by a signal" in last
