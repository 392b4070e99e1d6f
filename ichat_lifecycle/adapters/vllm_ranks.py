"""The data-parallel ranks of a vLLM engine: one EngineCore each, behind one client.

vLLM's client asks all of them at once and gathers the answers, and its statistics are labelled by
rank. Here each rank is asked by itself, through the client's own way to a single EngineCore, which
0.27 to 0.33 share. A client without it, or with one EngineCore, is one rank.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping
from typing import Any, TypeVar

from ichat_lifecycle.errors import EngineNotUp

T = TypeVar("T")

# A long prefill is many steps without a token: only the cache's fill shows them.
MOVING = (
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:iteration_tokens_total_count",
    "vllm:kv_cache_usage_perc",
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
)
QUEUES = ("vllm:num_requests_running", "vllm:num_requests_waiting")
_RANK_LABEL = "engine"


class EngineRanks:
    """The ranks of an engine that has started.

    Args:
        client: vLLM's AsyncLLM.
    """

    def __init__(self, client: Any) -> None:
        self._client = client
        self._core = getattr(client, "engine_core", None)
        self._identities = _identities(self._core)
        # In the client's order, as vLLM counts in it where a request names its rank.
        self.numbers: tuple[int, ...] = tuple(self._identities) or (0,)

    @property
    def several(self) -> bool:
        """Whether there is more than one rank."""
        return len(self.numbers) > 1

    async def is_sleeping(self, rank: int) -> bool:
        """One round trip to this rank's EngineCore."""
        if not self.several:
            return bool(await asked(self._client.is_sleeping()))
        return bool(await self._ask(rank, "is_sleeping"))

    async def check_workers(self, rank: int) -> None:
        """Have each worker process of this rank answer; never returns while one is stuck."""
        if not self.several:
            await asked(self._client.collective_rpc("check_health"))
        else:
            await self._ask(rank, "collective_rpc", "check_health", None, (), None)

    async def _ask(self, rank: int, method: str, *args: Any) -> Any:
        assert self._core is not None, "several ranks are known by it"
        call = self._core._call_utility_async
        return await asked(call(method, *args, engine=self._identities[rank]))

    def progress(self, rank: int) -> Any:
        """vLLM's own counters and gauges of this rank that move while it works; see MOVING."""
        return tuple(self._samples(MOVING, rank).items()) or None

    def works(self, rank: int, in_flight: int) -> bool:
        """Whether this rank has requests.

        Args:
            in_flight: requests of all ranks, which count where nothing is known of a single one.
        """
        if not self.several:
            return in_flight > 0
        # The client's own count: what was sent to a rank, and has not come back. A rank that hangs
        # reports no more, so that its gauges stay what they were.
        routed: Mapping[bytes, int] | None = getattr(self._core, "engine_inflight", None)
        if routed is not None and routed.get(self._identities[rank], 0) > 0:
            return True
        queues = self._samples(QUEUES, rank)
        return any(queues.values()) if queues else in_flight > 0

    def _samples(self, names: tuple[str, ...], rank: int) -> dict[str, float]:
        return metrics(names, rank if self.several else None)


def _identities(core: Any) -> dict[int, bytes]:
    """How the client addresses each rank; empty where there is one, or that is not known."""
    found = getattr(core, "core_engines", None) or ()
    if len(found) < 2 or not hasattr(core, "_call_utility_async"):  # noqa: PLR2004  # "several"
        return {}
    return {int.from_bytes(identity, "little"): identity for identity in found}


async def asked(question: Awaitable[T]) -> T:
    """The engine's answer.

    Raises:
        EngineNotUp: vLLM has closed its sockets, as it does once the engine is dead: ZeroMQ cancels
            what waits on one, which would pass for a cancellation of the caller.
    """
    task = asyncio.current_task()
    before = task.cancelling() if task is not None else 0
    try:
        return await question
    except asyncio.CancelledError:
        if task is not None and task.cancelling() > before:
            raise
        raise EngineNotUp("the engine went away before it answered") from None


def metrics(names: tuple[str, ...], rank: int | None = None) -> dict[str, float]:
    """vLLM's samples by name, of one rank or summed over all; empty without statistics."""
    from prometheus_client import REGISTRY

    found: dict[str, float] = {}
    for metric in REGISTRY.restricted_registry(names).collect():
        for sample in metric.samples:
            if rank is None or sample.labels.get(_RANK_LABEL) == str(rank):
                found[sample.name] = found.get(sample.name, 0.0) + sample.value
    return found
