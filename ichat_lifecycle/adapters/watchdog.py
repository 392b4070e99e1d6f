"""The watchdog: gathers the signs of an engine's life, and reports what they mean (see verdicts).

`/health` only looks at a flag. `is_sleeping()` makes a round trip to EngineCore and costs about a
millisecond; it never resolves if EngineCore dies at the wrong moment, and each unanswered call
leaks a future, so an unanswered probe is kept and waited for, not repeated. An engine that has not
moved for a while is asked for a token, too: nothing else shows that its worker process is stuck.
All of this holds for each rank of an engine with data parallelism: each one has to answer, and to
move, by itself.

Some silences are legitimate. An engine that compiles is silent, and is distinguished from one that
hangs by what is seen of its processes (see compile_watch). One that does what an administrator has
asked for, such as the end of a profile, is silent as well; that is known by the request.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import structlog

from ichat_lifecycle.adapters.senses import SafeSenses, Senses
from ichat_lifecycle.bounds import error_of, race
from ichat_lifecycle.config import Health
from ichat_lifecycle.ports import Fault, FaultReport, Signs, Verdict, VerdictReport
from ichat_lifecycle.slept import LOOKS, overslept
from ichat_lifecycle.verdicts import TOLERANCE_S, judge

log = structlog.get_logger("ichat_lifecycle.watchdog")

# Requests in flight and no progress for so long are asked about without waiting for the interval.
STANDSTILL_S = 1.0

# A look for a compiler takes no longer, unless we were not running.
LOOK_LIMIT_S = 2.0

RPC, TOKEN = "rpc", "token"


@dataclass(slots=True)
class _Rank:
    """One rank: when it was last seen to move, and the questions it has been asked."""

    seen: Any
    moved_s: float
    asked: dict[str, tuple[float, asyncio.Future[Any]]] = field(default_factory=dict)

    def quiet_since(self, name: str) -> float | None:
        """Since when an answer is owed without any progress; None where none is owed."""
        asked_s, answer = self.asked.get(name, (0.0, None))
        return None if answer is None or answer.done() else max(asked_s, self.moved_s)


class EngineWatchdog:
    """The `Watchdog` port. One RPC and one token at a time are asked for of each rank.

    Each `timeout` of silence without progress is one miss; an answer, however late, ends it.
    """

    def __init__(self, senses: Senses, health: Health) -> None:
        self._senses = SafeSenses(senses, health.timeout)
        self._health = health
        self._interval_s = health.interval
        self._paced = asyncio.Event()
        self._task: asyncio.Future[Any] | None = None
        self._on_verdict: VerdictReport = lambda verdict: None
        self._ranks: dict[int, _Rank] = {}
        self._progressed = False  # since the last verdict
        self._unblocked_s = 0.0  # when our own loop turned again
        self._token_error = ""  # why the last token failed; logged once
        self._excused_s = 0.0  # when the engine was last seen to be silent for a good reason

    async def start(self, on_verdict: VerdictReport, on_fault: FaultReport) -> None:
        """Start to watch. `on_fault` is called if the watch ends without having been stopped."""
        self._interval_s = self._health.interval  # not the pace at which the last engine was lost
        self._on_verdict = on_verdict
        now_s = self._now()
        senses = self._senses
        self._ranks = {rank: _Rank(senses.progress(rank), now_s) for rank in senses.ranks()}
        self._task = asyncio.create_task(self._watch(), name="watchdog")
        self._task.add_done_callback(partial(self._ended, on_fault))

    def pace(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self._paced.set()

    async def stop(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait({task})

    def _ended(self, on_fault: FaultReport, task: asyncio.Future[Any]) -> None:
        error = error_of(task)
        if task is not self._task:  # it was stopped
            return
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        hint = "nobody watches the engine any more; please report this as a defect"
        on_fault(Fault("watchdog_failed", "the watchdog has ended by itself", repr(error), hint))

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    async def _watch(self) -> None:
        if not self._health.token_interval:
            await self._ask_rpcs()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._ask_rpcs(), name="watchdog-rpc")
            for rank in self._ranks:
                tasks.create_task(self._ask_tokens(rank), name=f"watchdog-token-{rank}")

    # --- the RPC

    async def _ask_rpcs(self) -> None:
        while True:
            began = self._now()
            await self._ask_rpc(began)
            # From begin to begin: a slow answer must not delay the next question.
            await self._wait(max(0.0, began + self._interval_s - self._now()))

    async def _ask_rpc(self, began: float) -> None:
        self._look()
        questions = {rank: self._senses.is_sleeping(rank) for rank in self._ranks}
        answers = await self._outwait(RPC, questions)
        took_s = round(self._now() - began, 6)
        failed = {rank: error for rank, a in answers.items() if (error := error_of(a)) is not None}
        if failed:
            ranks = tuple(failed) if len(self._ranks) > 1 else ()
            self._tell(error=f"probe failed: {next(iter(failed.values()))!r}", ranks=ranks)
        else:
            self._look()
            self._tell(answered_s=took_s, asleep=any(a.result() for a in answers.values()))

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
            if self._senses.in_flight() and self._stands_still():
                return

    def _stands_still(self) -> bool:
        """Whether a rank that has requests does not get on."""
        self._look()
        moved_before_s = self._now() - STANDSTILL_S + TOLERANCE_S
        still = (n for n, rank in self._ranks.items() if rank.moved_s <= moved_before_s)
        return any(self._senses.works(rank) for rank in still)

    # --- the token

    async def _ask_tokens(self, rank: int) -> None:
        while True:
            self._look()
            idle_s = self._now() - self._ranks[rank].moved_s
            rest_s = self._health.token_interval - idle_s
            if rest_s > TOLERANCE_S:
                await asyncio.sleep(rest_s)
            elif not self._senses.ready():
                await asyncio.sleep(self._health.interval)
            else:
                await self._ask_token(rank)

    async def _ask_token(self, rank: int) -> None:
        answers = await self._outwait(TOKEN, {rank: self._senses.token(rank)})
        if (error := error_of(answers[rank])) is None:
            self._ranks[rank].moved_s, self._token_error = self._now(), ""
            return
        # No silence, so it is no miss; and no proof, so it is asked again soon.
        if self._token_error != repr(error):
            self._token_error = repr(error)
            log.warning("token_failed", error=self._token_error)
        await asyncio.sleep(self._health.interval)

    # --- silence

    async def _outwait(
        self, name: str, questions: Mapping[int, Awaitable[Any]]
    ) -> dict[int, asyncio.Future[Any]]:
        """Wait for all answers, for ever; report what a lack of them means after each timeout."""
        asked_s = self._now()
        answers: dict[int, asyncio.Future[Any]] = {
            rank: asyncio.ensure_future(question) for rank, question in questions.items()
        }
        for rank, answer in answers.items():
            self._ranks[rank].asked[name] = asked_s, answer
        all_answered = _all_of(answers)
        tell_at = asked_s + self._health.timeout
        try:
            while True:
                due = min(self._now() + self._health.timeout / LOOKS, tell_at)
                if await race(all_answered, due - self._now()):
                    return answers
                self._look()
                if self._mind_lag(due):
                    tell_at = self._now() + self._health.timeout
                elif self._now() >= tell_at - TOLERANCE_S:
                    tell_at = await self._tell_silence(name, tell_at)
        finally:
            for rank in answers:
                del self._ranks[rank].asked[name]
            for answer in answers.values():
                answer.cancel()
            # To stop means that nothing asks any more. Nobody wants its answer or error either.
            await asyncio.gather(*answers.values(), all_answered, return_exceptions=True)

    async def _tell_silence(self, name: str, tell_at: float) -> float:
        """Report a silence of one timeout; return when to report the next one."""
        looked_until = self._now() + LOOK_LIMIT_S
        excuse = await self._excuse(name)
        if self._mind_lag(looked_until):
            return self._now() + self._health.timeout
        self._tell(**excuse)
        since = [s for rank in self._ranks.values() if (s := self._since(rank, name)) is not None]
        hung_at = min(since, default=self._now()) + self._health.timeout
        return hung_at if hung_at > tell_at else tell_at + self._health.timeout

    async def _excuse(self, name: str) -> dict[str, Any]:
        """The good reason for a silence, if any: it then begins anew, up to a limit in all."""
        owed = [s for rank in self._ranks.values() if (s := rank.quiet_since(name)) is not None]
        since = min(owed, default=self._now())
        silent_s = self._now() - since + TOLERANCE_S
        excuse: dict[str, Any] = {}
        if silent_s < self._health.admin_timeout:
            # A request that comes to an engine that is silent already explains nothing.
            excuse["admin_request"] = self._senses.admin_request(since + STANDSTILL_S)
        if silent_s < self._health.compile_timeout and not any(excuse.values()):
            excuse["compiling"] = await self._senses.compiling()
            self._look()  # that took a while
        if any(excuse.values()):
            self._excused_s = self._now()
        return excuse

    def _mind_lag(self, due: float) -> bool:
        """Whether our own loop was blocked: what came meanwhile lies unread, so silence is none."""
        lag_s = self._now() - due
        if not overslept(due, self._now()):
            return False
        if self._unblocked_s < due:  # else another question has reported it
            self._unblocked_s = self._now()
            self._tell(loop_lag_s=round(lag_s, 3))
        return True

    def _look(self) -> None:
        """Note which ranks have got on since the last look."""
        for number, rank in self._ranks.items():
            seen = self._senses.progress(number)
            if seen != rank.seen:
                rank.seen, rank.moved_s, self._progressed = seen, self._now(), True

    def _tell(self, ranks: tuple[int, ...] = (), **signs: Any) -> None:
        silences = {n: self._silences_s(rank) for n, rank in self._ranks.items()}
        if len(silences) > 1 and not ranks:
            limit_s = self._health.timeout - TOLERANCE_S
            ranks = tuple(rank for rank, silent in silences.items() if max(silent) >= limit_s)
        given = Signs(
            silent_s=max(rpc_s for rpc_s, _ in silences.values()),
            token_silent_s=max(token_s for _, token_s in silences.values()),
            progressed=self._progressed,
            in_flight=self._senses.in_flight(),
            ranks=ranks,
            **signs,
        )
        self._progressed = False
        self._on_verdict(Verdict(judge(given, self._health.timeout), given))

    def _silences_s(self, rank: _Rank) -> tuple[float, float]:
        """For how long an answer to the RPC and a token have been owed, in seconds."""
        rpc_s, token_s = (
            0.0 if (since := self._since(rank, name)) is None else round(self._now() - since, 6)
            for name in (RPC, TOKEN)
        )
        return rpc_s, token_s

    def _since(self, rank: _Rank, name: str) -> float | None:
        """What counts as silence begins anew with progress, of whatever kind."""
        quiet_since = rank.quiet_since(name)
        if quiet_since is None:
            return None
        return max(quiet_since, self._unblocked_s, self._excused_s)


def _all_of(answers: Mapping[int, asyncio.Future[Any]]) -> asyncio.Future[Any]:
    """Done once all are; for a single one, itself: nearly all engines have one rank."""
    if len(answers) == 1:
        return next(iter(answers.values()))
    return asyncio.gather(*answers.values(), return_exceptions=True)
