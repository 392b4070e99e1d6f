"""The watchdog: one RPC at a time to the engine's own process, with a deadline.

`/health` only looks at a flag. `is_sleeping()` makes a round trip to EngineCore and costs about a
millisecond; it never resolves if EngineCore dies at the wrong moment, and each unanswered call
leaks a future, so an unanswered probe is kept and waited for, not repeated.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

from ichat_lifecycle.config import Health
from ichat_lifecycle.ports import Verdict, VerdictKind, VerdictReport


class RpcWatchdog:
    """The `Watchdog` port over an RPC that answers whether the engine sleeps.

    Each `timeout` of silence is one miss; an answer, however late, ends the silence.
    """

    def __init__(self, probe: Callable[[], Awaitable[bool]], health: Health) -> None:
        self._probe = probe
        self._health = health
        self._interval_s = health.interval
        self._paced = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def start(self, on_verdict: VerdictReport) -> None:
        self._interval_s = self._health.interval  # not the pace at which the last engine was lost
        self._task = asyncio.create_task(self._watch(on_verdict), name="watchdog")

    def pace(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self._paced.set()

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
            self._task = None

    async def _watch(self, on_verdict: VerdictReport) -> None:
        loop = asyncio.get_running_loop()
        while True:
            began = loop.time()
            await self._probe_once(began, on_verdict)
            # From begin to begin: a slow answer must not delay the next question.
            await self._wait(max(0.0, began + self._interval_s - loop.time()))

    async def _wait(self, seconds: float) -> None:
        self._paced.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._paced.wait()

    async def _probe_once(self, began: float, on_verdict: VerdictReport) -> None:
        loop = asyncio.get_running_loop()
        probe = asyncio.ensure_future(self._probe())
        try:
            while not (await asyncio.wait({probe}, timeout=self._health.timeout))[0]:
                silence = loop.time() - began
                on_verdict(Verdict(VerdictKind.MISSED, None, f"silent for {silence:.1f} s"))
        finally:
            probe.cancel()
            # To stop means that nothing asks any more. Nobody wants its answer or error either.
            await asyncio.gather(probe, return_exceptions=True)
        latency = round(loop.time() - began, 6)
        if probe.cancelled() or probe.exception() is not None:
            error = None if probe.cancelled() else probe.exception()
            on_verdict(Verdict(VerdictKind.MISSED, None, f"probe failed: {error!r}"))
        else:
            kind = VerdictKind.ASLEEP if probe.result() else VerdictKind.HEALTHY
            on_verdict(Verdict(kind, latency))
