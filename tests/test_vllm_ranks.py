"""vLLM's ranks, by a client and statistics as vLLM 0.32 has them."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client import REGISTRY, Gauge
from prometheus_client import Counter as PrometheusCounter

from ichat_lifecycle.adapters.vllm_ranks import EngineRanks, metrics
from ichat_lifecycle.errors import EngineNotUp

TOKENS, RUNNING = "vllm:generation_tokens", "vllm:num_requests_running"


class Core:
    """DPLBAsyncMPClient as far as it matters here."""

    def __init__(self, *ranks: int) -> None:
        self.core_engines = [rank.to_bytes(2, "little") for rank in ranks]
        self.engine_inflight: Counter[bytes] = Counter()
        self.asked: list[tuple[Any, ...]] = []

    async def _call_utility_async(self, method: str, *args: Any, engine: bytes) -> Any:
        self.asked.append((engine, method, *args))
        return method == "is_sleeping" and engine == self.core_engines[-1]


class Client:
    def __init__(self, core: Any) -> None:
        self.engine_core = core
        self.asked: list[str] = []

    async def is_sleeping(self) -> bool:
        self.asked.append("is_sleeping")
        return True

    async def collective_rpc(self, method: str) -> None:
        self.asked.append(method)


@pytest.fixture
def statistics() -> Iterator[tuple[PrometheusCounter, Gauge]]:
    labels = ("model_name", "engine")
    found = PrometheusCounter(TOKENS, "tokens", labels), Gauge(RUNNING, "running", labels)
    try:
        yield found
    finally:
        for metric in found:
            REGISTRY.unregister(metric)


def test_each_rank_moves_by_itself(statistics: tuple[PrometheusCounter, Gauge]) -> None:
    tokens, _ = statistics
    ranks = EngineRanks(Client(Core(0, 1)))
    for rank in ("0", "1"):
        tokens.labels("m", rank).inc(0)
    before = {rank: ranks.progress(rank) for rank in ranks.numbers}
    tokens.labels("m", "0").inc(5)
    after = {rank: ranks.progress(rank) for rank in ranks.numbers}
    assert [before[rank] == after[rank] for rank in (0, 1)] == [False, True]


def test_one_rank_has_the_counters_of_whatever_label(
    statistics: tuple[PrometheusCounter, Gauge],
) -> None:
    """An external load balancer gives the only engine of this process a higher number."""
    tokens, _ = statistics
    ranks = EngineRanks(Client(Core(3)))
    assert ranks.numbers == (0,)
    tokens.labels("m", "3").inc(5)
    before = ranks.progress(0)
    tokens.labels("m", "3").inc(5)
    assert ranks.progress(0) != before
    assert metrics((f"{TOKENS}_total",))[f"{TOKENS}_total"] == 10


def test_without_statistics_nothing_is_reported() -> None:
    assert EngineRanks(Client(Core(0, 1))).progress(0) is None


def test_a_rank_works_by_what_was_sent_to_it(
    statistics: tuple[PrometheusCounter, Gauge],
) -> None:
    """The gauges of a rank that hangs are what they were before a request was sent to it."""
    _, running = statistics
    core = Core(0, 1)
    ranks = EngineRanks(Client(core))
    for rank in ("0", "1"):
        running.labels("m", rank).set(0)
    assert not any(ranks.works(rank, 7) for rank in ranks.numbers)
    core.engine_inflight[core.core_engines[1]] += 1
    assert [ranks.works(rank, 7) for rank in ranks.numbers] == [False, True]
    core.engine_inflight.clear()
    running.labels("m", "0").set(2)
    assert [ranks.works(rank, 7) for rank in ranks.numbers] == [True, False]


@pytest.mark.parametrize("in_flight", [0, 3])
def test_what_is_in_flight_counts_where_nothing_is_known_of_a_rank(in_flight: int) -> None:
    core = Core(0, 1)
    del core.engine_inflight
    ranks = EngineRanks(Client(core))
    assert [ranks.works(rank, in_flight) for rank in ranks.numbers] == [in_flight > 0] * 2
    assert EngineRanks(Client(Core(0))).works(0, in_flight) is (in_flight > 0)


def test_each_rank_is_asked_by_itself() -> None:
    core = Core(0, 1)
    client = Client(core)
    ranks = EngineRanks(client)

    async def ask() -> list[bool]:
        await ranks.check_workers(1)
        return [await ranks.is_sleeping(rank) for rank in ranks.numbers]

    assert asyncio.run(ask()) == [False, True]
    assert client.asked == []
    assert core.asked[0] == (b"\1\0", "collective_rpc", "check_health", None, (), None)
    assert [engine for engine, *_ in core.asked[1:]] == [b"\0\0", b"\1\0"]


@pytest.mark.parametrize("ranks", [(0,), (0, 1)])
@pytest.mark.parametrize("ask", ["is_sleeping", "check_workers"])
def test_a_question_that_zeromq_cancels_is_an_engine_that_went_away(
    ranks: tuple[int, ...], ask: str
) -> None:
    """It would pass for a cancellation of who asks."""

    async def cancelled(*args: Any, **more: Any) -> None:
        raise asyncio.CancelledError

    core = Core(*ranks)
    client = Client(core)
    for place, name in (
        (core, "_call_utility_async"),
        (client, "is_sleeping"),
        (client, "collective_rpc"),
    ):
        setattr(place, name, cancelled)
    with pytest.raises(EngineNotUp):
        asyncio.run(getattr(EngineRanks(client), ask)(ranks[-1]))


@pytest.mark.parametrize("core", [None, object(), Core(), Core(0)])
def test_a_client_that_shows_no_ranks_is_one(core: Any) -> None:
    client = Client(core)
    ranks = EngineRanks(client)
    assert (ranks.numbers, ranks.several) == ((0,), False)

    async def ask() -> bool:
        await ranks.check_workers(0)
        return await ranks.is_sleeping(0)

    assert asyncio.run(ask()) is True
    assert client.asked == ["check_health", "is_sleeping"]
