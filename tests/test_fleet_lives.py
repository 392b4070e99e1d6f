"""Fleets that Hypothesis draws: what processes do, what operators ask, when the file changes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from fleet_world import Course, World, plan
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ichat_lifecycle.config import Restart
from ichat_lifecycle.errors import LifecycleError
from ichat_lifecycle.fleet.ports import KILL_MARGIN_S, Plan
from ichat_lifecycle.fleet.states import RESTING, Stage

NAMES = ("a", "b", "c")
LIMIT = 2

moments = st.sampled_from([0.0, 0.5, 1.0, 3.0, 10.0, 11.0, 25.0, 90.0])
courses = st.builds(
    Course,
    bound_s=st.sampled_from([1.0, None]),
    ready_s=st.sampled_from([10.0, 2.0, None]),
    ends_s=st.sampled_from([None, None, 0.0, 1.0, 5.0, 10.0, 40.0]),
    code=st.sampled_from([0, 2, 66, 70, 75, -9]),
    stop_s=st.sampled_from([2.0, 0.0, 20.0, None]),
    stop_code=st.sampled_from([0, 75, 124]),
)


@dataclass(frozen=True)
class Step:
    """After so long somebody does something."""

    after_s: float
    do: str
    name: str
    how: str

    def plans(self) -> list[Plan]:
        """A file in which this worker is another, or is not."""
        rest = [plan(name) for name in NAMES if name != self.name]
        if self.do == "swap":
            return [plan(name, host=NAMES[-i], replace=self.how) for i, name in enumerate(NAMES)]
        changed = plan(self.name, env={"A": str(self.after_s)}, replace=self.how)
        return rest if self.do == "remove" else [*rest, changed]


steps = st.builds(
    Step,
    moments,
    st.sampled_from(["stop", "restart", "change", "remove", "swap", "kill", "state"]),
    st.sampled_from(NAMES),
    st.sampled_from(["after", "before"]),
)


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.fixed_dictionaries({name: st.lists(courses, min_size=1, max_size=4) for name in NAMES}),
    st.lists(steps, max_size=6),
    st.booleans(),
)
def test_whatever_happens_nothing_is_left_and_every_promise_holds(
    drawn: dict[str, list[Course]], course: Sequence[Step], hurry: bool
) -> None:
    world = World(limit=LIMIT, restart=Restart(max=2, backoff=2))
    world.courses = drawn

    async def scenario(world: World) -> None:
        for step in course:
            await asyncio.sleep(step.after_s)
            if all(member.rested.is_set() for member in world.fleet.members):
                return  # the fleet has ended by itself
            act(world, step)
            check(world)
        world.fleet.ask_to_stop()
        await asyncio.sleep(1)
        if hurry:
            world.fleet.ask_to_stop(now=True)
        await asyncio.sleep(30 + KILL_MARGIN_S + 1)
        assert not world.alive(), "its bound is over"

    world.live(*map(plan, NAMES), scenario=scenario)
    assert world.most_starting <= LIMIT
    assert all(member.stage in RESTING for member in world.fleet.members)


def act(world: World, step: Step) -> None:
    alive = world.alive(step.name)
    try:
        match step.do:
            case "change" | "remove" | "swap":
                world.fleet.change(step.plans())
            case "kill" if alive:
                alive[-1].end(-9)
            case "state" if alive:
                alive[-1].tell("DEGRADED")
            case "stop":
                world.fleet.member(step.name).ask_to_stop("drawn")
            case "restart":
                world.fleet.restart(step.name)
    except LifecycleError:
        return  # no such worker any more


def check(world: World) -> None:
    for socket in world.sockets:
        assert not (socket.closed and socket.owners)
        # Two serve on one only for the moment of a change.
        assert socket.most_owners <= 2
    for member in world.fleet.members:
        running = member.process is not None
        assert running == (member.stage in (Stage.STARTING, Stage.SERVING, Stage.STOPPING))
        if member.serving:
            assert member.state in ("READY", "DEGRADED", "STOPPING")
