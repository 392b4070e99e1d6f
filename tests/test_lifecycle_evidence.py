"""What is saved of an engine before it is ended."""

from __future__ import annotations

import asyncio

import pytest
import structlog
from lifecycle_lives import HANG, HEALTHY, MISSED, NO_RESTARTS, before, live, nothing, until

from ichat_lifecycle.config import Settings
from ichat_lifecycle.errors import (
    DeadlineError,
    EngineDiedError,
)
from ichat_lifecycle.lifecycle import Lifecycle
from ichat_lifecycle.ports import Fault
from ichat_lifecycle.states import State
from ichat_lifecycle.testing.fakes import FakeWorld, say
from ichat_lifecycle.testing.plan import Outcome
from ichat_lifecycle.testing.virtual_time import run_virtual

# --- evidence


async def loses_its_engine(world: FakeWorld, lifecycle: Lifecycle) -> None:
    await until(lifecycle, State.READY)
    say(world, MISSED, HEALTHY)
    lifecycle.post_fault(Fault("engine_died", "it ended", "signal 9", "look"))
    if lifecycle.settings.restart.max:
        await until(lifecycle, State.READY, restarts=1)
        lifecycle.ask_to_stop("enough")


@pytest.mark.parametrize("restarts", [0, 1])
def test_evidence_is_saved_before_a_lost_engine_is_ended(restarts: int) -> None:
    settings = Settings.model_validate({"restart": {"max": restarts}})
    life = live(loses_its_engine, settings=settings)
    assert before(life, "server.cut", "evidence.save")
    assert before(life, "evidence.save", "engine.release")
    (case,) = life.world.cases
    assert (case.code, case.message) == ("engine_died", "it ended")
    assert (case.root_cause, case.hint) == ("signal 9", "look")
    assert life.lifecycle.snapshot.evidence == "/evidence/engine_died"
    assert life.states[5] is State.DEGRADED


def test_evidence_has_the_verdicts_so_far() -> None:
    async def script(world: FakeWorld, lifecycle: Lifecycle) -> None:
        await until(lifecycle, State.READY)
        say(world, HEALTHY, *[MISSED] * Settings().health.give_up_after)

    (case,) = live(script, settings=NO_RESTARTS).world.cases
    assert [probe["kind"] for probe in case.probes] == ["idle", *["hung"] * 6]


def test_a_start_that_fails_leaves_evidence() -> None:
    life = live(nothing, engine_start=Outcome(error="StartError"))
    assert [case.code for case in life.world.cases] == ["engine_start_failed"]
    assert before(life, "evidence.save", "engine.release")
    assert life.lifecycle.snapshot.evidence == "/evidence/engine_start_failed"


def test_without_an_engine_there_is_none() -> None:
    assert live(nothing, binder_bind=Outcome(error="AddressError")).world.cases == []


def test_a_stop_that_was_asked_for_leaves_none() -> None:
    async def script(world: FakeWorld, lifecycle: Lifecycle) -> None:
        await until(lifecycle, State.READY)
        lifecycle.ask_to_stop("enough")

    life = live(script)
    assert life.world.cases == []
    assert life.lifecycle.snapshot.evidence is None


@pytest.mark.parametrize("outcome", [HANG, Outcome(error="OSError")])
@pytest.mark.parametrize("restarts", [0, 1])
def test_evidence_that_cannot_be_saved_changes_nothing_else(
    outcome: Outcome, restarts: int
) -> None:
    settings = Settings.model_validate({"restart": {"max": restarts}})
    with structlog.testing.capture_logs() as logs:
        life = live(loses_its_engine, settings=settings, evidence_save=outcome)
    assert (life.error is None) == bool(restarts)
    assert life.lifecycle.snapshot.restarts == restarts
    assert life.lifecycle.snapshot.evidence is None
    (warning,) = [entry for entry in logs if entry["event"] == "evidence_not_saved"]
    limit = f"saving evidence took longer than {settings.health.evidence_timeout:g} s"
    error = OSError("planned: evidence.save") if outcome.error else DeadlineError(limit)
    assert warning["error"] == repr(error)
    assert warning["log_level"] == "warning"
    degraded = next(
        r.mono_s for r in life.lifecycle.journal.transitions if r.dest is State.DEGRADED
    )
    left = list(life.lifecycle.journal.transitions)[5].mono_s
    assert left - degraded == pytest.approx(
        settings.health.evidence_timeout if outcome.hang else 0.0, abs=0.1
    )


@pytest.mark.parametrize(
    ("restarts", "how", "ends"),
    [(0, "stop", EngineDiedError), (1, "stop", type(None)), (0, "cancel", asyncio.CancelledError)],
)
def test_a_stop_does_not_wait_for_evidence(restarts: int, how: str, ends: type) -> None:
    """The death is the cause, unless a restart would have mended it."""

    async def script(world: FakeWorld, lifecycle: Lifecycle) -> None:
        await until(lifecycle, State.READY)
        lifecycle.post_fault(Fault("engine_died", "it ended"))
        await asyncio.sleep(1)
        assert world.calls[-1] == "evidence.save"
        assert "evidence" in {task.get_name() for task in asyncio.all_tasks()}
        asked.append(asyncio.get_running_loop().time())
        if how == "stop":
            lifecycle.ask_to_stop("enough")
        else:
            (run,) = [t for t in asyncio.all_tasks() if "Lifecycle.run" in repr(t.get_coro())]
            run.cancel()

    asked: list[float] = []
    settings = Settings.model_validate({"restart": {"max": restarts}})
    with structlog.testing.capture_logs() as logs:
        life = live(script, settings=settings, evidence_save=HANG)
    causes = [entry["cause"] for entry in logs if entry["event"] == "stop_requested"]
    assert causes == ["enough" if how == "stop" else "run() was cancelled"]
    assert type(life.error) is ends
    assert life.took_s - asked[0] < 1


def test_without_the_port_nothing_is_saved() -> None:
    async def main() -> None:
        ports = FakeWorld().ports()
        ports.evidence = None
        lifecycle = Lifecycle(ports, NO_RESTARTS)
        run = asyncio.create_task(lifecycle.run())
        await asyncio.sleep(0)
        await until(lifecycle, State.READY)
        lifecycle.post_fault(Fault("engine_died", "it ended"))
        with pytest.raises(EngineDiedError):
            await run
        assert lifecycle.snapshot.evidence is None

    run_virtual(main())
