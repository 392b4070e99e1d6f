"""The watchdog: gathers the signs of an engine's life, and says what they mean (see verdicts).

`/health` only looks at a flag. `is_sleeping()` makes a round trip to EngineCore and costs about a
millisecond; it never resolves if EngineCore dies at the wrong moment, and each unanswered call
leaks a future, so an unanswered probe is kept and waited for, not repeated. An engine that has not
moved for a while is asked for a token, too: nothing else shows that its worker process is stuck.
One that compiles is silent as well, and is told from one that hangs by what is seen of its
processes (see compile_watch).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import structlog

from ichat_lifecycle.bounds import error_of, race
from ichat_lifecycle.config import Health
from ichat_lifecycle.ports import Signs, Verdict, VerdictReport
from ichat_lifecycle.verdicts import LOOP_LAG_S, TOLERANCE_S, judge

log = structlog.get_logger("ichat_lifecycle.watchdog")

# How often a silence is looked at, as a part of the timeout: so exactly is the last progress known.
LOOKS = 20

# Requests in flight and no progress for so long are asked about without waiting for the interval.
STANDSTILL_S = 1.0

RPC, TOKEN = "rpc", "token"


@dataclass(frozen=True, slots=True)
class Senses:
    """Where the signs come from.

    Attributes:
        is_sleeping: the RPC.
        progress: anything that changes while the engine works; None where it does not tell.
        in_flight: how many requests are under way.
        ready: whether a request would pass; only then a token is asked for.
        token: has the engine generate one token.
        compiling: what compiles within the engine now; "" for nothing. Asked of a silent engine.
    """

    is_sleeping: Callable[[], Awaitable[bool]]
    progress: Callable[[], Any]
    in_flight: Callable[[], int]
    ready: Callable[[], bool]
    token: Callable[[], Awaitable[None]]
    compiling: Callable[[], Awaitable[str]]


class EngineWatchdog:
    """The `Watchdog` port. One RPC and one token are asked for at a time.

    Each `timeout` of silence without progress is one miss; an answer, however late, ends it.
    """

    def __init__(self, senses: Senses, health: Health) -> None:
        self._senses = senses
        self._health = health
        self._interval_s = health.interval
        self._paced = asyncio.Event()
        self._task: asyncio.Future[Any] | None = None
        self._on_verdict: VerdictReport = lambda verdict: None
        self._open: dict[str, float] = {}  # what has been asked and not answered, and since when
        self._seen: Any = None
        self._moved_s = 0.0  # when progress was seen
        self._progressed = False  # since the last verdict
        self._unblocked_s = 0.0  # when our own loop turned again
        self._token_error = ""  # why the last token failed; logged once
        self._compiled_s = 0.0  # when the engine was last seen to compile

    async def start(self, on_verdict: VerdictReport) -> None:
        self._interval_s = self._health.interval  # not the pace at which the last engine was lost
        self._on_verdict = on_verdict
        self._open.clear()
        self._seen = self._senses.progress()
        self._moved_s = self._now()
        self._task = asyncio.create_task(self._watch(), name="watchdog")

    def pace(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self._paced.set()

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
            self._task = None

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    async def _watch(self) -> None:
        if not self._health.token_interval:
            await self._ask_rpcs()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._ask_rpcs(), name="watchdog-rpc")
            tasks.create_task(self._ask_tokens(), name="watchdog-token")

    # --- the RPC

    async def _ask_rpcs(self) -> None:
        while True:
            began = self._now()
            await self._ask_rpc(began)
            # From begin to begin: a slow answer must not delay the next question.
            await self._wait(max(0.0, began + self._interval_s - self._now()))

    async def _ask_rpc(self, began: float) -> None:
        self._look()
        answer = await self._outwait(RPC, self._senses.is_sleeping())
        took_s = round(self._now() - began, 6)
        if (error := error_of(answer)) is not None:
            self._tell(error=f"probe failed: {error!r}")
        else:
            self._look()
            self._tell(answered_s=took_s, asleep=answer.result())

    async def _wait(self, seconds: float) -> None:
        """Until the next question is due: at once under traffic that has stopped moving."""
        end = self._now() + seconds
        self._paced.clear()
        while self._now() < end - TOLERANCE_S and not self._paced.is_set():
            # Traffic may begin at any time; each look at an idle engine is a wake-up for nothing.
            look_s = STANDSTILL_S if self._senses.in_flight() else self._interval_s / 2
            due = min(end, self._now() + look_s)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(due - self._now()):
                    await self._paced.wait()
            self._mind_lag(due)
            if self._senses.in_flight() and not self._look() and self._stands_still:
                return

    @property
    def _stands_still(self) -> bool:
        return self._now() - self._moved_s >= STANDSTILL_S - TOLERANCE_S

    # --- the token

    async def _ask_tokens(self) -> None:
        while True:
            self._look()
            idle_s = self._now() - self._moved_s
            rest_s = self._health.token_interval - idle_s
            if rest_s > TOLERANCE_S:
                await asyncio.sleep(rest_s)
            elif not self._senses.ready():
                await asyncio.sleep(self._health.interval)
            else:
                await self._ask_token()

    async def _ask_token(self) -> None:
        answer = await self._outwait(TOKEN, self._senses.token())
        if (error := error_of(answer)) is None:
            self._moved_s, self._token_error = self._now(), ""
            return
        # No silence, so it is no miss; and no proof, so it is asked again soon.
        if self._token_error != repr(error):
            self._token_error = repr(error)
            log.warning("token_failed", error=self._token_error)
        await asyncio.sleep(self._health.interval)

    # --- silence

    async def _outwait(self, name: str, question: Awaitable[Any]) -> asyncio.Future[Any]:
        """Waits for the answer, for ever; tells what a lack of it means after each timeout."""
        asked = self._open[name] = self._now()
        answer = asyncio.ensure_future(question)
        tell_at = asked + self._health.timeout
        try:
            while True:
                due = min(self._now() + self._health.timeout / LOOKS, tell_at)
                if await race(answer, due - self._now()):
                    return answer
                self._look()
                if self._mind_lag(due):
                    tell_at = self._now() + self._health.timeout
                elif self._now() >= tell_at - TOLERANCE_S:
                    self._tell(compiling=await self._compiling(name))
                    hung_at = self._since(name) + self._health.timeout
                    tell_at = hung_at if hung_at > tell_at else tell_at + self._health.timeout
        finally:
            del self._open[name]
            answer.cancel()
            # To stop means that nothing asks any more. Nobody wants its answer or error either.
            await asyncio.gather(answer, return_exceptions=True)

    async def _compiling(self, name: str) -> str:
        """What compiles: then the silence begins anew, but for so long in all."""
        silent_s = self._now() - max(self._open[name], self._moved_s)
        if silent_s >= self._health.compile_timeout - TOLERANCE_S:
            return ""
        compiling = await self._senses.compiling()
        self._look()  # that took a while
        if compiling:
            self._compiled_s = self._now()
        return compiling

    def _mind_lag(self, due: float) -> bool:
        """Whether our own loop was blocked: what came meanwhile lies unread, so silence is none."""
        lag_s = self._now() - due
        if lag_s < LOOP_LAG_S:
            return False
        if self._unblocked_s < due:  # else the other question has told it
            self._unblocked_s = self._now()
            self._tell(loop_lag_s=round(lag_s, 3))
        return True

    def _look(self) -> bool:
        """Whether the engine has got on since the last look."""
        seen = self._senses.progress()
        if seen == self._seen:
            return False
        self._seen, self._moved_s, self._progressed = seen, self._now(), True
        return True

    def _tell(self, **signs: Any) -> None:
        given = Signs(
            silent_s=self._silence_s(RPC),
            token_silent_s=self._silence_s(TOKEN),
            progressed=self._progressed,
            in_flight=self._senses.in_flight(),
            **signs,
        )
        self._progressed = False
        self._on_verdict(Verdict(judge(given, self._health.timeout), given))

    def _silence_s(self, name: str) -> float:
        """For how long an answer has been owed, in seconds."""
        return round(self._now() - self._since(name), 6) if name in self._open else 0.0

    def _since(self, name: str) -> float:
        """What counts as silence begins anew with progress, of whatever kind."""
        return max(self._open[name], self._moved_s, self._unblocked_s, self._compiled_s)
