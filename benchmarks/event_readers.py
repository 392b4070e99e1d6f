"""What 100 readers of `/lifecycle/events` cost, half of which never read. Linux, CPU engine.

    .venv/bin/python benchmarks/event_readers.py [--readers 100] [--rounds 8] [--model DIR]

Rounds with and without the readers take turns on one worker, because a shared machine's speed
drifts; printed is the median ratio of their throughput. In the middle of each round the engine is
put to sleep and woken, by which two transitions are made, the first under full traffic: how long
after its request that was, and how much later the slowest reader that reads had each. Have nothing
else running.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
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
from servers import STREAMS, Command, demo_model, our_command, serving, throughput

TOKEN = "benchmark"
AUTH = {"Authorization": f"Bearer {TOKEN}"}
READY_TIMEOUT_S = 120.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--readers", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--model", type=Path, help="default: a demo model made on the spot")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        model = args.model or demo_model(Path(scratch) / "demo")
        with serving(our_command(str(model), "--control-token", TOKEN)) as ours:
            _compare(ours, args.readers, args.rounds)


def _compare(ours: Command, readers: int, rounds: int) -> None:
    pairs = []
    for number in range(rounds + 1):  # the first one warms up
        without = asyncio.run(_round(ours))
        with _readers(ours, readers) as live:
            loaded = asyncio.run(_round(ours))
            time.sleep(0.5)  # the last event's way to the readers
        loaded.arrived_s = live.arrived_s
        if number:
            pairs.append((loaded, without))
            print(f"round {number}: with readers {loaded}; without {without}", flush=True)
    ratio = statistics.median(a.tokens_per_s / b.tokens_per_s for a, b in pairs)
    late = max(_late_s(loaded) for loaded, _ in pairs)
    took = [max(max(run.took_s) for run in side) for side in zip(*pairs, strict=True)]
    print(f"tokens/s with {readers} readers, half of them stalled: ratio {ratio:.3f}")
    print(f"transition after its request, worst: {took[0]:.3f} s with, {took[1]:.3f} s without")
    print(f"event at the slowest reader, worst: {1000 * late:.1f} ms after its transition")


@dataclass
class _Round:
    """What one round showed: `took_s` and `at_s` have an entry for each transition."""

    tokens_per_s: float = 0.0
    took_s: list[float] = field(default_factory=list)
    at_s: dict[int, float] = field(default_factory=dict)
    arrived_s: dict[int, list[float]] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.tokens_per_s:.0f} tokens/s"


def _late_s(run: _Round) -> float:
    return max(max(run.arrived_s[seq]) - at_s for seq, at_s in run.at_s.items())


async def _round(ours: Command) -> _Round:
    assert ours.lifecycle is not None
    run = _Round(tokens_per_s=await throughput(ours.port))
    async with httpx.AsyncClient(base_url=ours.lifecycle, headers=AUTH, timeout=60) as client:
        before = (await client.get(ours.lifecycle)).json()["seq"]
        async with _traffic(ours.port):
            asked = time.time()
            await client.post("/engine/sleep?level=0")
            await client.post("/engine/wake")
        deadline = time.monotonic() + READY_TIMEOUT_S
        while not (await client.get(ours.lifecycle)).json()["ready"]:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)
        history = (await client.get(f"/history?after={before}")).json()["transitions"]
    for transition in history:
        run.at_s[transition["seq"]] = datetime.fromisoformat(transition["at"]).timestamp()
    run.took_s.append(run.at_s[before + 1] - asked)
    return run


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
    """In a process of their own: they must not share the clients' interpreter."""
    assert ours.lifecycle is not None
    here, there = multiprocessing.Pipe()
    process = multiprocessing.Process(target=_read, args=(ours.lifecycle, count, there))
    process.start()
    assert here.recv() == "connected"
    live = _Live()
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
    arrived: dict[int, list[float]] = {}
    live = [await asyncio.open_connection(host, port) for _ in range(count - len(stalled))]
    tasks = [asyncio.create_task(_follow(reader, arrived)) for reader, _ in live]
    for _, writer in live:
        writer.write(request)
    told.send("connected")
    await asyncio.to_thread(told.recv)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    told.send(arrived)
    for _, writer in live:
        writer.close()
    for sock in stalled:
        sock.close()


def _stall(host: str, port: int, request: bytes) -> socket.socket:
    """Asks, and reads nothing of the answer; a small buffer fills soon."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
    sock.connect((host, port))
    sock.sendall(request)
    return sock


async def _follow(reader: asyncio.StreamReader, arrived: dict[int, list[float]]) -> None:
    while line := await reader.readline():
        now = time.time()
        if line.startswith(b"data: "):
            document = json.loads(line.removeprefix(b"data: "))
            if document["event"] == "transition":
                arrived.setdefault(document["seq"], []).append(now)


if __name__ == "__main__":
    main()
