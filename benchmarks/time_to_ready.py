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
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
from servers import (
    Command,
    demo_model,
    our_command,
    process,
    serving,
    throughput,
    vllm_command,
    wait_until_ready,
)

ROUNDS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--model", type=Path, help="default: a demo model made on the spot")
    parser.add_argument("--starts", type=int, default=0, help="also start ours N times in a row")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        model = args.model or demo_model(Path(scratch) / "demo")
        if args.runs:
            _compare(str(model), args.runs)
        if args.starts:
            _start_in_a_row(str(model), args.starts)


def _compare(model: str, runs: int) -> None:
    theirs: list[Run] = []
    ours: list[Run] = []
    _measure(vllm_command(model))  # fills the caches of both: bytecode, page cache, vLLM's own
    for number in range(1, runs + 1):
        theirs.append(_measure(vllm_command(model)))
        ours.append(_measure(our_command(model)))
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
    _comparethroughput(model)


def _comparethroughput(model: str) -> None:
    with serving(vllm_command(model)) as theirs, serving(our_command(model)) as ours:
        pairs = [
            (asyncio.run(throughput(ours.port)), asyncio.run(throughput(theirs.port)))
            for _ in range(ROUNDS + 1)
        ][1:]  # the first round warms up
    ratio = statistics.median(a / b for a, b in pairs)
    a, b = (statistics.median(side) for side in zip(*pairs, strict=True))
    print(f"tokens/s: ours {a:.0f}, vLLM {b:.0f}, ratio {ratio:.3f} (median of {ROUNDS} pairs)")


def _start_in_a_row(model: str, starts: int) -> None:
    times = []
    for number in range(1, starts + 1):
        run = _measure(our_command(model))
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


def _measure(command: Command) -> Run:
    run = Run()
    with tempfile.TemporaryFile() as log, process(command.argv, log) as server:
        began = time.monotonic()
        with _asking(command.lifecycle, run):
            wait_until_ready(command.ready, server, began)
            run.ready_s = time.monotonic() - began
        asked = time.monotonic()
        server.send_signal(signal.SIGTERM)
        run.code = server.wait(120)
        run.stop_s = time.monotonic() - asked
    return run


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


if __name__ == "__main__":
    main()
