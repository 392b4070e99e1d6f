"""What 100 readers of `/lifecycle/events` cost, half of which never read. Linux, CPU engine.

    .venv/bin/python benchmarks/event_readers.py [--readers 100] [--rounds 12] [--model DIR]

Rounds with and without the readers take turns on one worker, and in who is first, because a shared
machine's speed drifts. Printed is the median ratio of their throughput, and between which two it is
with 95 % (bootstrap): an engine on the CPU takes both cores, single rounds differ by a third here,
and few of them tell nothing. So the CPU time that the worker's own process took is printed, too:
its HTTP server, its control plane and its lifecycle, without the engine's processes.

Then the engine is put to sleep under full traffic and woken, with the readers and without: how long
after its request each transition was, and how much later the slowest reader that reads had it.
Have nothing else running.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import random
import socket
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from multiprocessing.connection import Connection
from pathlib import Path

import httpx
import psutil
from servers import STREAMS, Command, demo_model, our_command, serving, throughput

TOKEN = "benchmark"
AUTH = {"Authorization": f"Bearer {TOKEN}"}
READY_TIMEOUT_S = 120.0
TRANSITIONS = 5
RESAMPLES = 2000
# Readers that have had nothing for so long have had all there is.
QUIET_S = 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--readers", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--model", type=Path, help="default: a demo model made on the spot")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        model = args.model or demo_model(Path(scratch) / "demo")
        with serving(our_command(str(model), "--control-token", TOKEN)) as ours:
            worker = psutil.Process(httpx.get(_lifecycle(ours)).json()["pid"])
            _compare_traffic(ours, worker, args.readers, args.rounds)
            _compare_transitions(ours, args.readers)


def _lifecycle(ours: Command) -> str:
    assert ours.lifecycle is not None
    return ours.lifecycle


# Traffic ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Round:
    tokens_per_s: float
    cpu_s: float

    def __str__(self) -> str:
        return f"{self.tokens_per_s:.0f} tokens/s, {self.cpu_s:.2f} s of CPU"


def _compare_traffic(ours: Command, worker: psutil.Process, readers: int, rounds: int) -> None:
    _round(ours, worker)  # warms up
    pairs = []
    for number in range(1, rounds + 1):
        if number % 2:
            without, loaded = _round(ours, worker), _round(ours, worker, readers)
        else:
            loaded, without = _round(ours, worker, readers), _round(ours, worker)
        pairs.append((loaded, without))
        print(f"round {number}: with readers {loaded}; without {without}", flush=True)
    ratios = [loaded.tokens_per_s / without.tokens_per_s for loaded, without in pairs]
    low, high = _between(ratios)
    costs = [sum(run.cpu_s for run in side) / rounds for side in zip(*pairs, strict=True)]
    print(
        f"tokens/s with {readers} readers, half of them stalled: "
        f"ratio {statistics.median(ratios):.3f} ({low:.3f} to {high:.3f})"
    )
    print(f"the worker's own CPU time per round: {costs[0]:.3f} s with, {costs[1]:.3f} s without")


def _round(ours: Command, worker: psutil.Process, readers: int = 0) -> _Round:
    with _readers(ours, readers):
        before = worker.cpu_times()
        speed = asyncio.run(throughput(ours.port))
        after = worker.cpu_times()
    return _Round(speed, after.user + after.system - before.user - before.system)


def _between(ratios: list[float]) -> tuple[float, float]:
    """Where their median is with 95 %, by drawing from them again and again."""
    draw = random.Random(0)
    medians = (statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(RESAMPLES))
    fortieths = statistics.quantiles(medians, n=40)
    return fortieths[0], fortieths[-1]


# Transitions --------------------------------------------------------------------------------------


def _compare_transitions(ours: Command, readers: int) -> None:
    took: dict[int, list[float]] = {0: [], readers: []}
    late = []
    for count in (0, readers) * TRANSITIONS:
        with _readers(ours, count) as live:
            asked, at_s = asyncio.run(_sleep_and_wake(ours))
            time.sleep(QUIET_S)  # the last event's way to the readers
        took[count].append(min(at_s.values()) - asked)
        late += [max(live.arrived_s[seq]) - at for seq, at in at_s.items() if count]
    worst = [f"{1000 * max(took[count]):.1f} ms" for count in (readers, 0)]
    print(f"transition after its request, worst: {worst[0]} with, {worst[1]} without")
    print(f"event at the slowest reader, worst: {1000 * max(late):.1f} ms after its transition")


async def _sleep_and_wake(ours: Command) -> tuple[float, dict[int, float]]:
    """When it was asked to sleep, and when each transition was; until it is READY again."""
    url = _lifecycle(ours)
    async with httpx.AsyncClient(base_url=url, headers=AUTH, timeout=60) as client:
        before = (await client.get(url)).json()["seq"]
        async with _traffic(ours.port):
            asked = time.time()
            await client.post("/engine/sleep?level=0")
            await client.post("/engine/wake")
        deadline = time.monotonic() + READY_TIMEOUT_S
        while not (await client.get(url)).json()["ready"]:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)
        history = (await client.get(f"/history?after={before}")).json()["transitions"]
    return asked, {t["seq"]: datetime.fromisoformat(t["at"]).timestamp() for t in history}


@contextlib.asynccontextmanager
async def _traffic(port: int) -> AsyncIterator[None]:
    """Streams that have all begun; they end by themselves, within the drain."""
    body = {"model": "demo", "prompt": "Hello", "max_tokens": 400, "ignore_eos": True}
    async with (
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=120) as client,
        contextlib.AsyncExitStack() as stack,
    ):
        answers = []
        for _ in range(STREAMS):
            stream = client.stream("POST", "/v1/completions", json=body | {"stream": True})
            answers.append((await stack.enter_async_context(stream)).aiter_lines())
        reading = [asyncio.create_task(_drain(lines)) for lines in answers]
        yield
        await asyncio.gather(*reading)


async def _drain(lines: AsyncIterator[str]) -> None:
    async for _ in lines:
        pass


# Readers ------------------------------------------------------------------------------------------


@dataclass
class _Live:
    """When each reader that reads had each transition."""

    arrived_s: dict[int, list[float]] = field(default_factory=dict)


@contextlib.contextmanager
def _readers(ours: Command, count: int) -> Iterator[_Live]:
    """So many, with all that has happened by now behind them.

    In a process of their own: they must not share the clients' interpreter.
    """
    live = _Live()
    if not count:
        yield live
        return
    here, there = multiprocessing.Pipe()
    process = multiprocessing.Process(target=_read, args=(_lifecycle(ours), count, there))
    process.start()
    assert here.recv() == "listening"
    try:
        yield live
    finally:
        here.send("end")
        live.arrived_s = here.recv()
        process.join()


def _read(lifecycle: str, count: int, told: Connection) -> None:
    asyncio.run(_read_all(httpx.URL(lifecycle), count, told))


async def _read_all(url: httpx.URL, count: int, told: Connection) -> None:
    host, port = url.host, url.port or 80
    request = f"GET {url.path}/events HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
    stalled = [_stall(host, port, request) for _ in range(count // 2)]
    heard = _Heard()
    live = [await asyncio.open_connection(host, port) for _ in range(count - len(stalled))]
    tasks = [asyncio.create_task(_follow(reader, heard)) for reader, _ in live]
    for _, writer in live:
        writer.write(request)
    while time.time() - heard.last_s < QUIET_S:
        await asyncio.sleep(QUIET_S / 10)
    told.send("listening")
    await asyncio.to_thread(told.recv)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    told.send(heard.arrived_s)
    for _, writer in live:
        writer.close()
    for sock in stalled:
        sock.close()


@dataclass
class _Heard(_Live):
    last_s: float = field(default_factory=time.time)


def _stall(host: str, port: int, request: bytes) -> socket.socket:
    """Asks, and reads nothing of the answer; a small buffer fills soon."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
    sock.connect((host, port))
    sock.sendall(request)
    return sock


async def _follow(reader: asyncio.StreamReader, heard: _Heard) -> None:
    while line := await reader.readline():
        heard.last_s = now = time.time()
        if line.startswith(b"data: "):
            document = json.loads(line.removeprefix(b"data: "))
            if document["event"] == "transition":
                heard.arrived_s.setdefault(document["seq"], []).append(now)


if __name__ == "__main__":
    main()
