"""Native code that crashes in the engine, and native code that would, if nobody helped it."""

from __future__ import annotations

import signal

import httpx
import pytest
from harness import worker

pytestmark = [pytest.mark.engine, pytest.mark.untimed]


def test_a_worker_that_crashes_says_how_and_a_tiny_model_in_bfloat16_does_not(model: str) -> None:
    """A worker is EngineCore's child, not ours: what ended it, only its last words tell.

    In bfloat16 vLLM computes with AMX where there is AMX, and ended with SIGILL.
    """
    flags = ("--dtype", "bfloat16", "--served-model-name", "demo", "--set", "restart.max=0")
    with worker("--model-path", model, *flags) as serving:
        serving.wait_for_state("READY")
        body = {"model": "demo", "prompt": "Hello", "max_tokens": 4}
        answer = httpx.post(serving.main + "/v1/completions", json=body, timeout=60)
        assert answer.status_code == httpx.codes.OK
        (engine_worker,) = serving.engine_pids("::Worker")
        engine_worker.send_signal(signal.SIGSEGV)
        assert serving.wait() == 75
        line = serving.log.read_text().splitlines()[-1]
        assert "; cause: Fatal Python error: Segmentation fault; hint: " in line
