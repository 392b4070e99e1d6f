"""What the benchmarks measure: vLLM's own server and ours, on the CPU engine with a demo model."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
FLAGS = ["--max-model-len", "512", "--enforce-eager", "--dtype", "float32"]
START_TIMEOUT_S = 300.0
TOKENS, STREAMS = 400, 8


def demo_model(directory: Path) -> Path:
    from ichat_lifecycle.demo_model import make_demo_model

    make_demo_model(directory)
    return directory


@dataclass(frozen=True)
class Command:
    """How a server is started, and where it says what. `lifecycle` is ours only."""

    argv: list[str]
    port: int
    ready: str
    lifecycle: str | None = None


def vllm_command(model: str) -> Command:
    new = importlib.util.find_spec("vllm.entrypoints.launchers") is not None
    module = "launchers.api_server.entry" if new else "openai.api_server"
    port = free_port()
    argv = [sys.executable, "-m", f"vllm.entrypoints.{module}", "--model", model]
    argv += ["--served-model-name", "demo", "--host", "127.0.0.1", "--port", str(port), *FLAGS]
    return Command(argv, port, f"http://127.0.0.1:{port}/health")


def our_command(model: str, *flags: str) -> Command:
    port, control = free_port(), free_port()
    argv = [sys.executable, "-m", "ichat_lifecycle", "serve", "--model-path", model]
    argv += ["--served-model-name", "demo", "--host", "127.0.0.1", "--port", str(port), *FLAGS]
    argv += ["--control-port", str(control), *flags]
    url = f"http://127.0.0.1:{control}"
    return Command(argv, port, f"{url}/readyz", f"{url}/lifecycle")


@contextlib.contextmanager
def serving(command: Command) -> Iterator[Command]:
    with tempfile.TemporaryFile() as log, process(command.argv, log) as server:
        wait_until_ready(command.ready, server, time.monotonic())
        yield command
        server.send_signal(signal.SIGTERM)
        server.wait(120)


@contextlib.contextmanager
def process(command: list[str], log: object) -> Iterator[subprocess.Popen[bytes]]:
    environment = {**os.environ, **ENVIRONMENT}
    started = subprocess.Popen(command, env=environment, stdout=log, stderr=log)  # type: ignore[call-overload]
    try:
        yield started
    finally:
        if started.poll() is None:
            started.kill()
            started.wait()


def wait_until_ready(url: str, server: subprocess.Popen[bytes], began: float) -> None:
    with httpx.Client(timeout=20) as client:
        while time.monotonic() - began < START_TIMEOUT_S:
            if server.poll() is not None:
                raise SystemExit(f"ended with {server.returncode} before it was ready")
            with contextlib.suppress(httpx.TransportError):
                if client.get(url).status_code == httpx.codes.OK:
                    return
            time.sleep(0.05)
    raise SystemExit(f"not ready within {START_TIMEOUT_S:g} s")


async def throughput(port: int) -> float:
    """Tokens per second of STREAMS greedy completions of TOKENS each."""
    body = {"model": "demo", "prompt": "Hello", "max_tokens": TOKENS, "temperature": 0}
    body["ignore_eos"] = True
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
        began = time.monotonic()
        answers = await asyncio.gather(
            *[client.post("/v1/completions", json=body) for _ in range(STREAMS)]
        )
        took = time.monotonic() - began
    tokens = sum(answer.json()["usage"]["completion_tokens"] for answer in answers)
    return float(tokens / took)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
