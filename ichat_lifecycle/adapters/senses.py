"""The sources of the watchdog's signs, and what counts where a source fails.

An engine with data parallelism has one EngineCore for each rank. Counters summed over them move as
long as one of them works, so each sign is asked of each rank by itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import structlog

log = structlog.get_logger("ichat_lifecycle.watchdog")


T = TypeVar("T")


def _one_rank() -> tuple[int, ...]:
    return (0,)


def _no_request(before_s: float) -> str:
    return ""


@dataclass(frozen=True, slots=True)
class Senses:
    """Where the signs come from. Ranks are numbers that `ranks` has returned.

    Attributes:
        is_sleeping: the RPC, to one rank.
        progress: anything that changes while a rank works; None where it does not report.
        in_flight: how many requests are under way, over all ranks.
        ready: whether a request would pass; only then a token is asked for.
        token: has one rank generate one token.
        compiling: what compiles within the engine now; "" for nothing. Asked of a silent engine.
        ranks: the ranks of the engine that has started.
        works: whether a rank has requests of its own; by default whether any are in flight.
        admin_request: the administrative request that is under way, and began before a time on the
            event loop's clock; "" for none.
    """

    is_sleeping: Callable[[int], Awaitable[bool]]
    progress: Callable[[int], Any]
    in_flight: Callable[[], int]
    ready: Callable[[], bool]
    token: Callable[[int], Awaitable[None]]
    compiling: Callable[[], Awaitable[str]]
    ranks: Callable[[], tuple[int, ...]] = _one_rank
    works: Callable[[int], bool] | None = None
    admin_request: Callable[[float], str] = _no_request


class SafeSenses:
    """The same, for a watch that must not end at once: a source that raises reports nothing.

    Each one's first failure in a row is logged. One that fails for good ends the watch, which is a
    fault: without it a hang may not be found. What the RPC and the token raise is a sign itself and
    comes through, and a source of excuses that fails excuses nothing.

    Args:
        patience_s: for how long a source may fail without a break.
    """

    def __init__(self, senses: Senses, patience_s: float) -> None:
        self._senses = senses
        self._patience_s = patience_s
        self._failing: dict[str, float] = {}  # since when, on the loop's clock

    def ranks(self) -> tuple[int, ...]:
        return self._value("ranks", self._senses.ranks, default=_one_rank()) or _one_rank()

    def progress(self, rank: int) -> Any:
        return self._value("progress", self._senses.progress, rank, default=None)

    def in_flight(self) -> int:
        return self._value("in_flight", self._senses.in_flight, default=0)

    def ready(self) -> bool:
        return self._value("ready", self._senses.ready, default=False)

    def works(self, rank: int) -> bool:
        works = self._senses.works
        if works is None:
            return self.in_flight() > 0
        return self._value("works", works, rank, default=False)

    def admin_request(self, before_s: float) -> str:
        ask = self._senses.admin_request
        return self._value("admin_request", ask, before_s, default="", vital=False)

    async def compiling(self) -> str:
        try:
            found = await self._senses.compiling()
        except Exception as error:
            self._note("compiling", error)
            return ""
        self._failing.pop("compiling", None)
        return found

    async def is_sleeping(self, rank: int) -> bool:
        return await self._senses.is_sleeping(rank)

    async def token(self, rank: int) -> None:
        await self._senses.token(rank)

    def _value(
        self, name: str, ask: Callable[..., T], *args: Any, default: T, vital: bool = True
    ) -> T:
        try:
            value = ask(*args)
        except Exception as error:
            if self._note(name, error) >= self._patience_s and vital:
                raise
            return default
        self._failing.pop(name, None)
        return value

    def _note(self, name: str, error: Exception) -> float:
        """For how long it has failed by now, in seconds."""
        now_s = asyncio.get_running_loop().time()
        if name not in self._failing:
            self._failing[name] = now_s
            log.warning("sign_failed", sign=name, error=repr(error))
        return now_s - self._failing[name]
