"""SIGTERM and Ctrl-C at any moment of a start: exit code 0, and no process left."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from harness import ENGINE_ENVIRONMENT, ENGINE_FLAGS, Worker, free_port, living_in, wait_for, worker

pytestmark = pytest.mark.engine


def engine_process_is_there(started: Worker) -> bool:
    return bool(started.engine_pids("EngineCore"))


def worker_process_is_there(started: Worker) -> bool:
    return len(started.engine_pids("multiprocessing.spawn")) > 0


MOMENTS: dict[str, Callable[[Worker], bool]] = {
    "importing vLLM": lambda started: started.phase() == "importing",
    "EngineCore starting": engine_process_is_there,
    "its worker starting": worker_process_is_there,
    "building the app": lambda started: started.state() in ("ENGINE_UP", "SERVING", "READY"),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_sigterm_at_any_moment_of_a_start_is_a_clean_end(model: str, moment: str) -> None:
    with worker("--model-path", model) as started:
        wait_for(lambda: MOMENTS[moment](started), moment)
        started.signal()
        assert started.wait() == 0


def test_a_second_signal_ends_it_at_once(model: str) -> None:
    with worker("--model-path", model) as started:
        wait_for(lambda: worker_process_is_there(started), "an engine process")
        started.signal()
        started.signal(signal.SIGINT)
        assert started.wait() == 0


def test_ctrl_c_lets_a_spawned_engine_finish_what_runs(model: str) -> None:
    """It goes to the whole process group, and a spawned EngineCore shares ours."""
    with worker(
        *("--model-path", model, "--served-model-name", "demo"),
        VLLM_WORKER_MULTIPROC_METHOD="spawn",
    ) as serving:
        serving.wait_for_state("READY")
        group = serving.process.pid
        assert os.getpgid(serving.engine_pids("EngineCore")[0].pid) == group
        body = {"model": "demo", "prompt": "Hello", "max_tokens": 300, "ignore_eos": True}
        url = serving.main + "/v1/completions"
        with httpx.stream("POST", url, json={**body, "stream": True}, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            os.killpg(group, signal.SIGINT)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert serving.wait() == 0


def test_ctrl_c_in_a_terminal_ends_a_load_that_is_shown_live(model: str, tmp_path: Path) -> None:
    parent = pty.openpty()
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "ichat_lifecycle", "serve", "--model-path", model),
            *("--port", str(free_port()), "--control-port", "0", *ENGINE_FLAGS),
        ],
        cwd=tmp_path,
        env={**os.environ, **ENGINE_ENVIRONMENT, "TERM": "xterm"},
        stdin=parent[1],
        stdout=parent[1],
        stderr=parent[1],
        start_new_session=True,
        preexec_fn=_take_terminal,  # noqa: PLW1509  # this process has no other threads here
    )
    os.close(parent[1])
    seen = b""

    def shows(text: bytes) -> bool:
        nonlocal seen
        seen += os.read(parent[0], 65536)
        return text in seen

    try:
        wait_for(lambda: shows(b"PARSED: importing"), "the live view of the import")
        wait_for(lambda: shows(b"BOUND: "), "the live view of the load")
        os.write(parent[0], b"\x03")
        wait_for(lambda: process.poll() is not None or not shows(b"\0"), "the end", 60)
        assert process.wait(60) == 0
        wait_for(lambda: not living_in(tmp_path), "nothing is left", 5)
    finally:
        for left in living_in(tmp_path):
            left.kill()
        process.wait()
        os.close(parent[0])


def _take_terminal() -> None:
    """Makes the pseudo-terminal the controlling one, so that Ctrl-C becomes a SIGINT."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
