"""Plays operator and world against a lifecycle, step by step, and compares it with the model.

Hypothesis chooses the steps, and shrinks those that tell the two apart to a few that a person can
read. The report has the timeline and a plan to live that life again. All times are in seconds.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from ichat_lifecycle.config import Settings
from ichat_lifecycle.errors import LifecycleError
from ichat_lifecycle.states import State
from ichat_lifecycle.testing.clients import Clients
from ichat_lifecycle.testing.draw import SETTINGS
from ichat_lifecycle.testing.invariants import check
from ichat_lifecycle.testing.life import Implementation, Life, Stage
from ichat_lifecycle.testing.model import (
    CANCELLED,
    OVER,
    RETURNED,
    End,
    Model,
    Seen,
    Story,
    World,
)
from ichat_lifecycle.testing.plan import CALLS, USUAL, Do, Event, Outcome, Plan
from ichat_lifecycle.testing.timeline import timeline

# After an event: long enough for all that follows at once, too short for anything else; and so odd
# that nothing falls on one moment by chance, where it may come in any order.
AT_ONCE_S = 0.010007
# Turns of the loop, which take no time, for a request that takes none.
TURNS = 5
# Longer than any life here.
NEVER_S = 1e9

# More of it: from a part of one call, over a start and a probe's interval and time-out, to the
# silence that makes an engine a lost one.
PAUSES_S = (0.0, 0.61, 5.3, 16.3, 66.1, 0.31, 1.37, 2.83, 48.7)
BRIEF_S = (0.0, 0.61, 5.3, 0.31, 16.3)  # a drain may go on after it
READY_S = 7.3  # a start is over
# After how many seconds a worker is met first: in service, or on its way up.
MET_S = (READY_S, 0.0, 0.61, 2.21, 2.83, 3.17)
WORK_S = (0.0, 20.9, 3.1)  # of a request; none where that is 0
# A pause is cut in so many parts, with a look after each.
PARTS = 4

# What has an effect by itself; `at_once` puts two of them into one moment.
Happening = Literal[
    "engine_freezes",
    "engine_thaws",
    "engine_falls_asleep",
    "engine_dies",
    "stale_fault",
    "sleep",
    "wake",
    "restart",
    "reset_prefix_cache",
    "server_exits",
    "gateway_refuses",
    "stop",
    "stop_now",
    "cancel",
]
HAPPENINGS: tuple[Happening, ...] = get_args(Happening)
ENDINGS: tuple[Happening, ...] = ("stop", "stop_now", "cancel", "server_exits", "gateway_refuses")

TELL: Mapping[Happening, Callable[[Story], list[Story]]] = {
    "engine_freezes": Story.engine_freezes,
    "engine_thaws": Story.engine_thaws,
    "engine_falls_asleep": Story.engine_falls_asleep,
    "engine_dies": Story.engine_dies,
    "stale_fault": Story.stale_fault,
    "sleep": lambda story: story.command("sleep"),
    "wake": lambda story: story.command("wake"),
    "restart": lambda story: story.command("restart"),
    "reset_prefix_cache": lambda story: story.command("reset_prefix_cache"),
    "server_exits": Story.server_exits,
    "gateway_refuses": Story.gateway_refuses,
    "stop": Story.stop,
    "stop_now": Story.stop_now,
    "cancel": Story.cancel,
}


@dataclass(frozen=True, slots=True)
class Setting:
    """A world to live in: settings, and calls that go other than usual, as in a plan."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    calls: Mapping[str, tuple[Outcome, ...]] = field(default_factory=dict)

    def for_model(self) -> World:
        """The same, in the model's words."""
        failing = {
            name: sum(outcome.error is not None for outcome in self.calls.get(name, ()))
            for name in ("engine.start", "probe.canary")
        }
        starts = self.calls.get("engine.start", ())
        slow = {name: calls[-1].delay_s for name, calls in self.calls.items()}
        return World(
            Settings.model_validate(self.settings),
            {name: slow.get(name) or usual_s for name, usual_s in CALLS.items()},
            engines_that_start=len(starts) - 1 if failing["engine.start"] else 1000,
            canaries_that_fail=failing["probe.canary"],
        )


_FAILS = Outcome(error="StartError", delay_s=CALLS["engine.start"])
WORLDS: Mapping[str, Setting] = {
    **{name: Setting(settings) for name, settings in SETTINGS.items()},
    "the second engine fails": Setting({}, {"engine.start": (USUAL, _FAILS)}),
    "a slow canary, which fails at first": Setting(
        {}, {"probe.canary": (Outcome(error="OSError", delay_s=3.0), Outcome(delay_s=3.0))}
    ),
}


class Disagreement(AssertionError):
    """The implementation did what no document allows."""

    def __init__(self, model: Model, seen: Seen, life: Life) -> None:
        story = "\n".join(timeline(life))
        super().__init__(
            f"allowed:\n     {model}\nbut seen:\n     {seen}\n\n{story}\n\n"
            f"the plan:\n{life.plan.as_json()}"
        )


PAUSES = st.sampled_from(PAUSES_S)
WORK = st.sampled_from(WORK_S)


def _event(do: Happening, when: Callable[[_Player], bool] = lambda _: True) -> Any:
    """A rule that has this happen, until the worker stops."""

    def happens(self: _Player, then_s: float) -> None:
        self._act(then_s, do)

    happens.__name__ = do
    possible = precondition(lambda self: self._over or (not self._stopping and when(self)))
    return possible(rule(then_s=PAUSES)(happens))


class _Player(RuleBasedStateMachine):
    """Each rule does something to a worker, has time pass, and compares.

    Where a worker has ended, the next step starts another one in the same world instead.
    """

    def __init__(self, implementation: Implementation) -> None:
        super().__init__()
        self._implementation = implementation
        self._stage = Stage()
        self._stage.__enter__()
        self._loop = self._stage.loop
        self._agreed = True

    def _begin(self, world: Setting, met_s: float) -> None:
        self._world = world
        plan = Plan(world.settings, world.calls, until_s=NEVER_S)
        self._life = self._stage.prepare(plan, self._implementation)
        self._life.clients = Clients(self._life.world, lambda: self._life.lifecycle.snapshot)
        self._life.begin()
        self._model = Model(world.for_model())
        self._look(AT_ONCE_S + met_s)

    # --- rules

    engine_falls_asleep = _event(
        "engine_falls_asleep", lambda self: self._life.world.alive and not self._life.world.asleep
    )
    stale_fault = _event("stale_fault", lambda self: len(self._life.world.faults) > 1)
    wake = _event("wake")
    reset_prefix_cache = _event("reset_prefix_cache")

    @precondition(lambda self: self._over or not self._stopping or self._in_flight)
    @rule(then_s=PAUSES)
    def engine_freezes_or_thaws(self, then_s: float) -> None:
        self._act(then_s, "engine_thaws" if self._model.frozen else "engine_freezes")

    @precondition(lambda self: self._over or self._life.world.alive)
    @precondition(lambda self: self._over or not self._stopping or self._in_flight)
    @rule(then_s=PAUSES)
    def engine_dies(self, then_s: float) -> None:
        self._act(then_s, "engine_dies")

    @rule(seconds=PAUSES)
    def time_passes(self, seconds: float) -> None:
        self._act(seconds)

    @rule(work_s=WORK, then_s=PAUSES)
    def request(self, work_s: float, then_s: float) -> None:
        self._send(work_s)
        self._act(then_s)

    @precondition(lambda self: self._over or not self._stopping)
    @rule(running_s=WORK, then_s=PAUSES)
    def sleep(self, running_s: float, then_s: float) -> None:
        self._send(running_s)
        self._act(then_s, "sleep")

    @precondition(lambda self: self._over or not self._stopping)
    @rule(running_s=WORK, then_s=PAUSES)
    def restart(self, running_s: float, then_s: float) -> None:
        self._send(running_s)
        self._act(then_s, "restart")

    @rule(how=st.sampled_from(ENDINGS), running_s=WORK, then_s=st.sampled_from(BRIEF_S))
    def the_end(self, how: Happening, running_s: float, then_s: float) -> None:
        """The first one, or another one."""
        self._send(running_s)
        self._act(then_s, how)

    @rule(first=st.sampled_from(HAPPENINGS), second=st.sampled_from(HAPPENINGS), then_s=PAUSES)
    def at_once(self, first: Happening, second: Happening, then_s: float) -> None:
        """Nothing runs between the two."""
        self._act(then_s, first, second)

    # --- acting and looking

    @property
    def _over(self) -> bool:
        return self._life.running.done()

    @property
    def _stopping(self) -> bool:
        return self._life.lifecycle.snapshot.state is State.STOPPING

    @property
    def _in_flight(self) -> bool:
        return self._life.clients is not None and self._life.clients.gate.in_flight > 0

    def _send(self, work_s: float) -> None:
        """A request; none where it has no work, or where there is nobody to send it to."""
        passes = self._ask(work_s) if work_s else None
        if passes is not None:
            self._note("request", work_s)
            self._model.tell(lambda story: story.request(work_s, passes))

    def _act(self, then_s: float, *happenings: Happening) -> None:
        if self._over:
            self._end()
            self._begin(self._world, READY_S)
            return
        self._loop.run_until_complete(self._have_happen(happenings))
        for happening in happenings:
            self._model.tell(TELL[happening])
        self._look(AT_ONCE_S)
        for _ in range(PARTS if then_s else 0):
            self._look(then_s / PARTS)

    async def _have_happen(self, happenings: tuple[Happening, ...]) -> None:
        for happening in happenings:
            self._note(happening)
            self._life.happen(Event(self._loop.time(), happening))

    def _note(self, do: Do, argument: float | None = None) -> None:
        """For the plan in the report."""
        plan, at_s = self._life.plan, round(self._loop.time(), 6)
        events = (*plan.events, Event(at_s, do, argument))
        self._life.plan = replace(plan, events=events, until_s=at_s + 100.0)

    def _ask(self, work_s: float) -> bool | None:
        """Whether a request passes; None where there is nobody to ask."""
        clients, life = self._life.clients, self._life
        if self._over or clients is None or life.lifecycle.snapshot.state is State.PARSED:
            return None
        self._loop.run_until_complete(self._request(clients, work_s))
        return clients.exchanges[-1].accepted_s is not None

    async def _request(self, clients: Clients, work_s: float) -> None:
        clients.ask(work_s)
        for _ in range(TURNS):
            await asyncio.sleep(0)

    def _look(self, seconds: float) -> None:
        """Has time pass, looks, and compares."""
        if self._over:
            return
        self._loop.run_until_complete(asyncio.sleep(seconds))
        self._model.pass_time(self._loop.time())
        seen = self._see()
        self._agreed = self._model.allows(seen)
        if not self._agreed:
            raise Disagreement(self._model, seen, self._life)

    def _see(self) -> Seen:
        # A request to a frozen engine hangs, and would be part of the story.
        life, before = self._life, self._life.lifecycle.snapshot.state
        passes = None if self._model.frozen else self._ask(0.0)
        snapshot = life.lifecycle.snapshot
        stopping = snapshot.state in OVER
        return Seen(
            state=snapshot.state,
            ready=life.ready.is_set(),
            restarts=snapshot.restarts,
            ever_ready=snapshot.ever_ready,
            asleep=life.world.asleep if life.world.alive and not stopping else None,
            passes=passes if snapshot.state is before else None,
            end=_end_of(life.running) if self._over else None,
        )

    def _end(self) -> None:
        """Ends the life, if nobody did, and checks all invariants of it."""
        self._loop.run_until_complete(self._finish())
        if self._agreed:
            check(self._life)

    def teardown(self) -> None:
        try:
            if hasattr(self, "_life"):
                self._end()
        finally:
            self._stage.__exit__()

    async def _finish(self) -> None:
        if not (self._over or self._life.stops):
            await self._have_happen(("stop",))
        await self._life.end()
        await self._life.look_around()


def _end_of(running: asyncio.Task[None]) -> End:
    if running.cancelled():
        return End(CANCELLED)
    error = running.exception()
    if error is None:
        return End(RETURNED)
    if isinstance(error, LifecycleError):
        return End(error.code, int(error.exit_code))
    return End(repr(error), -1)


def operator_and_world(
    implementation: Implementation, worlds: Mapping[str, Setting] = WORLDS
) -> type[RuleBasedStateMachine]:
    """The machine that proves this implementation, in any of these worlds."""

    class OperatorAndWorld(_Player):
        def __init__(self) -> None:
            super().__init__(implementation)

        @initialize(world=st.sampled_from(list(worlds)), met_s=st.sampled_from(MET_S))
        def begins(self, world: str, met_s: float) -> None:
            self._begin(worlds[world], met_s)

    return OperatorAndWorld
