"""One worker on the real engine, from its first moment to its last. Run on each supported vLLM."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Any

import httpx
import openai
import pytest
from harness import Worker, wait_for, worker

from ichat_lifecycle.states import State

pytestmark = pytest.mark.engine

API_KEY = "sk-a-secret-of-the-smoke-test"
TOKEN = "the-control-token-of-the-smoke-test"
ORDER = [state.value for state in State]
PROMPT = {"model": "demo", "prompt": "Hello", "max_tokens": 4}
AUTH = {"Authorization": f"Bearer {API_KEY}"}


class Watcher:
    """Asks both ports all the time while a worker starts, and keeps every answer."""

    def __init__(self, watched: Worker) -> None:
        self.watched = watched
        self.states: list[str] = []
        self.control_failures: list[str] = []
        self.main_answers: list[httpx.Response] = []
        self.main_failures: list[str] = []
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=t) for t in (self._ask_control, self._ask_main)]

    def __enter__(self) -> Watcher:
        wait_for(self.watched.state, "the control plane answers")
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def _ask_control(self) -> None:
        with httpx.Client(timeout=20) as client:
            while not self._ended.wait(0.05):
                try:
                    answer = client.get(self.watched.control + "/lifecycle")
                    self.states.append(answer.json()["state"])
                except Exception as error:
                    self.control_failures.append(repr(error))

    def _ask_main(self) -> None:
        # From BOUND on, each time on a new connection.
        while "BOUND" not in self.states and not self._ended.wait(0.02):
            pass
        while not self._ended.wait(0.1):
            try:
                self.main_answers.append(
                    httpx.post(
                        self.watched.main + "/v1/completions",
                        json=PROMPT,
                        headers=AUTH,
                        timeout=60,
                    )
                )
            except Exception as error:
                self.main_failures.append(repr(error))


@pytest.fixture(scope="module")
def started(model: str) -> Iterator[tuple[Worker, Watcher]]:
    flags = ["--model-path", model, "--served-model-name", "demo", "--api-key", API_KEY]
    with worker(*flags, "--control-token", TOKEN) as serving:
        with Watcher(serving) as watcher:
            serving.wait_for_state("READY")
            wait_for(lambda: "READY" in watcher.states, "the watcher sees that, too", 30)
            wait_for(
                lambda: any(a.status_code == 200 for a in watcher.main_answers[-3:]),
                "inference is let in",
                30,
            )
        yield serving, watcher


def test_the_control_plane_answers_all_through_the_start_in_the_tables_order(
    started: tuple[Worker, Watcher],
) -> None:
    _, watcher = started
    assert watcher.control_failures == []
    positions = [ORDER.index(state) for state in watcher.states]
    assert positions == sorted(positions)
    assert {"PARSED", "BOUND", "READY"} <= set(watcher.states)


def test_the_phases_of_the_start_add_up_to_the_time_to_ready(
    started: tuple[Worker, Watcher],
) -> None:
    """Measured from outside, from the process's start on; the engine's own phases among them."""
    serving, _ = started
    phases = serving.get("/lifecycle").json()["progress"]["phases"]
    transitions = serving.get("/lifecycle/history").json()["transitions"]
    (ready,) = (t["at"] for t in transitions if t["trigger"] == "become_ready")
    started_at = time.time() - (time.monotonic() - serving.began)
    took_s = datetime.fromisoformat(ready).timestamp() - started_at
    print({p["phase"]: p["took_s"] for p in phases}, f"READY after {took_s:.2f} s")
    engines = {"configuring", "starting_engine", "loading_weights", "allocating_kv_cache"}
    assert {"importing", "warm_up", *engines} <= {p["phase"] for p in phases}
    assert sum(p["took_s"] for p in phases) == pytest.approx(took_s, rel=0.02)


def test_what_operators_look_at_is_there(started: tuple[Worker, Watcher]) -> None:
    serving, _ = started
    page = serving.get("/")
    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert "READY" in page.text
    assert API_KEY not in page.text
    assert 'ichat_lifecycle_state{state="READY"} 1.0' in serving.get("/metrics").text
    assert "vllm:" in httpx.get(serving.main + "/metrics", headers=AUTH).text
    command = [sys.executable, "-m", "ichat_lifecycle", "status", serving.control]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("demo")


def test_from_bound_on_inference_gets_503_until_ready_and_then_200(
    started: tuple[Worker, Watcher],
) -> None:
    _, watcher = started
    assert watcher.main_failures == []
    statuses = [answer.status_code for answer in watcher.main_answers]
    assert set(statuses) == {503, 200}
    assert statuses == sorted(statuses, reverse=True)
    for refused in (a for a in watcher.main_answers if a.status_code == 503):
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["state"] in refused.json()["error"]["message"]


def test_the_openai_client_is_answered_streamed_and_not(started: tuple[Worker, Watcher]) -> None:
    serving, _ = started
    with openai.OpenAI(base_url=serving.main + "/v1", api_key=API_KEY) as client:
        messages: Any = [{"role": "user", "content": "Hello"}]
        whole = client.chat.completions.create(
            model="demo", messages=messages, max_tokens=6, temperature=0
        )
        with client.chat.completions.create(
            model="demo", messages=messages, max_tokens=6, temperature=0, stream=True
        ) as stream:
            text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert whole.choices[0].message.content == text != ""


def test_lifecycle_says_what_it_has_to(started: tuple[Worker, Watcher], model: str) -> None:
    serving, _ = started
    document = serving.get("/lifecycle").json()
    assert document["state"] == "READY"
    assert document["ready"] is True
    assert document["reason"] is None
    assert document["allowed"] == ["degrade", "stop"]
    assert document["model"] == "demo"
    assert document["pid"] == serving.process.pid
    assert document["arguments"]["model"] == model
    assert document["vllm_version"]
    history = serving.get("/lifecycle/history").json()
    triggers = [t["trigger"] for t in history["transitions"]]
    assert triggers == ["bind", "start_engine", "serve", "become_ready"], json.dumps(
        history, indent=1
    )
    assert [serving.get(p).status_code for p in ("/livez", "/readyz", "/startupz")] == [200] * 3


def test_no_secret_is_shown_anywhere(started: tuple[Worker, Watcher]) -> None:
    serving, _ = started
    pages = [serving.get(p).text for p in ("/lifecycle", "/lifecycle/history", "/lifecycle/engine")]
    log = serving.log.read_text()
    assert "***" in pages[0]
    for text in (*pages, log):
        assert API_KEY not in text
        assert TOKEN not in text


def test_the_read_only_routes_are_on_the_main_port_behind_the_api_key(
    started: tuple[Worker, Watcher],
) -> None:
    serving, _ = started
    for path in ("/lifecycle", "/lifecycle/history", "/livez", "/readyz", "/startupz"):
        assert httpx.get(serving.main + path).status_code == 401
        assert httpx.get(serving.main + path, headers=AUTH).status_code == 200
    assert httpx.post(serving.main + "/lifecycle/stop", headers=AUTH).status_code in (403, 404, 405)


def test_lifecycle_engine_shows_what_vllm_knows(started: tuple[Worker, Watcher]) -> None:
    serving, _ = started
    engine = serving.get("/lifecycle/engine").json()
    assert engine["max_model_len"] == 512
    assert "generate" in engine["tasks"]
    assert engine["kv_cache"]["size_tokens"] > 0
    assert engine["requests"] == {"running": 0, "waiting": 0}
    assert engine["sleeping"] is False
    assert engine["lora_adapters"] == []


def test_commands_need_the_token_and_asleep_is_not_ready(started: tuple[Worker, Watcher]) -> None:
    serving, _ = started
    control = httpx.Client(base_url=serving.control, timeout=90)
    with control:
        assert control.post("/lifecycle/engine/sleep").status_code == 401
        assert serving.state() == "READY"
        control.headers["Authorization"] = f"Bearer {TOKEN}"
        assert control.post("/lifecycle/engine/reset-prefix-cache").is_success
        assert control.post("/lifecycle/engine/sleep").is_success
        asleep = control.get("/lifecycle").json()
        assert (asleep["state"], asleep["reason"]["code"]) == ("DEGRADED", "asleep")
        assert control.get("/lifecycle/engine").json()["sleeping"] is True
        assert control.get("/readyz").status_code == 503
        refused = httpx.post(serving.main + "/v1/completions", json=PROMPT, headers=AUTH)
        assert refused.status_code == 503
        assert control.post("/lifecycle/engine/wake").is_success
        serving.wait_for_state("READY", 60)
    answer = httpx.post(serving.main + "/v1/completions", json=PROMPT, headers=AUTH, timeout=60)
    assert answer.status_code == 200


def test_sigterm_lets_streams_finish_and_leaves_nothing(started: tuple[Worker, Watcher]) -> None:
    serving, _ = started
    long = {**PROMPT, "max_tokens": 400, "stream": True, "ignore_eos": True}
    begun = threading.Barrier(5)

    def stream() -> str:
        with httpx.stream(
            "POST", serving.main + "/v1/completions", json=long, headers=AUTH, timeout=60
        ) as response:
            chunks = response.iter_text()
            first = next(chunks)
            begun.wait(60)
            return first + "".join(chunks)

    with ThreadPoolExecutor(4) as pool:
        streams = [pool.submit(stream) for _ in range(4)]
        begun.wait(60)
        serving.signal()
        texts = [future.result() for future in streams]
    assert serving.wait() == 0
    assert all(text.rstrip().endswith("data: [DONE]") for text in texts)
    assert all('"error"' not in text for text in texts)
