"""Time to READY beside vLLM's own server, and how the start looks from outside. Linux, CPU engine.

    .venv/bin/python benchmarks/time_to_ready.py [--runs 3] [--model DIR]

Each run starts vLLM's own server and then ours, and asks both every 50 ms until they answer 200:
vLLM's `/health`, our `/readyz`, which includes two warm-up requests. Prints the medians of the time
to ready and of the time to stop, with their ratios (ours / vLLM's), and for ours the waits of
`GET /lifecycle` during the starts. Then, with both up at once, the ratio of their throughput, round
by round, because a shared machine's speed drifts. Have nothing else running.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
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
FLAGS = ["--max-model-len", "512", "--enforce-eager", "--dtype", "bfloat16"]
START_TIMEOUT_S = 300.0
TOKENS, STREAMS, ROUNDS = 400, 8, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--model", type=Path, help="default: a demo model made on the spot")
    parser.add_argument("--starts", type=int, default=0, help="also start ours N times in a row")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        model = args.model or _demo_model(Path(scratch) / "demo")
        if args.runs:
            _compare(str(model), args.runs)
        if args.starts:
            _start_in_a_row(str(model), args.starts)


def _demo_model(directory: Path) -> Path:
    from ichat_lifecycle.demo_model import make_demo_model

    make_demo_model(directory)
    return directory


def _compare(model: str, runs: int) -> None:
    theirs: list[Run] = []
    ours: list[Run] = []
    _measure(_vllm_command(model))  # fills the caches of both: bytecode, page cache, vLLM's own
    for number in range(1, runs + 1):
        theirs.append(_measure(_vllm_command(model)))
        ours.append(_measure(_our_command(model)))
        print(f"run {number}: vLLM {theirs[-1]}; ours {ours[-1]}", flush=True)
    for what in ("ready_s", "stop_s"):
        a = statistics.median(getattr(run, what) for run in ours)
        b = statistics.median(getattr(run, what) for run in theirs)
        print(f"{what}: ours {a:.2f}, vLLM {b:.2f}, ratio {a / b:.3f} (medians of {runs})")
    waits = sorted(wait for run in ours for wait in run.control_waits_s)
    print(
        f"GET /lifecycle during the starts: {len(waits)} asked, "
        f"p50 {1000 * waits[len(waits) // 2]:.1f} ms, "
        f"p99 {1000 * waits[int(len(waits) * 0.99)]:.1f} ms, worst {1000 * waits[-1]:.1f} ms, "
        f"{sum(run.control_failures for run in ours)} failed"
    )
    _compare_throughput(model)


def _compare_throughput(model: str) -> None:
    with _serving(_vllm_command(model)) as theirs, _serving(_our_command(model)) as ours:
        pairs = [
            (asyncio.run(_throughput(ours.port)), asyncio.run(_throughput(theirs.port)))
            for _ in range(ROUNDS + 1)
        ][1:]  # the first round warms up
    ratio = statistics.median(a / b for a, b in pairs)
    a, b = (statistics.median(side) for side in zip(*pairs, strict=True))
    print(f"tokens/s: ours {a:.0f}, vLLM {b:.0f}, ratio {ratio:.3f} (median of {ROUNDS} pairs)")


def _start_in_a_row(model: str, starts: int) -> None:
    times = []
    for number in range(1, starts + 1):
        run = _measure(_our_command(model))
        times.append(run.ready_s)
        print(f"start {number}: ready after {run.ready_s:.1f} s, exit code {run.code}", flush=True)
    print(f"{starts} starts: median {statistics.median(times):.1f} s, worst {max(times):.1f} s")


class Run:
    """What one start showed."""

    def __init__(self) -> None:
        self.ready_s = self.stop_s = 0.0
        self.code: int | None = None
        self.control_waits_s: list[float] = []
        self.control_failures = 0

    def __str__(self) -> str:
        return f"ready {self.ready_s:.1f} s, stopped in {self.stop_s:.2f} s with code {self.code}"


@dataclass(frozen=True)
class Command:
    """How a server is started, and where it says what. `lifecycle` is ours only."""

    argv: list[str]
    port: int
    ready: str
    lifecycle: str | None = None


def _vllm_command(model: str) -> Command:
    new = importlib.util.find_spec("vllm.entrypoints.launchers") is not None
    module = "launchers.api_server.entry" if new else "openai.api_server"
    port = _free_port()
    argv = [sys.executable, "-m", f"vllm.entrypoints.{module}", "--model", model]
    argv += ["--served-model-name", "demo", "--host", "127.0.0.1", "--port", str(port), *FLAGS]
    return Command(argv, port, f"http://127.0.0.1:{port}/health")


def _our_command(model: str) -> Command:
    port, control = _free_port(), _free_port()
    argv = [sys.executable, "-m", "ichat_lifecycle", "serve", "--model-path", model]
    argv += ["--served-model-name", "demo", "--host", "127.0.0.1", "--port", str(port), *FLAGS]
    argv += ["--control-port", str(control)]
    url = f"http://127.0.0.1:{control}"
    return Command(argv, port, f"{url}/readyz", f"{url}/lifecycle")


def _measure(command: Command) -> Run:
    run = Run()
    with tempfile.TemporaryFile() as log, _process(command.argv, log) as process:
        began = time.monotonic()
        with _asking(command.lifecycle, run):
            _wait_until_ready(command.ready, process, began)
            run.ready_s = time.monotonic() - began
        asked = time.monotonic()
        process.send_signal(signal.SIGTERM)
        run.code = process.wait(120)
        run.stop_s = time.monotonic() - asked
    return run


@contextlib.contextmanager
def _serving(command: Command) -> Iterator[Command]:
    with tempfile.TemporaryFile() as log, _process(command.argv, log) as process:
        _wait_until_ready(command.ready, process, time.monotonic())
        yield command
        process.send_signal(signal.SIGTERM)
        process.wait(120)


@contextlib.contextmanager
def _process(command: list[str], log: object) -> Iterator[subprocess.Popen[bytes]]:
    environment = {**os.environ, **ENVIRONMENT}
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)  # type: ignore[call-overload]
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _wait_until_ready(url: str, process: subprocess.Popen[bytes], began: float) -> None:
    with httpx.Client(timeout=20) as client:
        while time.monotonic() - began < START_TIMEOUT_S:
            if process.poll() is not None:
                raise SystemExit(f"ended with {process.returncode} before it was ready")
            with contextlib.suppress(httpx.TransportError):
                if client.get(url).status_code == httpx.codes.OK:
                    return
            time.sleep(0.05)
    raise SystemExit(f"not ready within {START_TIMEOUT_S:g} s")


@contextlib.contextmanager
def _asking(url: str | None, run: Run) -> Iterator[None]:
    """Asks every 50 ms, from the first answer on."""
    ended = threading.Event()

    def ask() -> None:
        with httpx.Client(timeout=20) as client:
            while url is not None and not ended.wait(0.05):
                began = time.monotonic()
                try:
                    client.get(url)
                except httpx.TransportError:
                    run.control_failures += bool(run.control_waits_s)
                    continue
                run.control_waits_s.append(time.monotonic() - began)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


async def _throughput(port: int) -> float:
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


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


if __name__ == "__main__":
    main()
