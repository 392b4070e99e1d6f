"""Lives that once went wrong, each with what was found; kept, so that it is not found again."""

from __future__ import annotations

from typing import Any

import pytest

from ichat_lifecycle.base_backend import LifecycleBackend
from ichat_lifecycle.errors import (
    DeadlineError,
    EngineDiedError,
    ExitCode,
    StartError,
    StopDeadlineError,
    TransitionRefused,
)
from ichat_lifecycle.states import State
from ichat_lifecycle.testing.draw import SETTINGS
from ichat_lifecycle.testing.invariants import check
from ichat_lifecycle.testing.life import Life, Stage
from ichat_lifecycle.testing.plan import USUAL, Do, Event, Outcome, Plan

SHORT = SETTINGS["impatient"]
RESTARTS = SETTINGS["default"]
NO_RESTARTS = SETTINGS["no restarts"]
DEATH = Event(8.0, "engine_dies")


def lived(
    *events: tuple[float, Do] | tuple[float, Do, float],
    settings: Any = None,
    until_s: float = 20.0,
    **calls: tuple[Outcome, ...],
) -> Life:
    """The life of a plan; calls are written with _ for the dot."""
    named = {name.replace("_", ".", 1): outcomes for name, outcomes in calls.items()}
    happens = tuple(Event(*event) for event in events)
    with Stage() as stage:
        life = stage.live(Plan(settings or {}, named, happens, until_s), LifecycleBackend)
    check(life)
    return life


def test_a_probe_that_ignores_its_cancellation_is_not_followed_by_the_warm_up() -> None:
    """It went on to the warm-up in STOPPING: the deadline held for the sequence as a whole."""
    slow = Outcome(hang=True, ignore_cancel_s=0.3)
    life = lived(settings=SHORT, probe_health=(slow, USUAL))
    assert isinstance(life.error, DeadlineError)
    assert "probe.warm_up" not in life.world.calls


def test_a_bind_that_ignores_its_cancellation_is_not_followed_by_the_server() -> None:
    """It opened the server while the socket was being released, and nobody closed that."""
    life = lived((0.7, "stop"), binder_bind=(Outcome(hang=True, ignore_cancel_s=0.8),))
    assert life.world.held == ["control", "heartbeat", "socket"]
    assert life.lifecycle.snapshot.state is State.STOPPED


def test_a_server_that_exits_between_two_transitions_is_named() -> None:
    """The next trigger was refused by its guard, and the refusal became the cause."""
    life = lived((2.5, "server_exits"))
    assert isinstance(life.error, StartError)
    assert life.error.code == "server_exited"


def test_a_cancellation_from_within_is_no_cancellation_of_run() -> None:
    """The worker would have ended as if somebody had stopped it: with exit code 0."""
    life = lived(server_attach=(Outcome(error="CancelledError"),))
    assert isinstance(life.error, StartError)
    assert life.error.code == "cancelled_from_within"


def test_what_still_runs_at_the_end_is_told() -> None:
    """STOPPED was claimed while an action that ignored its cancellation was still at work."""
    life = lived((1.5, "stop"), engine_start=(Outcome(hang=True, ignore_cancel_s=40),))
    assert isinstance(life.error, StopDeadlineError)
    assert life.error.exit_code == ExitCode.STOP_OUTRAN_DEADLINE
    assert life.lifecycle.snapshot.state is State.STOPPING
    assert life.left == ["engine"]


def test_a_probe_that_fails_while_it_is_cancelled_is_heard() -> None:
    """Nobody asked for its error, and asyncio said so at some later time."""
    late = Outcome(delay_s=1.0, error="ValueError", ignore_cancel_s=0.5)
    life = lived((4.0, "stop"), engine_is_sleeping=(late, USUAL))
    assert life.unheard == []


def test_the_old_engines_end_is_not_the_new_ones() -> None:
    """A report that came late cost the new engine its life, and the budget another restart."""
    late: list[tuple[float, Do]] = [(12.0, "stale_fault"), (14.0, "stale_fault")]
    life = lived((8.0, "engine_dies"), *late, settings=RESTARTS)
    assert life.error is None
    assert life.lifecycle.snapshot.restarts == 1


def test_verdicts_on_the_old_engine_do_not_count_for_the_new_one() -> None:
    misses: list[tuple[float, Do]] = [(8.0, "probe_misses")] * 3
    life = lived((7.9, "restart"), *misses, settings=SHORT, until_s=25)
    states = [record.dest for record in life.lifecycle.journal.transitions]
    assert states.count(State.DEGRADED) == 1
    assert life.error is None


@pytest.mark.parametrize("call", ["server.attach", "probe.warm_up", "watchdog.start"])
def test_a_restart_that_fails_anywhere_is_the_end_of_an_engine_that_has_served(call: str) -> None:
    """Only a failure of the engine's own start ended with 75; the others looked like bad starts."""
    often = (USUAL, USUAL) if call == "probe.warm_up" else (USUAL,)
    plan = Plan(RESTARTS, {call: (*often, Outcome(error="StartError"))}, (DEATH,), 20.0)
    with Stage() as stage:
        life = stage.live(plan, LifecycleBackend)
    check(life)
    assert isinstance(life.error, EngineDiedError)
    assert life.error.exit_code == ExitCode.ENGINE_DIED
    assert isinstance(life.error.__cause__, StartError)


def test_a_command_that_waits_is_refused_as_stopping_begins() -> None:
    """It was refused when the stop had ended, a drain later."""
    life = lived(
        (8.0, "sleep"), (8.1, "wake"), (8.2, "stop"),
        engine_sleep=(Outcome(hang=True),), server_drained=(USUAL, Outcome(delay_s=5.0)),
    )  # fmt: skip
    refused = [at for at, what in life.happened if what.startswith("wake: ")]
    stopping = next(
        r.mono_s for r in life.lifecycle.journal.transitions if r.dest is State.STOPPING
    )
    assert refused == [stopping]


def test_a_refused_trigger_does_not_change_how_long_the_next_one_took() -> None:
    with Stage() as stage:
        plan = Plan(events=(Event(1.5, "fire", "recover"),), until_s=8.0)
        life = stage.live(plan, LifecycleBackend)
    assert [attempt.refused for attempt in life.attempts] == [True]
    took = {record.trigger.value: record.took_s for record in life.lifecycle.journal.transitions}
    assert took["start_engine"] == pytest.approx(2.0)


def test_a_life_that_was_stopped_and_failed_at_once_keeps_the_failure() -> None:
    life = lived((8.0, "engine_dies"), (8.0, "stop"), settings=RESTARTS)
    assert isinstance(life.error, EngineDiedError)


def test_a_fault_and_a_refusal_of_one_moment_keep_their_order() -> None:
    """The fault was latched, not yet noted, when the gateway's refusal took its place."""
    life = lived((8.0, "engine_dies"), (8.0, "gateway_refuses"), settings=NO_RESTARTS)
    assert isinstance(life.error, EngineDiedError)
    assert any("another worker has this name" in note for note in life.error.__notes__)


def test_no_new_engine_is_started_under_a_server_that_has_ended() -> None:
    """The engine died first, so that the server's end was ignored; the budget did the rest."""
    life = lived((8.0, "engine_dies"), (8.0, "server_exits"), settings=RESTARTS)
    assert isinstance(life.error, EngineDiedError)
    assert life.lifecycle.snapshot.restarts == 0


def test_a_probe_that_fails_as_the_watchdog_stops_is_heard() -> None:
    """It had failed before it could be cancelled, and nobody asked it for its error."""
    lived(
        (3.55, "restart"), settings=SHORT, until_s=10.0, server_cut=(Outcome(hang=True), USUAL),
        engine_is_sleeping=(USUAL, USUAL, Outcome(error="LimitError"), USUAL),
    )  # fmt: skip


def test_a_watchdog_that_ignores_its_cancellation_is_not_started_after_the_stop() -> None:
    """It was the fake that did: the real one starts without an await."""
    lived(
        (4.4, "stop"), (4.65, "cancel"), settings=SHORT, until_s=10.0,
        watchdog_start=(Outcome(hang=True, ignore_cancel_s=0.3), USUAL),
    )  # fmt: skip


def test_whom_a_closing_server_hangs_up_on_before_it_listens_has_asked_nothing() -> None:
    """It was the fake clients that counted a request of which no step was ever taken."""
    lived(
        (1.55, "gateway_refuses"), (1.75, "block_loop", 7.0), (2.15, "block_loop", 60.0),
        (10.9, "request", 3.0), settings=SHORT, until_s=10.0,
    )  # fmt: skip


@pytest.mark.parametrize("command", ["wake", "reset_prefix_cache"])
def test_an_engine_that_hangs_under_a_command_is_noticed_as_soon_as_any(command: Do) -> None:
    """Verdicts waited for the command's own deadline: for a minute nobody knew."""
    life = lived((7.9, "engine_freezes"), (8.0, command), settings=NO_RESTARTS, until_s=90.0)
    degraded = next(r for r in life.lifecycle.journal.transitions if r.dest is State.DEGRADED)
    assert degraded.mono_s - 7.9 <= life.settings.health.interval + life.settings.health.timeout
    assert isinstance(life.error, EngineDiedError)
    assert life.error.code == "engine_hung"


def test_a_canary_that_an_engine_answers_in_its_sleep_does_not_make_it_ready() -> None:
    canary = Outcome(delay_s=3.0)
    life = lived(
        (7.9, "sleep"), (10.0, "wake"), (13.0, "engine_falls_asleep"),
        until_s=40.0, probe_canary=(canary,),
    )  # fmt: skip
    assert all(
        record.dest is not State.READY for record in list(life.lifecycle.journal.transitions)[4:]
    )


def test_a_stop_between_a_loss_and_the_restart_is_an_end_not_a_refused_trigger() -> None:
    with Stage() as stage:
        for first in range(100):  # one of them is that moment, whatever a life's turns are
            turns = enumerate(_LOSS_AND_STOP, start=first)
            events = tuple(Event(0.0, do, turn=turn) for turn, do in turns)
            life = stage.live(Plan({}, {}, events, 6.0, 0.05), LifecycleBackend)
            check(life)
            assert not isinstance(life.error, TransitionRefused)


_LOSS_AND_STOP: tuple[Do, ...] = ("engine_dies", "restart", "stop")
