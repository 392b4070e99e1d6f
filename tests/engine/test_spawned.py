"""An engine whose processes are all spawned, as on a GPU: they share our process group."""

from __future__ import annotations

import os
import signal

import httpx
import pytest
from faults.measure import sockets_left
from harness import Worker, living_in, wait_for, worker

pytestmark = [pytest.mark.engine, pytest.mark.untimed]

SPAWN = {"VLLM_WORKER_MULTIPROC_METHOD": "spawn"}


@pytest.mark.parametrize("moment", ["loading", "READY"])
def test_kill_9_of_the_worker_itself_leaves_nothing_behind(model: str, moment: str) -> None:
    """No process, and no socket."""
    with worker("--model-path", model, **SPAWN) as serving:
        if moment == "READY":
            serving.wait_for_state("READY")
        # Ours, the guardian, the resource tracker, EngineCore, and its worker.
        wait_for(lambda: len(living_in(serving.directory)) >= 5, "all of the engine's processes")
        serving.process.kill()
        serving.process.wait()
        wait_for(lambda: not living_in(serving.directory), "nothing is left", 5)
        assert not sockets_left(serving)
        assert not list(serving.temporary.glob("ichat-*"))


def test_ctrl_c_lets_a_spawned_engine_finish_what_runs(model: str) -> None:
    with worker("--model-path", model, "--served-model-name", "demo", **SPAWN) as serving:
        serving.wait_for_state("READY")
        group = serving.process.pid
        assert os.getpgid(serving.engine_pids("EngineCore")[0].pid) == group
        assert interrupted_stream(serving, group) == "data: [DONE]"
        assert serving.wait() == 0


def interrupted_stream(serving: Worker, group: int) -> str:
    """The last line of a stream during which Ctrl-C goes to the whole group."""
    body = {"model": "demo", "prompt": "Hello", "max_tokens": 300, "ignore_eos": True}
    url = serving.main + "/v1/completions"
    with httpx.stream("POST", url, json={**body, "stream": True}, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        os.killpg(group, signal.SIGINT)
        return [line for line in lines if line][-1]
