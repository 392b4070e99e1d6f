"""What a life tells: snapshot, log and journal."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
import structlog
from lifecycle_lives import (
    HANG,
    HEALTHY,
    MISSED,
    ORDER,
    Life,
    entries,
    live,
    nothing,
    stages,
    stop_when_ready,
    until,
)

from ichat_lifecycle.config import Settings
from ichat_lifecycle.control.view import retry_after_s
from ichat_lifecycle.errors import (
    DeadlineError,
    EngineDiedError,
    StartError,
    StopDeadlineError,
    TransitionRefused,
)
from ichat_lifecycle.journal import Kind, Snapshot, StageOutcome
from ichat_lifecycle.lifecycle import Lifecycle
from ichat_lifecycle.ports import Fault, Notice, Signs, Verdict, VerdictKind
from ichat_lifecycle.redact import Secrets
from ichat_lifecycle.states import State, Trigger
from ichat_lifecycle.testing.fakes import FakeWorld, say
from ichat_lifecycle.testing.plan import Outcome
from ichat_lifecycle.testing.virtual_time import run_virtual

# --- what is told of a life


def test_no_secret_is_recorded_of_a_life() -> None:
    """Whatever an engine's words and our own errors quote: all that others see comes from here."""
    secrets = Secrets()
    secrets.add("s3cret-value")
    words = "got s3cret-value", "caused by s3cret-value", "no s3cret-value"
    error = StartError(words[0], root_cause=words[1], hint=words[2])
    world = FakeWorld()
    told: list[Any] = []

    async def main() -> None:
        ports = replace(world.ports(), scrub=secrets.scrub)
        lifecycle = Lifecycle(ports, Settings.model_validate({"restart": {"max": 1}}))
        lifecycle.listeners.append(told.append)
        running = asyncio.create_task(lifecycle.run())
        await until(lifecycle, State.READY)
        recorder = lifecycle.recorder
        recorder.warn(Notice("odd", *words))
        recorder.judged(Verdict(VerdictKind.HUNG, Signs(error=words[0])))
        recorder.attempt(Trigger.BIND, State.READY, 1.0, error)
        recorder.stage("drain", StageOutcome.FAILED, 1.0, error=error)
        recorder.recovery("canary", 1, error=error)
        lifecycle.post_fault(Fault("engine_died", *words))
        await until(lifecycle, State.READY, restarts=1)
        lifecycle.fail(error)
        await asyncio.wait({running})
        assert running.exception() is error
        told.extend(record for kind in Kind for record in lifecycle.journal.records(kind))

    run_virtual(main())
    for shown in ("got ***", "caused by ***", "no ***"):
        assert shown in repr(told)
    assert "s3cret" not in repr(told)


def test_each_record_tells_how_long_its_action_took_and_why_it_was_made() -> None:
    async def script(world: FakeWorld, lifecycle: Lifecycle) -> None:
        await until(lifecycle, State.READY)
        lifecycle.post_fault(Fault("engine_died", "it ended"))
        await until(lifecycle, State.READY, restarts=1)
        say(world, MISSED, HEALTHY, HEALTHY)
        await asyncio.sleep(1)
        lifecycle.ask_to_stop("enough")

    settings = Settings.model_validate({"restart": {"max": 1}})
    life = live(script, settings=settings, binder_bind=Outcome(2), engine_start=Outcome(3))
    first = [(r.trigger, round(r.took_s, 3), r.cause) for r in life.lifecycle.journal.transitions]
    up = [(trigger, 0.0, None) for trigger in (Trigger.SERVE, Trigger.BECOME_READY)]
    missed = "the engine cannot be asked"
    assert first == [
        *((Trigger.BIND, 2.0, None), (Trigger.START_ENGINE, 3.0, None), *up),
        *((Trigger.DEGRADE, 0.0, "it ended"), (Trigger.RESTART_ENGINE, 0.0, "it ended")),
        *((Trigger.START_ENGINE, 3.0, None), *up),
        *((Trigger.DEGRADE, 0.0, missed), (Trigger.RECOVER, 0.0, None)),
        *((Trigger.STOP, 0.0, "enough"), (Trigger.FINISH, 0.0, None)),
    ]


def test_a_start_tells_how_far_it_has_come() -> None:
    phases: list[tuple[str, float | None]] = []

    def see(snapshot: Any) -> None:
        progress = (snapshot.progress.phase, snapshot.progress.fraction)
        if progress not in phases:
            phases.append(progress)

    async def script(world: FakeWorld, lifecycle: Lifecycle) -> None:
        lifecycle.listeners.append(see)
        await stop_when_ready(world, lifecycle)

    live(script, arguments_validate=Outcome(1))
    assert phases == [
        *(("importing", None), ("loading_weights", 0.5), ("building_app", None)),
        *(("waiting_for_health", None), ("warm_up", None), ("ready", None)),
    ]


LATE = {
    "control_start": "starting the control took longer than {bind_timeout:g} s",
    "arguments_validate": "validating the arguments took longer than {arguments_timeout:g} s",
    "binder_bind": "the action of bind took longer than {bind_timeout:g} s",
    "engine_start": "the action of start_engine took longer than {engine_timeout:g} s",
    "server_attach": "the action of serve took longer than {serve_timeout:g} s",
    "probe_warm_up": "proving readiness took longer than {ready_timeout:g} s",
    "watchdog_start": "the action of become_ready took longer than {bind_timeout:g} s",
}


@pytest.mark.parametrize(("step", "says"), LATE.items())
def test_a_deadline_says_what_was_late_and_by_which_limit(step: str, says: str) -> None:
    life = live(nothing, plan={step: HANG})
    assert str(life.error) == says.format(**dict(Settings().start))


NAMES = {
    "control_start": "control",
    "arguments_validate": "arguments",
    "binder_bind": "socket",
    "server_open": "server",
    "engine_start": "engine",
    "server_attach": "app",
    "probe_health": "health",
    "probe_warm_up": "warm-up",
    "watchdog_start": "watchdog",
}


@pytest.mark.parametrize(("step", "name"), NAMES.items())
def test_a_step_that_cancels_itself_is_a_failed_start_by_its_name(step: str, name: str) -> None:
    life = live(nothing, plan={step: Outcome(0.5, asyncio.CancelledError())})
    assert isinstance(life.error, StartError)
    assert life.error.code == "cancelled_from_within"
    assert life.error.message == f"{name} was cancelled from within"


def test_a_life_that_is_ended_from_outside_the_engine_drains_and_keeps_the_cause() -> None:
    causes = [StartError("refused"), StartError("refused again")]

    async def script(world: FakeWorld, lifecycle: Lifecycle) -> None:
        await until(lifecycle, State.READY)
        for cause in causes:
            lifecycle.fail(cause)

    life = live(script, server_drained=Outcome(2))
    assert life.error is causes[0]
    assert not getattr(life.error, "__notes__", [])
    assert (
        next(r.cause for r in life.lifecycle.journal.transitions if r.trigger is Trigger.STOP)
        == "refused"
    )
    assert life.took_s == pytest.approx(2, abs=0.5)
    assert "engine.release" in life.world.calls


def test_a_fault_keeps_all_that_is_known_of_it() -> None:
    async def script(world: FakeWorld, lifecycle: Lifecycle) -> None:
        await until(lifecycle, State.READY)
        lifecycle.post_fault(Fault("engine_died", "it ended", "oom", "less memory", "memory"))
        lifecycle.post_fault(Fault("server_exited", "a second one"))

    error = live(script).error
    assert isinstance(error, EngineDiedError)
    told = (error.code, error.message, error.root_cause, error.hint, error.category)
    assert told == ("engine_died", "it ended", "oom", "less memory", "memory")


def test_a_failed_restart_is_an_engine_that_died_with_the_causes_own_words() -> None:
    cause = StartError("no", code="no_memory", hint="less", root_cause="oom", category="memory")

    async def script(world: FakeWorld, lifecycle: Lifecycle) -> None:
        await until(lifecycle, State.READY)
        lifecycle.post_fault(Fault("engine_died", "it ended"))

    settings = Settings.model_validate({"restart": {"max": 1}})
    life = live(script, settings=settings, engine_start=[Outcome(), Outcome(1, cause)])
    assert isinstance(life.error, EngineDiedError)
    assert life.error.message == "the engine could not be restarted: no"
    assert (life.error.code, life.error.hint, life.error.root_cause) == ("no_memory", "less", "oom")
    assert life.error.category == "memory"
    assert life.error.__cause__ is cause


def test_an_engine_that_is_not_released_is_not_replaced() -> None:
    async def script(world: FakeWorld, lifecycle: Lifecycle) -> None:
        await until(lifecycle, State.READY)
        lifecycle.post_fault(Fault("engine_died", "it ended"))

    settings = Settings.model_validate({"restart": {"max": 1}})
    life = live(script, settings=settings, engine_release=HANG)
    assert isinstance(life.error, EngineDiedError)
    assert life.error.code == "engine_not_released"
    message = "not released in time: engine; a new engine beside it would fail"
    assert life.error.message == message
    notes = "later: StopDeadlineError: not released in time: engine"
    assert life.error.__notes__ == [notes]
    assert life.lifecycle.snapshot.reason is not None
    assert life.lifecycle.snapshot.reason.message == message
    assert life.world.calls.count("engine.start") == 1


@pytest.mark.parametrize(("ignores_s", "left"), [(0, "engine"), (1000, "engine, warm-up")])
def test_what_is_left_is_named_and_nothing_claims_the_end(ignores_s: float, left: str) -> None:
    """A resource whose release hung; and a call that ignored its cancellation."""

    async def main() -> Lifecycle:
        plan = {"probe.warm_up": Outcome(hang=True, ignore_cancel_s=ignores_s)}
        lifecycle = Lifecycle(FakeWorld(plan=plan | {"engine.release": HANG}).ports(), Settings())
        running = asyncio.create_task(lifecycle.run())
        await until(lifecycle, State.SERVING)
        lifecycle.ask_to_stop("test")
        with pytest.raises(StopDeadlineError) as caught:
            await running
        assert caught.value.message == f"not released in time: {left}"
        assert caught.value.hint == "what is left ends with the process"
        with pytest.raises(TransitionRefused, match="everything_released"):
            await lifecycle.fire(Trigger.FINISH)
        return lifecycle

    reason = run_virtual(main()).snapshot.reason
    assert reason is not None and reason.code == "stop_outran_deadline"


@pytest.mark.parametrize(
    ("plan", "left"),
    [
        ({"server_drained": Outcome(hang=True, ignore_cancel_s=1000)}, "drain"),
        ({"server_drained": HANG, "server_cut": Outcome(hang=True, ignore_cancel_s=1000)}, "cut"),
    ],
)
def test_a_drain_or_a_cut_that_goes_on_is_left_by_its_name(
    plan: dict[str, Outcome], left: str
) -> None:
    async def main() -> None:
        world = FakeWorld(plan={name.replace("_", "."): outcome for name, outcome in plan.items()})
        lifecycle = Lifecycle(world.ports(), Settings())
        running = asyncio.create_task(lifecycle.run())
        await until(lifecycle, State.READY)
        lifecycle.ask_to_stop("test")
        with pytest.raises(StopDeadlineError, match=f"^not released in time: {left}$"):
            await running

    run_virtual(main())


@pytest.mark.parametrize("cut_fails", [False, True])
def test_a_drain_that_fails_is_recorded_and_so_is_a_cut(cut_fails: bool) -> None:
    with structlog.testing.capture_logs() as logs:
        life = live(
            stop_when_ready,
            server_drained=Outcome(0, OSError("no")),
            server_cut=Outcome(0, OSError("no") if cut_fails else None),
        )
    assert life.error is None
    assert "server.cut" in life.world.calls
    drain, cut = stages(life)[:2]
    assert (drain["stage"], drain["outcome"], drain["error"]) == (
        "drain",
        "failed",
        "OSError('no')",
    )
    assert (cut["stage"], cut["outcome"]) == ("cut", "failed" if cut_fails else "done")
    told = [event["event"] for event in logs]
    assert ("cut_incomplete" in told) is cut_fails


def test_an_end_that_breaks_is_not_hidden_by_a_cancellation_of_the_same_moment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def broken(_: Lifecycle) -> None:
        await asyncio.sleep(1)
        raise OSError("broken")

    async def main() -> None:
        monkeypatch.setattr(Lifecycle, "_end", broken)
        lifecycle = Lifecycle(FakeWorld().ports(), Settings())
        lifecycle.ask_to_stop("test")
        running = asyncio.create_task(lifecycle.run())
        await asyncio.sleep(0.5)
        asyncio.get_running_loop().call_at(1, running.cancel)
        with pytest.raises(OSError, match="broken"):
            await running

    run_virtual(main())


def test_every_release_is_recorded_and_logged_and_a_failed_one_as_an_error() -> None:
    with structlog.testing.capture_logs() as logs:
        life = live(stop_when_ready, engine_release=Outcome(2.0126, OSError("late")))
    recorded = stages(life)
    assert [r["stage"] for r in recorded] == ["drain", *(f"release {name}" for name in ORDER[::-1])]
    assert [(r["stage"], r["took_s"], r["error"]) for r in recorded if r["outcome"] != "done"] == [
        ("release engine", 2.0126, "OSError('late')")
    ]
    told = [e for e in logs if e["event"] == "stage"]
    assert [e["stage"] for e in told] == [r["stage"] for r in recorded]
    assert [e["stage"] for e in told if e["log_level"] == "error"] == ["release engine"]


@pytest.mark.parametrize("ignores_s", [0, 1.2])
def test_a_cancellation_that_is_ignored_is_logged(ignores_s: float) -> None:
    async def script(world: FakeWorld, lifecycle: Lifecycle) -> None:
        await until(lifecycle, State.BOUND)
        lifecycle.ask_to_stop("test")

    with structlog.testing.capture_logs() as logs:
        live(script, engine_start=Outcome(hang=True, ignore_cancel_s=ignores_s))
    told = [event["task"] for event in logs if event["event"] == "cancellation_ignored"]
    assert told == (["engine"] if ignores_s else [])


@pytest.mark.parametrize("cause", [OSError("not ours"), StartError("ours")], ids=repr)
def test_an_error_nobody_has_words_for_is_logged_with_its_trace(cause: Exception) -> None:
    with structlog.testing.capture_logs() as logs:
        life = live(nothing, binder_bind=Outcome(0, cause))
    assert life.error is cause
    told = [event["event"] for event in logs if event["event"] == "unexpected_error"]
    assert told == (["unexpected_error"] if isinstance(cause, OSError) else [])


def test_a_failed_life_is_told_as_an_event_with_its_cause_and_hint() -> None:
    cause = StartError("no", code="no_memory", hint="less", root_cause="oom")
    with structlog.testing.capture_logs() as logs:
        live(nothing, engine_start=Outcome(0, cause))
    told = [event for event in logs if event["event"] == "life_failed"]
    assert [(t["code"], t["root_cause"], t["hint"]) for t in told] == [("no_memory", "oom", "less")]


def test_a_stop_that_was_asked_for_is_seen_before_it_begins() -> None:
    seen: list[tuple[State, bool]] = []

    async def script(world: FakeWorld, lifecycle: Lifecycle) -> None:
        await until(lifecycle, State.READY)
        lifecycle.listeners.append(lambda told: seen.append((told.state, told.stop_asked)))
        lifecycle.ask_to_stop("test")

    assert live(script).error is None
    assert seen[0] == (State.READY, True)


def test_the_tasks_of_a_life_are_named_after_what_goes_on() -> None:
    def named() -> set[str]:
        return {task.get_name() for task in asyncio.all_tasks()}

    async def script(world: FakeWorld, lifecycle: Lifecycle) -> None:
        world.health = False
        await until(lifecycle, State.SERVING)
        assert "between polls" in named()
        lifecycle.ask_to_stop("test")
        await until(lifecycle, State.STOPPING)
        assert {"lifecycle-end", "drain"} <= named()

    assert live(script, server_drained=Outcome(1)).error is None


def test_the_clock_of_a_life_is_its_loops() -> None:
    async def script(world: FakeWorld, lifecycle: Lifecycle) -> None:
        await until(lifecycle, State.READY)
        assert lifecycle.monotonic() == asyncio.get_running_loop().time() > 0
        lifecycle.ask_to_stop("test")

    assert Lifecycle(FakeWorld().ports(), Settings()).monotonic() == 0.0
    assert live(script, engine_start=Outcome(3)).error is None


def test_a_life_counts_from_run_not_from_when_it_was_made() -> None:
    async def main() -> None:
        lifecycle = Lifecycle(FakeWorld().ports(), Settings())
        made = lifecycle.snapshot.since
        await asyncio.sleep(5)
        lifecycle.ask_to_stop("test")
        seen: list[Snapshot] = []
        lifecycle.listeners.append(seen.append)
        await lifecycle.run()
        assert seen[0].state is State.PARSED
        assert (seen[0].since - made).total_seconds() == 5
        assert seen[0].since_mono_s == seen[0].progress.began_mono_s == 5

    run_virtual(main())


def test_stop_hooks_are_called_at_once() -> None:
    lifecycle = Lifecycle(FakeWorld().ports(), Settings())
    called: list[str] = []
    lifecycle.stop_hooks += [lambda: called.append("first"), lambda: called.append("second")]
    lifecycle.ask_to_stop("test")
    assert called == ["first", "second"]


# --- the journal


def test_a_drain_and_a_cut_tell_how_many_requests_ended() -> None:
    async def script(world: FakeWorld, lifecycle: Lifecycle) -> None:
        await until(lifecycle, State.READY)
        world.in_flight = 3
        asyncio.get_running_loop().call_later(2, setattr, world, "in_flight", 1)
        lifecycle.ask_to_stop("test")

    life = live(script, server_drained=Outcome(hang=True))
    drain, cut = stages(life)[:2]
    assert (drain["stage"], drain["outcome"], drain["took_s"]) == ("drain", "timed_out", 12)
    assert drain["ended"] == 2
    assert (cut["stage"], cut["outcome"], cut["ended"]) == ("cut", "done", 0)
    assert all(stage["ended"] is None for stage in stages(life)[2:])


def test_a_second_stop_interrupts_the_drain() -> None:
    async def script(world: FakeWorld, lifecycle: Lifecycle) -> None:
        await until(lifecycle, State.READY)
        lifecycle.ask_to_stop("test")
        await asyncio.sleep(3)
        lifecycle.ask_to_stop("again", now=True)

    drain = stages(live(script, server_drained=Outcome(hang=True)))[0]
    assert (drain["outcome"], drain["took_s"]) == ("interrupted", 3)


def test_a_release_past_its_deadline_is_told_from_one_that_failed() -> None:
    life = live(
        stop_when_ready,
        engine_release=Outcome(hang=True),
        server_detach=Outcome(error=OSError("no")),
    )
    outcomes = {stage["stage"]: stage["outcome"] for stage in stages(life)}
    assert outcomes["release app"] == "failed"
    assert outcomes["release engine"] == "timed_out"
    assert outcomes["release socket"] == "done"


def test_the_phases_of_a_start_are_recorded_with_their_times() -> None:
    async def script(world: FakeWorld, lifecycle: Lifecycle) -> None:
        await until(lifecycle, State.ENGINE_UP)
        lifecycle.report_phase("building_app", 0.5)
        await until(lifecycle, State.READY)
        lifecycle.ask_to_stop("test")

    life = live(script, engine_start=Outcome(2), server_attach=Outcome(1))
    recorded = entries(life, Kind.PHASE)
    assert [(e["phase"], e["fraction"], e["elapsed_s"]) for e in recorded] == [
        ("starting", None, 0),
        ("importing", None, 0),
        ("loading_weights", 0.5, 0),
        ("building_app", 0.5, 2),
        ("waiting_for_health", None, 3),
        ("warm_up", None, 3),
    ]
    progress = life.lifecycle.snapshot.progress
    assert progress.phases == tuple((e["phase"], e["elapsed_s"]) for e in recorded)


def test_each_step_of_a_recovery_is_recorded_with_what_is_left_of_the_budget() -> None:
    async def script(world: FakeWorld, lifecycle: Lifecycle) -> None:
        for restarts in range(3):
            await until(lifecycle, State.READY, restarts)
            lifecycle.post_fault(Fault("engine_died", "gone"))
        await lifecycle.ended()

    life = live(script, settings=Settings.model_validate({"restart": {"max": 2}}))
    recorded = entries(life, Kind.RECOVERY)
    assert [(e["step"], e["restarts_left"]) for e in recorded] == [
        *(("lost", 2), ("restart", 2)),
        *(("lost", 1), ("backoff", 1), ("restart", 1)),
        ("lost", 0),
    ]
    assert "gone" in recorded[0]["error"]
    assert 0 < recorded[3]["delay_s"] <= 1
    phases = [entry["phase"] for entry in entries(life, Kind.PHASE)]
    assert phases.count("restarting") == 2


def test_a_canary_that_fails_is_a_step_of_the_recovery() -> None:
    async def script(world: FakeWorld, lifecycle: Lifecycle) -> None:
        await until(lifecycle, State.READY)
        say(world, MISSED)
        await until(lifecycle, State.DEGRADED)
        say(world, HEALTHY, HEALTHY)
        await asyncio.sleep(1)
        lifecycle.ask_to_stop("test")

    life = live(script, probe_canary=Outcome(error=OSError("wrong text")))
    (canary,) = entries(life, Kind.RECOVERY)
    assert (canary["step"], canary["error"]) == ("canary", "wrong text")


def test_the_ids_count_all_that_happened() -> None:
    journal = live(stop_when_ready).lifecycle.journal
    seen = journal.since(0)
    assert [entry.id for entry in seen] == list(range(1, journal.last_id + 1))
    assert {entry.kind for entry in seen} >= {Kind.TRANSITION, Kind.PHASE, Kind.STAGE}


def attempts(life: Life) -> list[tuple[str, str, str, float, str]]:
    return [
        (e["trigger"], e["source"], e["outcome"], e["took_s"], e["error"])
        for e in entries(life, Kind.ATTEMPT)
    ]


def test_an_action_that_fails_is_an_attempt_that_failed() -> None:
    fails = Outcome(3, OSError("no memory"))
    life = live(nothing, arguments_validate=Outcome(2), engine_start=fails)
    assert attempts(life) == [("start_engine", "BOUND", "failed", 3, "no memory")]


def test_one_that_takes_too_long_failed_too() -> None:
    settings = Settings.model_validate({"start": {"engine_timeout": 7}})
    life = live(nothing, settings=settings, engine_start=HANG)
    ((trigger, _, outcome, took_s, error),) = attempts(life)
    assert (trigger, outcome, took_s) == ("start_engine", "failed", 7)
    assert "longer than 7 s" in error


def test_a_stop_in_the_middle_interrupts() -> None:
    async def script(world: FakeWorld, lifecycle: Lifecycle) -> None:
        await asyncio.sleep(2)
        lifecycle.ask_to_stop("test")

    life = live(script, engine_start=HANG)
    assert [a[:4] for a in attempts(life)] == [("start_engine", "BOUND", "interrupted", 2)]


def test_what_the_table_refuses_is_an_attempt_that_was_refused() -> None:
    async def script(world: FakeWorld, lifecycle: Lifecycle) -> None:
        await until(lifecycle, State.READY)
        with pytest.raises(TransitionRefused):
            await lifecycle.fire(Trigger.BIND)
        lifecycle.ask_to_stop("test")

    life = live(script)
    assert [a[:3] for a in attempts(life)] == [("bind", "READY", "refused")]


def test_what_succeeds_is_no_attempt() -> None:
    assert attempts(live(stop_when_ready)) == []


def test_restarts_left_is_what_the_budget_has_now() -> None:
    async def script(world: FakeWorld, lifecycle: Lifecycle) -> None:
        await until(lifecycle, State.READY)
        seen.append(lifecycle.restarts_left)
        lifecycle.post_fault(Fault("engine_died", "gone"))
        await until(lifecycle, State.READY, 1)
        seen.append(lifecycle.restarts_left)
        await lifecycle.command("restart")
        await until(lifecycle, State.READY, 2)
        seen.append(lifecycle.restarts_left)
        lifecycle.ask_to_stop("test")

    seen: list[int] = []
    life = live(script, settings=Settings.model_validate({"restart": {"max": 2}}))
    assert seen == [2, 1, 1]
    asked = entries(life, Kind.RECOVERY)[-1]
    assert (asked["step"], asked["restarts_left"]) == ("restart", 1), "that cost no budget"


def test_a_healthy_verdict_that_repeats_is_no_line_and_a_change_is_one() -> None:
    """Every 5 s a line that repeats the last one would be 17,280 a day."""
    idle, busy = Verdict(VerdictKind.IDLE, Signs(0.001)), Verdict(VerdictKind.BUSY, Signs(0.001))
    asleep = Verdict(VerdictKind.ASLEEP, Signs(0.001, asleep=True))
    compiling = Verdict(VerdictKind.BUSY, Signs(None, 10.0, compiling="cc1plus"))
    said = [
        *((idle, "debug"), (busy, "debug"), (idle, "debug"), (compiling, "info")),
        *((compiling, "debug"), (idle, "info"), (idle, "debug"), (MISSED, "warning")),
        *((MISSED, "warning"), (HEALTHY, "info"), (HEALTHY, "debug"), (HEALTHY, "debug")),
        *((asleep, "info"), (asleep, "debug"), (busy, "info"), (idle, "debug")),
    ]

    async def script(world: FakeWorld, lifecycle: Lifecycle) -> None:
        await until(lifecycle, State.READY)
        for verdict, _ in said:
            say(world, verdict)
            await asyncio.sleep(0.01)
        lifecycle.ask_to_stop("test")

    with structlog.testing.capture_logs() as logs:
        live(script)
    lines = [event for event in logs if event["event"] == "verdict"]
    assert [line["log_level"] for line in lines] == [level for _, level in said]


NO = Outcome(says_no=True)


@pytest.mark.parametrize(
    ("plan", "cause"),
    [
        ({"probe_health": NO}, "/health got 503"),
        ({"probe_health": HANG}, "/health has not answered"),
        ({"probe_warm_up": HANG}, "warm-up request 1 of 2 has not been answered"),
        ({"probe_warm_up": [Outcome(), HANG]}, "warm-up request 2 of 2 has not been answered"),
    ],
)
def test_a_readiness_that_is_never_proved_ends_with_what_came_instead(
    plan: dict[str, Any], cause: str
) -> None:
    life = live(nothing, plan=plan)
    assert isinstance(life.error, DeadlineError)
    assert life.error.root_cause == cause
    assert "start.ready_timeout" in (life.error.hint or "")


def test_a_recovery_is_expected_to_take_what_this_process_has_measured() -> None:
    """Not what a file has of whole starts, imports included; the newest engine counts."""
    seen: list[tuple[float | None, int, int]] = []

    async def script(world: FakeWorld, lifecycle: Lifecycle) -> None:
        lifecycle.recorder.expect(300.0, 5)
        for restarts in range(3):
            await until(lifecycle, State.READY, restarts)
            lifecycle.post_fault(Fault("engine_died", "it ended"))
            await until(lifecycle, State.BOUND, restarts + 1)
            progress = lifecycle.snapshot.progress
            seen.append((progress.expected_s, progress.expected_from, retry_after_s(lifecycle)))
        lifecycle.ask_to_stop("test")

    starts = [Outcome(7.5), Outcome(4), Outcome(40)]
    live(script, arguments_validate=Outcome(20), engine_start=starts, server_attach=Outcome(1))
    assert seen == [(8.5, 1, 9), (5.0, 1, 5), (41.0, 1, 30)]
