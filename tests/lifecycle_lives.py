"""Lives of the real lifecycle on fake ports, under virtual time: what their tests share."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Coroutine
from typing import Any

from ichat_lifecycle.config import Settings
from ichat_lifecycle.journal import Kind
from ichat_lifecycle.lifecycle import Lifecycle
from ichat_lifecycle.ports import Signs, Verdict, VerdictKind
from ichat_lifecycle.states import TABLE, State
from ichat_lifecycle.testing.fakes import FakeWorld
from ichat_lifecycle.testing.plan import Outcome
from ichat_lifecycle.testing.virtual_time import run_virtual

HEALTHY = Verdict(VerdictKind.IDLE, Signs(answered_s=0.001))
MISSED = Verdict(VerdictKind.HUNG, Signs(error="planned"))
NO_RESTARTS = Settings.model_validate({"restart": {"max": 0}})
ASLEEP = Verdict(VerdictKind.ASLEEP, Signs(answered_s=0.001, asleep=True))
ORDER = ["control", "heartbeat", "socket", "server", "engine", "app", "watchdog"]
HANG = Outcome(hang=True)

Script = Callable[[FakeWorld, Lifecycle], Coroutine[Any, Any, None]]


class Life:
    """One life that has been lived: what was seen of it."""

    def __init__(self, world: FakeWorld, settings: Settings | None = None) -> None:
        self.world = world
        self.ready = asyncio.Event()
        self.lifecycle = Lifecycle(
            world.ports("control", "heartbeat"), settings or Settings(), self.ready
        )
        self.states: list[State] = [State.PARSED]
        self.ready_while: list[tuple[State, bool]] = []
        self.error: BaseException | None = None
        self.took_s = 0.0
        self.lifecycle.listeners.append(self._see)

    def _see(self, snapshot: Any) -> None:
        if snapshot.state is not self.states[-1]:
            self.states.append(snapshot.state)
        self.ready_while.append((snapshot.state, self.ready.is_set()))

    async def live(self, script: Script) -> None:
        run = asyncio.create_task(self.lifecycle.run())
        await asyncio.sleep(0)  # run() has begun before the script speaks
        acting = asyncio.create_task(script(self.world, self.lifecycle))
        try:
            await run
        except BaseException as error:
            self.error = error
        self.took_s = asyncio.get_running_loop().time()
        await asyncio.wait({acting}, timeout=0)
        left = asyncio.all_tasks() - {asyncio.current_task()}
        if acting.done():
            acting.result()  # a script that fails after it has asked for a stop fails its test
        acting.cancel()
        assert left <= {acting}, f"tasks left: {left}"


def live(
    script: Script,
    *,
    settings: Settings | None = None,
    plan: dict[str, Outcome] | None = None,
    **more: Outcome | list[Outcome],
) -> Life:
    """Lives one life; `plan` is written with _ for the dot: engine_start=Outcome(…)."""
    world = FakeWorld(plan={k.replace("_", ".", 1): v for k, v in {**(plan or {}), **more}.items()})

    async def main() -> Life:
        life = Life(world, settings)
        await life.live(script)
        return life

    life = run_virtual(main())
    check_invariants(life)
    return life


def check_invariants(life: Life) -> None:
    """What holds of every life (design: 1, 2, 3, 9)."""
    world = life.world
    assert world.released == world.held[::-1] or not set(world.held) - set(world.released), (
        f"acquired {world.held}, released {world.released}"
    )
    assert all((state is State.READY) == was_set for state, was_set in life.ready_while)
    records = list(life.lifecycle.journal.transitions)
    assert [r.seq for r in records] == list(range(1, len(records) + 1))
    assert all(a.mono_s <= b.mono_s and a.dest is b.source for a, b in itertools.pairwise(records))
    for record in records:
        assert any(
            record.trigger is row.trigger
            and record.source in row.sources
            and record.dest is row.dest
            for row in TABLE
        )
    assert records[-1].dest in (State.STOPPED, State.STOPPING)


def entries(life: Life, kind: Kind) -> list[dict[str, Any]]:
    return [e.as_dict() for e in life.lifecycle.journal.since(0) if e.kind is kind]


def stages(life: Life) -> list[dict[str, Any]]:
    return entries(life, Kind.STAGE)


async def until(lifecycle: Lifecycle, state: State, restarts: int = 0) -> None:
    async with asyncio.timeout(10_000):
        while (lifecycle.snapshot.state, lifecycle.snapshot.restarts) != (state, restarts):
            await asyncio.sleep(0.01)


async def nothing(world: FakeWorld, lifecycle: Lifecycle) -> None:
    return None


async def stop_when_ready(world: FakeWorld, lifecycle: Lifecycle) -> None:
    await until(lifecycle, State.READY)
    lifecycle.ask_to_stop("test")


def before(life: Life, first: str, second: str) -> bool:
    calls = life.world.calls
    return calls.index(first) < calls.index(second)
