"""What a client has the engine print is text, in whatever form the engine prints."""

from __future__ import annotations

import json
import signal
import subprocess
from typing import Any

import httpx
import pytest
from harness import Worker, wait_for, worker

from ichat_lifecycle.adapters.load_phases import LoadPhases

pytestmark = [pytest.mark.engine, pytest.mark.untimed]

TOKEN = "a-control-token"
CAPTURING = "Capturing CUDA graphs: 50%"  # as a load has it; none does on a CPU


def ask_for(serving: Worker, pattern: str) -> None:
    """A chat whose answer has to fit a pattern that xgrammar does not take, and prints."""
    schema = {"type": "object", "properties": {"x": {"type": "string", "pattern": pattern}}}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    body = {
        "model": "demo",
        "messages": [{"role": "user", "content": "Hello"}],
        "max_tokens": 8,
        "response_format": wanted,
    }
    httpx.post(serving.main + "/v1/chat/completions", json=body, timeout=120)


def phases_of(serving: Worker) -> list[str]:
    """Those of the last load."""
    return [p["phase"] for p in serving.get("/lifecycle").json()["progress"]["phases"]]


def lines_of(serving: Worker) -> list[dict[str, Any]]:
    """Its log, of which each line is an event in our form, whoever has logged it.

    But for what C libraries print past Python: xgrammar, which looks at schemas in this process.
    """
    text = serving.log.read_text()
    lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    assert [line for line in lines if not {"event", "logger"} <= line.keys()] == []
    return lines


def test_what_a_client_has_printed_steers_nothing(model: str) -> None:
    """It kills nobody, begins no phase, and is not why the engine died; nor does a wrong adapter.

    All of that with the engine's lines in JSON, whose levels and phases are read as those of text.
    """
    flags = ("--served-model-name", "demo", "--enable-lora", "--max-lora-rank", "8")
    logging = ("--logging-config.formatter", "json", "--control-token", TOKEN)
    environment = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_LOGGING_PREFIX": "[n1] "}
    bystander = subprocess.Popen(["sleep", "600"], process_group=0)
    try:
        with worker("--model-path", model, *flags, *logging, **environment) as serving:
            serving.wait_for_state("READY")
            phases = phases_of(serving)
            assert "loading_weights" in phases
            for words in (f"ichat-lifecycle: engine process {bystander.pid}", CAPTURING):
                ask_for(serving, f"(?=a)x {words}")
            wait_for(lambda: CAPTURING in serving.log.read_text(), "the client's text")
            assert phases_of(serving) == phases
            # A client's mistake, whose exception the engine prints and survives.
            adapter = {"lora_name": "x", "lora_path": "/no/such/adapter"}
            loaded = httpx.post(serving.main + "/v1/load_lora_adapter", json=adapter, timeout=120)
            assert loaded.status_code >= 400
            (engine_worker,) = serving.engine_pids("::Worker")
            engine_worker.send_signal(signal.SIGSEGV)
            serving.wait_for_state("BOUND")
            serving.wait_for_state("READY")
            assert "capturing_graphs" not in phases_of(serving)
            assert bystander.poll() is None
            faults = [line for line in lines_of(serving) if line["event"] == "fault"]
            assert faults[0]["root_cause"].startswith("Fatal Python error: Segmentation fault")
            headers = {"Authorization": f"Bearer {TOKEN}"}
            httpx.post(serving.control + "/lifecycle/stop", headers=headers, timeout=20)
            assert serving.wait() == 0
            assert bystander.poll() is None
            lines = lines_of(serving)
            engine = [line for line in lines if line["logger"].startswith("engine.")]
            assert {line["logger"] for line in engine} == {"engine.vllm"}
            named = [line for line in engine if line.get("process") == "EngineCore"]
            assert {"info", "error"} <= {line["level"] for line in named}
            assert "(?=a)x ichat-lifecycle: engine process" in serving.log.read_text()
            # Were it read, it would be a phase.
            assert any(
                LoadPhases().read(line["event"]) for line in engine if CAPTURING in line["event"]
            )
    finally:
        bystander.kill()
        bystander.wait()
