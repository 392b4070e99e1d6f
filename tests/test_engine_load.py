"""A load as `VllmEngine` leads it, with a vLLM that is a fake: its arguments, and a download."""

from __future__ import annotations

import argparse
import asyncio
import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from on_loop import eventually
from structlog.testing import capture_logs
from waiting import DEADLINE_S

from ichat_lifecycle.adapters import download_watch
from ichat_lifecycle.adapters.load_phases import DOWNLOADING, STARTING_ENGINE
from ichat_lifecycle.adapters.vllm_engine import VllmEngine
from ichat_lifecycle.adapters.vllm_layout import Layout
from ichat_lifecycle.arguments import ParsedArguments
from ichat_lifecycle.backend import Options, VLLMBackend

MB = 10**6


class Client:
    errored = False

    async def reset_mm_cache(self) -> None: ...

    async def get_supported_tasks(self) -> tuple[str, ...]:
        return ("generate",)

    def shutdown(self, timeout: float) -> None: ...


class Vllm:
    """All of vLLM that a load asks: it ends once `loaded` is set."""

    usage_context = SimpleNamespace(OPENAI_API_SERVER="server")
    platform = SimpleNamespace(is_cpu=lambda: False)
    propagate_flash_late_interaction = None
    enable_log_requests = aggregate_engine_logging = disable_log_stats = False

    def __init__(self) -> None:
        self.loaded = threading.Event()
        self.modules: list[list[str]] = []
        self.engine_args = self.engine_client = self

    def from_cli_args(self, namespace: argparse.Namespace) -> Vllm:
        """Writes into the namespace, as vLLM does."""
        self.modules.append(list(namespace.lora_modules))
        namespace.lora_modules.append("image")
        return self

    def create_engine_config(self, usage_context: str) -> Vllm:
        return self

    def from_vllm_config(self, **_: Any) -> Client:
        assert self.loaded.wait(DEADLINE_S)
        return Client()

    @property
    def layout(self) -> Layout:
        return cast(Layout, self)


class Repository:
    """A model's directory in the cache, as huggingface_hub fills it."""

    def __init__(self, cache: Path) -> None:
        self.blob = cache / "models--org--name" / "blobs" / "abc.incomplete"
        self.blob.parent.mkdir(parents=True)
        index = cache / "models--org--name" / "snapshots" / "1" / "model.safetensors.index.json"
        index.parent.mkdir(parents=True)
        index.write_text(json.dumps({"metadata": {"total_size": 10 * MB}}))

    def holds(self, size: int) -> None:
        """From one moment to the next: a look would see half of what is being written."""
        new = self.blob.parent.parent / "new"
        new.write_bytes(b"x" * size)
        new.replace(self.blob)

    def whole(self) -> None:
        self.blob.rename(self.blob.with_suffix(""))


def test_each_load_has_arguments_of_its_own() -> None:
    """A worker's engine asks for them: else the second one would meet what the first has added."""
    backend = VLLMBackend(argparse.Namespace(), ["m"], options=Options(defer_parsing=True))
    parsed = argparse.Namespace(model="", lora_modules=["mine"])
    backend._arguments.parsed = ParsedArguments(parsed, None, {})
    backend._arguments.layout = (vllm := Vllm()).layout
    vllm.loaded.set()

    async def script() -> None:
        for _ in range(2):
            await backend.engine.start(lambda fault: None, lambda phase, fraction: None)
            assert backend.engine.namespace.lora_modules == ["mine", "image"]
            await backend.engine.release(now=True)

    asyncio.run(script())
    assert vllm.modules == [["mine"], ["mine"]]


def test_a_download_is_a_phase_of_the_load_for_as_long_as_it_lasts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM may print nothing of what comes after it; and what another process downloads into the
    same directory after the load is not ours to tell."""
    monkeypatch.setattr(download_watch, "INTERVAL_S", 0.01)
    arguments = argparse.Namespace(model="org/name", download_dir=str(tmp_path), lora_modules=[])
    vllm, repository = Vllm(), Repository(tmp_path)
    engine = VllmEngine(lambda: arguments, lambda: vllm.layout, lambda: None)
    seen: list[tuple[str, float | None]] = []

    async def comes(phase: str, fraction: float | None = None) -> None:
        await eventually(lambda: seen[-1:] == [(phase, fraction)])

    async def script() -> None:
        loading = asyncio.create_task(
            engine.start(lambda fault: None, lambda *phase: seen.append(phase))
        )
        await comes(STARTING_ENGINE)
        for size in (MB, 4 * MB):
            repository.holds(size)
            await comes(DOWNLOADING, size / (10 * MB))
            assert engine.download is not None
            assert engine.download.bytes == size
        repository.whole()
        await comes(STARTING_ENGINE)
        assert engine.download is None
        repository.holds(MB)
        await comes(DOWNLOADING, 0.5)
        vllm.loaded.set()
        await loading
        assert engine.download is None
        assert [t for t in asyncio.all_tasks() if t.get_name() == "download-watch"] == []
        await engine.release(now=True)

    with capture_logs() as logs:
        asyncio.run(script())
    first = next(log for log in logs if log["event"] == "download")
    assert (first["bytes"], first["total_bytes"]) == (MB, 10 * MB)
