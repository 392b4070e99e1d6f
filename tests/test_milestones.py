"""One line says where a READY worker is, one how it has ended."""

from __future__ import annotations

import asyncio
from typing import Any

import structlog
from lifecycle_lives import HEALTHY, MISSED, live, nothing, until

from ichat_lifecycle.config import Settings
from ichat_lifecycle.errors import ExitCode, StartError
from ichat_lifecycle.lifecycle import Lifecycle
from ichat_lifecycle.milestones import Milestones
from ichat_lifecycle.ports import Fault
from ichat_lifecycle.states import State
from ichat_lifecycle.testing.fakes import FakeWorld, say
from ichat_lifecycle.testing.plan import Outcome

WHERE = {"model": "demo", "api": "http://127.0.0.1:8000/v1", "page": "http://127.0.0.1:18000/"}


def told_of(logs: list[Any], event: str) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in entry.items() if k not in ("event", "log_level")}
        for entry in logs
        if entry["event"] == event
    ]


def test_each_engine_that_has_started_is_one_line_and_a_recovery_without_one_is_none() -> None:
    async def script(world: FakeWorld, lifecycle: Lifecycle) -> None:
        lifecycle.listeners.append(Milestones(lifecycle.journal, lambda: WHERE).changed)
        await until(lifecycle, State.READY)
        say(world, MISSED, HEALTHY, HEALTHY)
        await asyncio.sleep(1)
        lifecycle.post_fault(Fault("engine_died", "it ended"))
        await until(lifecycle, State.READY, restarts=1)
        await asyncio.sleep(1)
        lifecycle.ask_to_stop("test")

    with structlog.testing.capture_logs() as logs:
        live(script, engine_start=[Outcome(7), Outcome(3)])
    assert told_of(logs, "ready") == [
        {"took_s": 7.0, "restarts": 0, **WHERE},
        {"took_s": 3.0, "restarts": 1, **WHERE},
    ]


def ended(life: Any, error: BaseException | None) -> dict[str, Any]:
    with structlog.testing.capture_logs() as logs:
        Milestones(life.lifecycle.journal, lambda: WHERE).end(error)
    (line,) = told_of(logs, "ended")
    return line


def test_the_end_names_the_code_the_cause_and_what_was_cut_by_the_stop_alone() -> None:
    async def script(world: FakeWorld, lifecycle: Lifecycle) -> None:
        await until(lifecycle, State.READY)
        world.in_flight = 5  # which the loss of an engine cuts, and no stop
        lifecycle.post_fault(Fault("engine_died", "it ended"))
        await until(lifecycle, State.BOUND, restarts=1)
        world.in_flight = 0
        await until(lifecycle, State.READY, restarts=1)
        world.in_flight = 3
        lifecycle.ask_to_stop("SIGTERM")
        await asyncio.sleep(settings.stop.drain / 2)
        world.in_flight = 2  # one has finished
        await asyncio.sleep(settings.stop.drain / 2 + 0.1)
        world.in_flight = 0

    settings = Settings()
    life = live(
        script,
        settings=settings,
        engine_start=Outcome(2),
        server_drained=Outcome(hang=True),
        server_cut=[Outcome(), Outcome(), Outcome(0.5)],
    )
    assert life.error is None
    line = ended(life, None)
    assert line == {"exit_code": 0, "cause": "SIGTERM", "completed": 1, "cut": 2}


def test_the_end_of_a_failed_start_has_its_code() -> None:
    life = live(nothing, engine_start=Outcome(0, StartError("no memory")))
    line = ended(life, life.error)
    assert line["exit_code"] == ExitCode.ENGINE_START_FAILED
    assert line["cause"] == "no memory"
    assert (line["completed"], line["cut"]) == (0, 0)


def test_an_end_before_any_stop_has_no_cause() -> None:
    class Unlived:
        lifecycle = Lifecycle(FakeWorld().ports(), Settings())

    assert ended(Unlived, OSError("x")) == {
        **{"exit_code": ExitCode.ENGINE_START_FAILED, "cause": None},
        **{"completed": 0, "cut": 0},
    }
