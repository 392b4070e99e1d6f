"""READY and DEGRADED: what the writer makes of verdicts, faults and an operator's commands.

Runs in the writer's own loop, one item at a time; it decides, and has the lifecycle fire.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import structlog

from ichat_lifecycle.bounds import Interrupted, Latch
from ichat_lifecycle.errors import (
    CommandFailed,
    LifecycleError,
    TransitionRefused,
)
from ichat_lifecycle.journal import Reason
from ichat_lifecycle.ports import Fault, Ports, Verdict, VerdictKind
from ichat_lifecycle.restart_budget import RestartBudget
from ichat_lifecycle.states import State, Trigger
from ichat_lifecycle.verdicts import misses, told

if TYPE_CHECKING:
    from ichat_lifecycle.lifecycle import Lifecycle

log = structlog.get_logger("ichat_lifecycle")

T = TypeVar("T")

ASLEEP = Reason("asleep", "the engine is asleep", hint="wake it with POST /lifecycle/engine/wake")
RESTART_ASKED = Reason("restart_asked", "an operator asked for a new engine")

INBOX_LIMIT = 1000


@dataclass(slots=True)
class Command:
    """Something an operator asks of the engine; `done` gets the outcome, on the loop."""

    name: str
    argument: Any
    done: asyncio.Future[None]


class Supervisor:
    """Takes items from its inbox while the worker is READY or DEGRADED."""

    def __init__(self, life: Lifecycle, ports: Ports) -> None:
        self._life = life
        self._ports = ports
        self._health = life.settings.health
        # Set when something has come in; as `Meanwhile` has it.
        self.news = Latch()
        self._verdicts: deque[Verdict] = deque(maxlen=INBOX_LIMIT)
        self._waiting: deque[Command] = deque()
        self._running: Command | None = None
        self._running_since_s = 0.0
        self._canary_void = False
        self._misses = 0
        self._streak = 0
        self.budget = RestartBudget(life.settings.restart, ports.random)
        self._restart_asked = False
        self._commands: dict[str, Callable[[Any], Coroutine[Any, Any, None]]] = {
            "restart": self._restart,
            "sleep": self._sleep,
            "wake": self._wake,
            "reset_prefix_cache": self._reset_prefix_cache,
        }

    # --- in

    def on_verdict(self, verdict: Verdict) -> None:
        self._verdicts.append(verdict)
        self.news.set()

    async def command(self, name: str, argument: Any) -> None:
        """Queues a command and waits for its outcome."""
        if len(self._waiting) >= INBOX_LIMIT:
            raise TransitionRefused(f"{name}: too much is waiting already")
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(Command(name, argument, done))
        self.news.set()
        await done  # cancelled, it is a command that nobody waits for any more

    @property
    def queue_bound_s(self) -> float:
        """How long what is asked now may wait for its turn, in seconds."""
        ahead = (*self._waiting, *filter(None, (self._running,)))
        return sum(self._life.settings.command_bound(command.name) for command in ahead)

    def refuse_all(self) -> None:
        """Answers the commands that nobody will run any more."""
        while self._waiting:
            command = self._waiting.popleft()
            if not command.done.done():
                refusal = TransitionRefused(f"{command.name}: the worker is stopping")
                command.done.set_exception(refusal)

    @property
    def restarts_left(self) -> int:
        if self._restart_asked:
            return 1  # an operator's wish costs no budget
        return self.budget.left(self._life.monotonic())

    def commanded(self, before_s: float) -> str:
        """The command under way that began before this time on the loop's clock; "" for none."""
        if self._running is None or self._running_since_s > before_s:
            return ""
        return f"command {self._running.name}"

    # --- one step

    async def step(self) -> None:
        """Does the first of what there is to do. Raises when service has to end."""
        if (fault := self._life.fault_error()) is not None:
            await self._lose_engine(fault)
        elif self._verdicts:
            await self.take()
        elif self._waiting:
            await self._run(self._waiting.popleft())
        elif self._may_recover:
            await self._recover()
        else:
            self.news.clear()
            await self._life.until(self.news)

    async def take(self) -> None:
        """Judges what the watchdog has said, also while a command or the canary is under way."""
        self.news.clear()
        while self._verdicts:
            await self._judge(self._verdicts.popleft())

    async def _judge(self, verdict: Verdict) -> None:
        self._life.recorder.judged(verdict)
        if verdict.kind is VerdictKind.LOOP_BLOCKED:
            return  # says nothing of the engine
        hung = verdict.kind is VerdictKind.HUNG
        self._misses = misses(verdict.signs, self._health.timeout, self._misses) if hung else 0
        if verdict.answered:
            self._count(self._streak + 1)
        elif hung or verdict.kind is VerdictKind.ASLEEP:
            self._count(0)
            self._canary_void = True
        if verdict.kind is VerdictKind.ASLEEP:
            await self._degrade(ASLEEP)
        elif self._misses >= self._health.give_up_after:
            self._life.post_fault(self._hung(verdict))
        elif self._misses >= self._health.degrade_after:
            await self._degrade(self._unresponsive(verdict))

    @property
    def _may_recover(self) -> bool:
        return self._life.state is State.DEGRADED and self._streak >= self._health.recover_after

    def _count(self, streak: int) -> None:
        self._streak = streak
        self._life.learn(healthy_streak=streak)

    def _unresponsive(self, verdict: Verdict) -> Reason:
        return Reason(
            "engine_unresponsive",
            told(verdict),
            verdict.signs.error or None,
            "it recovers by itself if the engine answers again",
        )

    def _hung(self, verdict: Verdict) -> Fault:
        return Fault(
            "engine_hung",
            f"the engine hangs: {told(verdict)}",
            verdict.signs.error or None,
            "its processes are alive but stuck",
        )

    async def _degrade(self, reason: Reason) -> None:
        """Into DEGRADED from READY; where it is DEGRADED already, only the reason is renewed."""
        if self._life.state is State.READY:
            self._count(0)
            self._life.reason = reason
            await self._life.fire(Trigger.DEGRADE)
            if reason is not ASLEEP:
                self._ports.watchdog.pace(self._health.recovery_interval)
        elif self._life.reason is None or self._life.reason.code != reason.code:
            self._life.reason = reason
            self._life.recorder.publish(reason=reason)

    async def _recover(self) -> None:
        self._canary_void = False
        if self._life.settings.warm_up.requests and not await self._canary_answers():
            self._count(0)
            return
        if self._canary_void:  # the engine has fallen silent, or asleep, since it was asked
            return
        self._life.learn(canary_answered=True)
        try:
            await self._life.fire(Trigger.RECOVER)
        finally:
            self._life.learn(canary_answered=False)
        self._ports.watchdog.pace(self._health.interval)

    async def _canary_answers(self) -> bool:
        try:
            with self._life.deadline(self._health.canary_timeout, "the canary"):
                await self._call(self._ports.probe.canary(), "canary")
        except Interrupted:
            raise
        except Exception as error:
            self._life.recorder.recovery("canary", self._life.restarts_left, error=error)
            return False
        return True

    # --- losing the engine

    async def _lose_engine(self, error: LifecycleError) -> None:
        """READY or DEGRADED without an engine: restart it if the budget allows, else end."""
        self._life.recorder.recovery("lost", self._life.restarts_left, error=error)
        await self._degrade(Reason.of(error))
        ends = self._life.server_lost or self._life.stop_asked or not self.restarts_left
        if not ends:
            self._life.forget_fault()
        await self._life.cut()  # nobody waits longer for an engine that is lost
        if ends:
            raise error
        await self._life.save_evidence(error)
        await self._back_off()
        await self._replace_engine()
        self.budget.spend(self._life.monotonic())

    async def _back_off(self) -> None:
        delay_s = self.budget.delay_s(self._life.monotonic())
        if delay_s:
            left = self._life.restarts_left
            self._life.recorder.recovery("backoff", left, delay_s=round(delay_s, 3))
            await self._life.bounded(asyncio.sleep(delay_s), "backoff")

    async def _replace_engine(self) -> None:
        self._life.check()
        self._life.recorder.recovery("restart", self._life.restarts_left)
        self._misses = 0
        self._life.learn(health_answered=False, warmed_up=False)
        await self._life.fire(Trigger.RESTART_ENGINE)
        self._forget_verdicts()

    async def _call(self, work: Coroutine[Any, Any, T], what: str) -> T:
        """One call, bounded. An engine that hangs meanwhile is noticed as at any other time."""
        return await self._life.bounded(work, what, self)

    # --- commands

    async def _run(self, command: Command) -> None:
        outcome: Exception | None = TransitionRefused(f"{command.name}: the worker is stopping")
        if command.done.done():
            return  # whoever asked has gone; an answer of "no outcome in time" stays true
        self._running = command
        self._running_since_s = self._life.monotonic()
        deadline_s = self._life.settings.command_deadline(command.name)
        try:
            with self._life.deadline(deadline_s, command.name):
                await self._commands[command.name](command.argument)
            outcome = None
        except Interrupted:
            outcome = self._life.fault_error() or outcome
            raise
        except LifecycleError as error:
            outcome = error
        except Exception as error:
            outcome = CommandFailed(f"{command.name} failed: {error}")
        finally:
            self._running = None
            log.info("command", name=command.name, error=str(outcome) if outcome else None)
            if not command.done.done():
                _settle(command.done, outcome)
        if outcome is not None and self._life.engine_lost:
            raise outcome  # a restart that failed half way: there is nothing left to supervise

    async def _restart(self, _: Any) -> None:
        self._restart_asked = True
        try:
            await self._degrade(RESTART_ASKED)
            await self._call(self._life.drain(), "drain")
            await self._replace_engine()
        finally:
            self._restart_asked = False

    async def _sleep(self, level: int) -> None:
        # Not ready first, asleep second: nobody may be routed to an engine that is going to sleep.
        # And vLLM's sleep aborts what runs.
        await self._degrade(ASLEEP)
        await self._call(self._life.drain(), "drain")
        await self._call(self._ports.engine.sleep(level), "sleep")
        self._forget_verdicts()

    def _forget_verdicts(self) -> None:
        """Answers from before the engine slept, or was another one, say nothing of it now."""
        self._count(0)
        self._verdicts.clear()

    async def _wake(self, _: Any) -> None:
        await self._call(self._ports.engine.wake_up(), "wake")
        self._ports.watchdog.pace(self._health.recovery_interval)

    async def _reset_prefix_cache(self, _: Any) -> None:
        await self._call(self._ports.engine.reset_prefix_cache(), "reset_prefix_cache")


def _settle(done: asyncio.Future[None], outcome: Exception | None) -> None:
    if outcome is None:
        done.set_result(None)
    else:
        done.set_exception(outcome)
