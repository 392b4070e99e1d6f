"""The machine against the table, pair by pair."""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from ichat_lifecycle import machine as machine_module
from ichat_lifecycle.errors import TransitionRefused
from ichat_lifecycle.guards import GUARDS, Facts
from ichat_lifecycle.machine import Machine
from ichat_lifecycle.states import TABLE, Row, State, Trigger, When, row_for

ALL_HOLD = Facts(
    arguments_valid=True,
    socket_open=True,
    engine_alive=True,
    health_answered=True,
    warmed_up=True,
    fault_known=True,
    healthy_streak=1,
    canary_answered=True,
    restarts_left=1,
)
# For each guard, what makes it the only one that fails.
BREAKS: dict[str, dict[str, Any]] = {
    "no_stop_asked": {"stop_asked": True},
    "healthy_in_a_row": {"healthy_streak": 1, "recover_after": 2},
    "restart_budget_left": {"restarts_left": 0},
    "everything_released": {"resources_held": 1},
    **{name: {name: False} for name in ("arguments_valid", "socket_open", "engine_alive")},
    **{name: {name: False} for name in ("health_answered", "warmed_up", "fault_known")},
    "canary_answered": {"canary_answered": False},
}
PAIRS = [(state, trigger) for state in State for trigger in Trigger]
EDGES = [(source, row) for row in TABLE for source in row.sources]
WITH_ACTION = [(source, row) for source, row in EDGES if row.action]
FALLIBLE = [(source, row) for source, row in WITH_ACTION if row.when is When.BEFORE]


def name_of(value: Any) -> str | None:
    return str(value.trigger) if isinstance(value, Row) else None


def path_to(goal: State) -> list[Trigger]:
    """The shortest way from PARSED."""
    ways: deque[tuple[State, list[Trigger]]] = deque([(State.PARSED, [])])
    while ways:
        state, path = ways.popleft()
        if state is goal:
            return path
        ways += [(row.dest, [*path, row.trigger]) for row in TABLE if state in row.sources]
    raise AssertionError(f"no way to {goal}")


class Bench:
    """A machine, and all that it has done since it was brought into a state."""

    def __init__(self) -> None:
        self.facts = ALL_HOLD
        self.calls: list[Any] = []
        self.action: Callable[[], Awaitable[None]] | None = None
        actions = {row.action: self._make(row.action) for row in TABLE if row.action}
        self.machine = Machine(lambda: self.facts, actions, self._entered)

    @classmethod
    async def at(cls, state: State) -> Bench:
        bench = cls()
        for trigger in path_to(state):
            await bench.machine.fire(trigger)
        assert bench.machine.state is state
        bench.calls.clear()
        return bench

    def _make(self, name: str) -> Callable[[], Awaitable[None]]:
        async def act() -> None:
            self.calls.append((name, self.machine.state))
            if self.action is not None:
                await self.action()

        return act

    def _entered(self, trigger: Trigger, source: State, dest: State) -> None:
        assert self.machine.state is dest, "told in the same step as the change"
        self.calls.append((trigger, source, dest))

    async def refused(self, trigger: Trigger) -> str:
        """The words of a refusal, which has changed nothing and called nothing."""
        before = (self.machine.state, list(self.calls), self.machine.busy)
        with pytest.raises(TransitionRefused) as caught:
            await self.machine.fire(trigger)
        assert (self.machine.state, self.calls, self.machine.busy) == before
        return caught.value.message


def expected_calls(source: State, row: Row) -> list[Any]:
    entered = (row.trigger, source, row.dest)
    if row.action is None:
        return [entered]
    if row.when is When.BEFORE:
        return [(row.action, source), entered]
    return [entered, (row.action, row.dest)]


# --- the table


@pytest.mark.parametrize(("state", "trigger"), PAIRS)
def test_every_pair_does_what_the_table_says(state: State, trigger: Trigger) -> None:
    """A row moves to its destination, its action before or after; no row is a refusal."""

    async def main() -> None:
        bench = await Bench.at(state)
        row = row_for(state, trigger)
        if row is None:
            assert await bench.refused(trigger) == f"{trigger} is not allowed from {state}"
        else:
            await bench.machine.fire(trigger)
            assert bench.machine.state is row.dest
            assert bench.calls == expected_calls(state, row)
        assert not bench.machine.busy

    asyncio.run(main())


def test_every_state_trigger_and_guard_outcome(
    record_property: Callable[[str, object], None],
) -> None:
    """All guards there are, in every combination: a row looks at its own, and at no other."""
    triples = 0

    async def main() -> None:
        nonlocal triples
        for state, trigger in PAIRS:
            row = row_for(state, trigger)
            own = row.guards if row else ()
            for broken in subsets(own):
                for others_hold in (True, False):
                    others = [] if others_hold else [g for g in BREAKS if g not in own]
                    bench = await Bench.at(state)
                    bench.facts = broken_facts((*broken, *others))
                    if row is None or broken:
                        said = await bench.refused(trigger)
                        assert all(guard in said for guard in broken)
                    else:
                        await bench.machine.fire(trigger)
                        assert bench.calls == expected_calls(state, row)
                    triples += 1

    asyncio.run(main())
    record_property("proved: (state, trigger, guard outcome) triples", triples)


def subsets(names: tuple[str, ...]) -> list[tuple[str, ...]]:
    return [c for size in range(len(names) + 1) for c in itertools.combinations(names, size)]


def broken_facts(guards: tuple[str, ...]) -> Facts:
    """Facts for which exactly these guards do not hold."""
    facts = ALL_HOLD
    for guard in guards:
        facts = replace(facts, **BREAKS[guard])
    assert {name for name, guard in GUARDS.items() if not guard(facts)} == set(guards)
    return facts


@pytest.mark.parametrize(
    ("source", "row", "guard"),
    [(source, row, guard) for source, row in EDGES for guard in row.guards],
    ids=name_of,
)
def test_each_guard_refuses_by_its_name(source: State, row: Row, guard: str) -> None:
    """One guard that does not hold is enough; nothing is called; the next try may pass."""

    async def main() -> None:
        bench = await Bench.at(source)
        bench.facts = replace(ALL_HOLD, **BREAKS[guard])
        said = await bench.refused(row.trigger)
        assert said == f"{row.trigger} from {source}: guard {guard} does not hold"
        bench.facts = ALL_HOLD
        await bench.machine.fire(row.trigger)
        assert bench.machine.state is row.dest

    asyncio.run(main())


def test_all_guards_that_do_not_hold_are_named() -> None:
    async def main() -> None:
        bench = await Bench.at(State.BOUND)
        bench.facts = Facts(stop_asked=True)
        assert "guard socket_open, no_stop_asked does" in await bench.refused(Trigger.START_ENGINE)

    asyncio.run(main())


# --- actions that fail, are cancelled, come back late


@pytest.mark.parametrize(("source", "row"), WITH_ACTION, ids=name_of)
@pytest.mark.parametrize("error", [RuntimeError("full"), asyncio.CancelledError()], ids=type)
def test_a_failing_action(source: State, row: Row, error: BaseException) -> None:
    """Its own error reaches the caller. Before the change the state stays, and can be left again;
    after it (stop) the state has changed all the same."""

    async def main() -> None:
        async def fail() -> None:
            raise error

        bench = await Bench.at(source)
        bench.action = fail
        with pytest.raises(type(error)) as caught:
            await bench.machine.fire(row.trigger)
        assert caught.value is error
        assert bench.machine.state is (source if row.when is When.BEFORE else row.dest)
        assert bench.calls == expected_calls(source, row)[: 1 if row.when is When.BEFORE else 2]
        assert not bench.machine.busy
        if row.when is When.BEFORE:
            bench.action = None
            await bench.machine.fire(row.trigger)
            assert bench.machine.state is row.dest

    asyncio.run(main())


@pytest.mark.parametrize(("source", "row"), FALLIBLE, ids=name_of)
def test_cancelling_the_caller_cancels_the_action(source: State, row: Row) -> None:
    """CancelledError goes in and comes out; the state stays."""

    async def main() -> None:
        bench = await Bench.at(source)
        bench.action = asyncio.Event().wait  # type: ignore[assignment]
        firing = asyncio.create_task(bench.machine.fire(row.trigger))
        await asyncio.sleep(0)
        assert bench.machine.busy
        firing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await firing
        assert (bench.machine.state, bench.machine.busy) == (source, False)

    asyncio.run(main())


@pytest.mark.parametrize("from_within", [True, False])
def test_one_transition_at_a_time(from_within: bool) -> None:
    """Neither its own action nor another task can fire while one is in flight."""

    async def main() -> None:
        bench = await Bench.at(State.PARSED)
        refusals: list[str] = []

        async def fire_again() -> None:
            refusals.append(await bench.refused(Trigger.STOP))

        async def act() -> None:
            await (fire_again() if from_within else asyncio.create_task(fire_again()))

        bench.action = act
        await bench.machine.fire(Trigger.BIND)
        assert refusals == ["stop from PARSED: another transition is in flight"]
        assert bench.machine.state is State.BOUND

    asyncio.run(main())


def test_no_life_adds_a_callback_to_the_table_that_all_share() -> None:
    """The stock machine makes up `on_enter_STATE` and its like for whoever asks."""
    with pytest.raises(AttributeError, match="on_enter_READY"):
        machine_module._TABLE.on_enter_READY(print)
