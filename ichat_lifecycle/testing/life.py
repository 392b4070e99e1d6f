"""One simulated life: a plan is lived by an implementation, and everything is written down.

The lifecycle, its machine, its actions, the watchdog and the gate are those of production; fakes
stand behind the ports only. Minutes cost a millisecond or two.
"""

from __future__ import annotations

import asyncio
import collections
import functools
import gc
import inspect
import itertools
import json
import logging
import sys
import threading
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

import structlog

from ichat_lifecycle.adapters.senses import Senses
from ichat_lifecycle.adapters.watchdog import EngineWatchdog
from ichat_lifecycle.config import Settings
from ichat_lifecycle.errors import AddressError, LifecycleError
from ichat_lifecycle.journal import Journal, Snapshot
from ichat_lifecycle.ports import Fault, Ports, Signs, Verdict, VerdictKind
from ichat_lifecycle.states import State, Trigger, row_for
from ichat_lifecycle.testing.clients import Clients
from ichat_lifecycle.testing.fakes import COMPANIONS, FakeClock, FakeProbe, FakeWorld
from ichat_lifecycle.testing.plan import CALLS, Event, Plan
from ichat_lifecycle.testing.virtual_time import VirtualTimeLoop

# After its bound a life is given so long, in virtual seconds, before it is taken for endless.
PATIENCE_S = 10.0


class LifecycleLike(Protocol):
    """What the proofs need of a lifecycle; `ichat_lifecycle.lifecycle.Lifecycle` has it."""

    listeners: list[Callable[[Snapshot], None]]

    @property
    def snapshot(self) -> Snapshot: ...
    @property
    def journal(self) -> Journal: ...
    def ask_to_stop(self, cause: str, *, now: bool = False) -> None: ...
    def post_fault(self, fault: Fault) -> None: ...
    def fail(self, error: LifecycleError) -> None: ...
    async def command(self, name: str, argument: Any = None) -> None: ...
    async def fire(self, trigger: Trigger) -> None: ...
    async def ended(self) -> None: ...


class Subject(Protocol):
    """What is proved: a backend, with its lifecycle inside."""

    server_ready: asyncio.Event
    lifecycle: Any  # a LifecycleLike; not named as one, because protocols are invariant there

    async def run(self) -> None: ...


Implementation = Callable[[Ports, Settings, asyncio.Event], Subject]


@dataclass(frozen=True, slots=True)
class Moment:
    """What an observer saw. `calls` is how many calls to the world had begun by then."""

    at_s: float
    state: State
    ready: bool
    calls: int


@dataclass(frozen=True, slots=True)
class Attempt:
    """A trigger that has no row, or a command in the wrong state, tried from outside."""

    at_s: float
    what: str
    refused: bool
    before: tuple[Any, ...]
    after: tuple[Any, ...]


class Life:
    """A plan, the implementation that lives it, and what was seen of that.

    Attributes:
        error: what run() raised; None for a return.
        stops: when a stop was asked for or run() was cancelled, and how; in order.
        moments: every change of state or ready event that anyone could observe.
        ends: the snapshots that those got who asked for a stop and waited for the end.
        left: the names of tasks that ran on after run() had ended.
        unheard: errors that no one retrieved, as the event loop reports them.
        blocked_s: for how long the event loop was blocked in all.
    """

    def __init__(self, plan: Plan, implementation: Implementation, loop: VirtualTimeLoop) -> None:
        self.plan = plan
        self.settings = _settings(json.dumps(plan.settings))
        self.error: BaseException | None = None
        self.ended_s: float | None = None
        self.stops: list[tuple[float, str]] = []
        self.moments: list[Moment] = []
        self.attempts: list[Attempt] = []
        self.happened: list[tuple[float, str]] = []
        self.ends: list[Snapshot] = []
        self.left: list[str] = []
        self.unheard: list[str] = []
        self.blocked_s = 0.0
        self.cancelled = False
        self.turn = 0
        # Called before each turn of the loop from the first step of run() to its last.
        self.at_turn: Callable[[], None] | None = None
        in_turn = [event for event in plan.events if event.turn is not None]
        self._at_turns = collections.deque(in_turn)
        self._loop = loop
        self._tasks: set[asyncio.Task[Any]] = set()
        self._threads = threading.active_count()
        self.world = FakeWorld(plan=plan.calls, usual=_usual(plan), observe=self._observe)
        self.ready = asyncio.Event()
        ports = self.world.ports(*COMPANIONS, watchdog=self._watchdog)
        self.clock = ports.clock
        self.subject = implementation(ports, self.settings, self.ready)
        self.lifecycle: LifecycleLike = self.subject.lifecycle
        self.lifecycle.listeners.append(lambda _: self._observe())
        self.clients: Clients | None = None
        if any(event.do == "request" for event in plan.events):
            self.clients = Clients(self.world, lambda: self.lifecycle.snapshot)

    def _watchdog(self, world: FakeWorld) -> EngineWatchdog:
        senses = Senses(
            is_sleeping=world.engine.is_sleeping,
            progress=world.engine.progress,
            in_flight=lambda: world.gate.in_flight if world.gate else 0,
            ready=lambda: self.lifecycle.snapshot.ready,
            token=FakeProbe(world).token,
            compiling=world.engine.compiling,
        )
        return EngineWatchdog(senses, self.settings.health)

    def _observe(self) -> None:
        state, ready = self.lifecycle.snapshot.state, self.ready.is_set()
        if self.moments:
            last = self.moments[-1]
            if last.state is state and last.ready is ready:
                return
        self.moments.append(Moment(self._loop.time(), state, ready, len(self.world.history)))

    # --- living

    async def live(self) -> None:
        """From run() to its end, with all that the plan has in store."""
        self.begin()
        if self._at_turns or self.at_turn is not None:
            self._loop.interposed = self._take_turn
        # One timer for all of one moment: timers of one time come in no particular order.
        timed = itertools.groupby(
            (event for event in self.plan.events if event.turn is None), lambda event: event.at_s
        )
        timers = [self._loop.call_at(at, self._happen_all, [*events]) for at, events in timed]
        await self.end()
        for timer in timers:
            timer.cancel()
        await self.look_around()

    def begin(self) -> None:
        """Has run() begin. Alone for a life that is lived step by step, as `end` is."""
        self._loop.set_exception_handler(self._hear)
        self.running = self._loop.create_task(self.subject.run(), name="run")
        self.running.add_done_callback(self._take_result)
        self._last = self._loop.call_at(self.plan.until_s, self._end_of_plan)

    async def end(self) -> None:
        """Waits for the end of run()."""
        await asyncio.wait({self.running}, timeout=self._patience_s())
        if not self.running.done():  # what it does when we end it is no end of its own
            self.running.remove_done_callback(self._take_result)
        self._loop.interposed = None
        self._last.cancel()

    def _patience_s(self) -> float:
        """From the beginning on. A loop that is blocked may be so at the end of its patience."""
        blocked = sum(float(e.argument or 0) for e in self.plan.events if e.do == "block_loop")
        return self.plan.until_s + self.settings.stop_bound + blocked + PATIENCE_S

    def _take_turn(self) -> None:
        if self.turn == 0 and not self._begun():
            return
        if self.running.done() or not (self._at_turns or self.at_turn):
            self._loop.interposed = None  # nobody counts the turns from here on
            return
        self.turn += 1
        while self._at_turns and self._at_turns[0].turn == self.turn:
            self.happen(self._at_turns.popleft())
        if self.at_turn is not None:
            self.at_turn()

    def _begun(self) -> bool:
        """Whether run() has taken its first step: what is cancelled before that never runs."""
        coroutine = cast("Coroutine[Any, Any, None]", self.running.get_coro())
        return inspect.getcoroutinestate(coroutine) != inspect.CORO_CREATED

    def _take_result(self, running: asyncio.Task[None]) -> None:
        self.ended_s = self._loop.time()
        self.error = asyncio.CancelledError() if running.cancelled() else running.exception()

    async def look_around(self) -> None:
        """What is left behind; then it is ended, so that the next life begins on an empty stage."""
        for _ in range(3):  # what was cancelled needs a turn of the loop to end
            await asyncio.sleep(0)
        current = asyncio.current_task()
        left = self._running(current)
        self.left += sorted(task.get_name() for task in left if task not in self._tasks)
        if threading.active_count() > self._threads:
            self.left.append("a thread")
        while rest := self._running(current):
            for task in rest:
                task.cancel()
            # One that ignores it may wait for what nobody does any more: it is told again.
            await asyncio.wait(rest, timeout=PATIENCE_S)
        for task in self._loop.tasks:
            if task is not current and task._log_traceback:  # asyncio's own: nobody has asked
                self.unheard.append(f"{task.get_name()}: {task.exception()!r}")

    def _running(self, current: asyncio.Task[Any] | None) -> list[asyncio.Task[Any]]:
        return [task for task in self._loop.tasks if not task.done() and task is not current]

    def _hear(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        self.unheard.append(f"{context['message']}: {error!r}" if error else context["message"])

    def _end_of_plan(self) -> None:
        self.happen(Event(self.plan.until_s, "stop"))

    # --- what happens

    def _happen_all(self, events: list[Event]) -> None:
        for event in events:
            self.happen(event)

    def happen(self, event: Event) -> None:
        """Something comes from outside, now."""
        if self.running.done():
            return
        text = event.do if event.argument is None else f"{event.do} {event.argument}"
        self.happened.append((self._loop.time(), text))
        getattr(self, f"_{event.do}")(event.argument)
        self._observe()

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _stop(self, _: Any, now: bool = False) -> None:
        self._note_stop("stop_now" if now else "stop")
        self.lifecycle.ask_to_stop("the plan", now=now)
        self._spawn(self._await_end(), "asker")

    def _note_stop(self, how: str) -> None:
        self._last.cancel()  # it was for a life that nobody ends
        self.stops.append((self._loop.time(), how))

    async def _await_end(self) -> None:
        await self.lifecycle.ended()
        self.ends.append(self.lifecycle.snapshot)

    def _stop_now(self, _: Any) -> None:
        self._stop(None, now=True)

    def _cancel(self, _: Any) -> None:
        self._note_stop("cancel")
        self.cancelled = True
        self.running.cancel()

    def _engine_dies(self, _: Any) -> None:
        self.world.die()

    def _engine_freezes(self, _: Any) -> None:
        self.world.move(frozen=True)

    def _engine_thaws(self, _: Any) -> None:
        self.world.move(frozen=False)

    def _engine_falls_asleep(self, _: Any) -> None:
        self.world.asleep = True

    def _server_exits(self, _: Any) -> None:
        if self.world.on_server_fault:
            self.world.on_server_fault(Fault("server_exited", "the HTTP server ended by itself"))

    def _gateway_refuses(self, _: Any) -> None:
        self.lifecycle.fail(AddressError("another worker has this name", code="model_name_taken"))

    def _stale_fault(self, _: Any) -> None:
        """The engine before the present one tells of its end only now."""
        if len(self.world.faults) > 1:
            self.world.faults[-2](Fault("engine_died", "the old engine ended"))

    def _probe_misses(self, _: Any) -> None:
        self._say(Verdict(VerdictKind.HUNG, Signs(error="planned")))

    def _probe_answers(self, _: Any) -> None:
        self._say(Verdict(VerdictKind.IDLE, Signs(answered_s=0.001)))

    def _say(self, verdict: Verdict) -> None:
        if self.world.on_verdict is not None:
            self.world.on_verdict(verdict)

    def _request(self, work_s: Any) -> None:
        if self.clients is not None:
            self.clients.ask(float(work_s or 0))

    def _block_loop(self, seconds: Any) -> None:
        self.blocked_s += float(seconds or 0)
        self._loop.block(float(seconds or 0))

    def _step_clock(self, seconds: Any) -> None:
        assert isinstance(self.clock, FakeClock)
        self.clock.offset_s += float(seconds or 0)

    def _sleep(self, _: Any) -> None:
        self._command("sleep", 1)

    def _wake(self, _: Any) -> None:
        self._command("wake")

    def _restart(self, _: Any) -> None:
        self._command("restart")

    def _reset_prefix_cache(self, _: Any) -> None:
        self._command("reset_prefix_cache")

    def _command(self, name: str, argument: Any = None) -> None:
        if self.lifecycle.snapshot.state in (State.READY, State.DEGRADED):
            self._spawn(self._commanding(name, argument), name)
        else:
            self._attempt(f"command {name}", self.lifecycle.command(name, argument))

    async def _commanding(self, name: str, argument: Any) -> None:
        try:
            await self.lifecycle.command(name, argument)
        except LifecycleError as error:
            self.happened.append((self._loop.time(), f"{name}: {error}"))
        else:
            self.happened.append((self._loop.time(), f"{name}: done"))

    def _fire(self, trigger: Any) -> None:
        """A trigger without a row from here, by somebody who is not the writer."""
        if row_for(self.lifecycle.snapshot.state, Trigger(trigger)) is None:
            self._attempt(f"fire {trigger}", self.lifecycle.fire(Trigger(trigger)))

    def _attempt(self, what: str, work: Coroutine[Any, Any, None]) -> None:
        """Tries what has to be refused. A refusal suspends nowhere: one step tells."""
        before, refused = self._visible(), False
        try:
            work.send(None)
        except LifecycleError:
            refused = True
        except StopIteration:
            pass
        finally:
            work.close()
        attempt = Attempt(self._loop.time(), what, refused, before, self._visible())
        self.attempts.append(attempt)

    def _visible(self) -> tuple[Any, ...]:
        touched, calls = len(self.world.touched), len(self.world.history)
        snapshot = self.lifecycle.snapshot
        return (
            snapshot,
            len(self.lifecycle.journal.transitions),
            self.ready.is_set(),
            touched,
            calls,
        )


@functools.lru_cache(maxsize=64)
def _settings(document: str) -> Settings:
    """Drawn lives are lived in few worlds."""
    return Settings.model_validate_json(document)


def _usual(plan: Plan) -> Mapping[str, float]:
    if not plan.least_s:
        return CALLS
    return {name: max(seconds, plan.least_s) for name, seconds in CALLS.items()}


def _forget_loggers() -> None:
    """Else they stay quiet: structlog has no way back from `cache_logger_on_first_use`."""
    for module in list(sys.modules.values()):
        logger = getattr(module, "log", None)
        if isinstance(logger, structlog._config.BoundLoggerLazyProxy):
            vars(logger).pop("bind", None)


class Stage:
    """An event loop on which lives are lived, one after the other, unheard. Use it as a context."""

    def __init__(self) -> None:
        self.loop = VirtualTimeLoop()
        self._logging: dict[str, Any] = {}
        self._collecting = gc.get_threshold()

    def __enter__(self) -> Stage:
        asyncio.set_event_loop(self.loop)
        self._logging = structlog.get_config()
        quiet = structlog.make_filtering_bound_logger(logging.CRITICAL)
        # One logger for each module: a new one for each line looks for the stream it prints to.
        structlog.configure(
            wrapper_class=quiet,
            logger_factory=structlog.ReturnLoggerFactory(),
            cache_logger_on_first_use=True,
        )
        # A life makes garbage, in cycles: neither look for it all the time, nor at all that was
        # there before, nor at so much at once that the processor's cache does not hold it.
        gc.freeze()
        self._collecting = gc.get_threshold()
        gc.set_threshold(5_000, 20, 20)
        return self

    def __exit__(self, *_: object) -> None:
        gc.set_threshold(*self._collecting)
        gc.unfreeze()
        structlog.configure(**self._logging)
        _forget_loggers()
        asyncio.set_event_loop(None)
        self.loop.close()

    def live(self, plan: Plan, implementation: Implementation) -> Life:
        """Lives one plan, from 0 s on."""
        life = self.prepare(plan, implementation)
        self.finish(life)
        return life

    def prepare(self, plan: Plan, implementation: Implementation) -> Life:
        """A life that has not begun, at 0 s."""
        self.loop.start_anew()
        return Life(plan, implementation, self.loop)

    def finish(self, life: Life) -> None:
        """Lives it from its beginning to its end."""
        self.loop.run_until_complete(life.live())
