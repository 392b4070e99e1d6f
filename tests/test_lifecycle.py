"""Lives of the real lifecycle on fake ports, under virtual time."""

from __future__ import annotations

import asyncio
import inspect
import threading
from typing import Any

import pytest
import structlog
from lifecycle_lives import (
    HANG,
    HEALTHY,
    MISSED,
    NO_RESTARTS,
    ORDER,
    Life,
    before,
    check_invariants,
    live,
    nothing,
    stop_when_ready,
    until,
)

from ichat_lifecycle.bounds import Interrupted
from ichat_lifecycle.config import Settings
from ichat_lifecycle.errors import (
    AddressError,
    DeadlineError,
    EngineDiedError,
    ExitCode,
    StartError,
    StopDeadlineError,
    TransitionRefused,
)
from ichat_lifecycle.lifecycle import Lifecycle
from ichat_lifecycle.ports import Fault
from ichat_lifecycle.states import State, Trigger
from ichat_lifecycle.testing.fakes import FakeWorld, say
from ichat_lifecycle.testing.plan import Outcome
from ichat_lifecycle.testing.virtual_time import run_virtual

# --- the way up and down


def test_a_life_goes_up_in_order_and_releases_in_reverse() -> None:
    life = live(stop_when_ready)
    assert life.error is None
    assert life.states == [*list(State)[:5], State.STOPPING, State.STOPPED]
    assert life.world.held == ORDER
    assert life.world.released == ORDER[::-1]
    assert life.world.calls.count("probe.warm_up") == 2


def test_ready_comes_only_after_health_and_every_warm_up() -> None:
    async def script(world: FakeWorld, lifecycle: Lifecycle) -> None:
        world.health = False
        await until(lifecycle, State.SERVING)
        await asyncio.sleep(20)
        assert lifecycle.snapshot.state is State.SERVING
        assert "probe.warm_up" not in world.calls
        world.health = True
        await stop_when_ready(world, lifecycle)

    life = live(script, settings=Settings.model_validate({"warm_up": {"requests": 3}}))
    assert life.error is None
    assert life.world.calls.count("probe.warm_up") == 3


# --- failures on the way up

STEPS = {
    "control_start": [],
    "arguments_validate": ["control", "heartbeat"],
    "binder_bind": ["control", "heartbeat"],
    "server_open": ["control", "heartbeat", "socket"],
    "engine_start": ["control", "heartbeat", "socket", "server"],
    "server_attach": ["control", "heartbeat", "socket", "server", "engine"],
    "probe_warm_up": ORDER[:6],
    "watchdog_start": ORDER[:6],
}


@pytest.mark.parametrize("step", STEPS)
def test_a_failing_step_ends_in_its_own_error_with_all_released(step: str) -> None:
    cause = AddressError("the first cause")
    life = live(nothing, plan={step: Outcome(0.5, cause)})
    assert life.error is cause
    assert life.states[-2:] == [State.STOPPING, State.STOPPED]
    assert set(STEPS[step]) <= set(life.world.held)
    assert life.world.released == life.world.held[::-1]
    assert life.lifecycle.snapshot.reason is not None
    assert life.lifecycle.snapshot.reason.message == "the first cause"


@pytest.mark.parametrize("step", STEPS)
def test_a_hanging_step_ends_at_its_deadline(step: str) -> None:
    life = live(nothing, plan={step: HANG})
    assert isinstance(life.error, DeadlineError)
    assert life.states[-1] is State.STOPPED
    start = Settings().start
    assert life.took_s <= sum(start.model_dump().values()) + Settings().stop_bound


@pytest.mark.parametrize("step", [s for s in STEPS if s != "control_start"])
def test_a_stop_in_the_middle_of_any_step_ends_clean(step: str) -> None:
    async def script(world: FakeWorld, lifecycle: Lifecycle) -> None:
        while step.replace("_", ".", 1) not in world.calls:
            await asyncio.sleep(0.01)
        lifecycle.ask_to_stop("test")

    life = live(script, plan={step: HANG})
    assert life.error is None
    assert life.states[-1] is State.STOPPED
    assert life.world.released == life.world.held[::-1]
    assert life.took_s < Settings().stop_bound


def test_a_stop_as_the_socket_is_bound_leaves_the_server_alone() -> None:
    async def script(world: FakeWorld, lifecycle: Lifecycle) -> None:
        def see() -> None:
            if world.history and world.history[-1].name == "binder.bind":
                lifecycle.ask_to_stop("test")

        world.observe = see  # called as each call begins, before it is written down, and as it ends

    life = live(script, binder_bind=Outcome(1))
    assert life.error is None
    assert life.world.held == ORDER[:3]
    assert life.world.released == ORDER[:3][::-1]


@pytest.mark.parametrize("step", [s for s in STEPS if s != "control_start"])
def test_cancelling_run_in_any_step_ends_clean_and_reaches_the_caller(step: str) -> None:
    async def main() -> Life:
        life = Life(FakeWorld(plan={step.replace("_", ".", 1): HANG}))
        run = asyncio.create_task(life.lifecycle.run())
        while step.replace("_", ".", 1) not in life.world.calls:
            await asyncio.sleep(0.01)
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run
        return life

    life = run_virtual(main())
    check_invariants(life)
    assert life.states[-1] is State.STOPPED
    assert life.world.released == life.world.held[::-1]


def test_an_action_that_comes_back_late_cannot_change_the_state() -> None:
    async def script(world: FakeWorld, lifecycle: Lifecycle) -> None:
        while "engine.start" not in world.calls:
            await asyncio.sleep(0.01)
        lifecycle.ask_to_stop("test")
        await until(lifecycle, State.STOPPED)

    # It swallows the cancellation and "succeeds" in the middle of the drain.
    life = live(
        script,
        engine_start=Outcome(hang=True, ignore_cancel_s=3),
        server_drained=Outcome(10),
    )
    assert State.ENGINE_UP not in life.states
    assert life.states[-1] is State.STOPPED


def test_an_engine_that_dies_while_it_serves_no_one_yet_is_a_failed_start() -> None:
    async def script(world: FakeWorld, lifecycle: Lifecycle) -> None:
        world.health = False
        await until(lifecycle, State.SERVING)
        lifecycle.post_fault(Fault("engine_died", "killed", "oom"))

    life = live(script)
    assert isinstance(life.error, StartError)
    assert life.error.exit_code == ExitCode.ENGINE_START_FAILED
    assert life.error.root_cause == "oom"


# --- stopping


def test_a_stop_drains_first_and_cuts_nothing_that_ends_in_time() -> None:
    life = live(stop_when_ready, server_drained=Outcome(10))
    assert "server.cut" not in life.world.calls
    assert life.took_s == pytest.approx(10, abs=1)


def test_what_outlasts_the_drain_is_cut_at_the_deadline() -> None:
    life = live(stop_when_ready, server_drained=HANG)
    calls = life.world.calls
    assert calls.index("server.drained") < calls.index("server.cut") < calls.index("watchdog.stop")
    assert life.took_s == pytest.approx(Settings().stop.drain, abs=1)


def test_a_second_stop_at_once_ends_the_drain_and_kills_the_engine() -> None:
    async def script(world: FakeWorld, lifecycle: Lifecycle) -> None:
        await stop_when_ready(world, lifecycle)
        await asyncio.sleep(1)
        lifecycle.ask_to_stop("again", now=True)

    life = live(script, server_drained=HANG)
    assert life.error is None
    assert life.took_s < 2
    assert "engine.release_now" in life.world.calls


def test_hurrying_an_engine_release_under_way_kills_it() -> None:
    async def script(world: FakeWorld, lifecycle: Lifecycle) -> None:
        await stop_when_ready(world, lifecycle)
        while "engine.release" not in world.calls:
            await asyncio.sleep(0.01)
        lifecycle.ask_to_stop("again", now=True)

    life = live(script, engine_release=Outcome(2))
    assert "engine.kill" in life.world.calls


def test_a_second_stop_runs_no_action_and_both_callers_get_the_same_end() -> None:
    ends: list[State] = []

    async def script(world: FakeWorld, lifecycle: Lifecycle) -> None:
        await until(lifecycle, State.READY)

        async def stop() -> None:
            lifecycle.ask_to_stop("test")
            await lifecycle.ended()
            ends.append(lifecycle.snapshot.state)

        await asyncio.gather(stop(), stop())

    life = live(script, server_drained=Outcome(1))
    assert life.world.released == ORDER[::-1]
    assert [r.trigger for r in life.lifecycle.journal.transitions].count(Trigger.STOP) == 1


def test_a_release_that_hangs_is_bounded_and_stopped_is_not_claimed() -> None:
    life = live(stop_when_ready, engine_release=HANG)
    assert isinstance(life.error, StopDeadlineError)
    assert life.error.exit_code == ExitCode.STOP_OUTRAN_DEADLINE
    assert life.states[-1] is State.STOPPING
    assert life.took_s <= Settings().stop_bound + 1
    assert set(life.world.released) == set(ORDER)  # the others were released all the same


def test_the_first_cause_survives_the_errors_of_the_clean_up() -> None:
    cause = StartError("the first cause")
    life = live(
        nothing, server_attach=Outcome(0, cause), engine_release=Outcome(0, OSError("late"))
    )
    assert life.error is cause
    assert any("engine" in note for note in getattr(cause, "__notes__", []))


def test_the_worst_life_ends_within_the_computed_bound() -> None:
    world = FakeWorld(
        plan={
            name: Outcome(hang=True, ignore_cancel_s=1000)
            for name in (
                "server.drained", "server.cut", "watchdog.stop", "server.detach", "engine.release",
                "server.close", "binder.release", "control.stop", "heartbeat.stop",
            )
        }
    )  # fmt: skip
    asked: list[float] = []

    async def main() -> tuple[BaseException | None, float]:
        life = Life(world)
        run = asyncio.create_task(life.lifecycle.run())
        await until(life.lifecycle, State.READY)
        asked.append(asyncio.get_running_loop().time())
        life.lifecycle.ask_to_stop("test")
        await asyncio.wait({run})
        return run.exception(), asyncio.get_running_loop().time() - asked[0]

    error, took_s = run_virtual(main())
    assert isinstance(error, StopDeadlineError)
    assert took_s <= Settings().stop_bound


# --- READY and DEGRADED


def test_a_miss_degrades_and_answers_with_a_canary_recover() -> None:
    async def script(world: FakeWorld, lifecycle: Lifecycle) -> None:
        await until(lifecycle, State.READY)
        say(world, HEALTHY, MISSED)
        await until(lifecycle, State.DEGRADED)
        assert lifecycle.snapshot.reason is not None
        assert lifecycle.snapshot.reason.code == "engine_unresponsive"
        say(world, HEALTHY)
        await asyncio.sleep(1)
        assert lifecycle.snapshot.state is State.DEGRADED  # one answer is not two in a row
        say(world, HEALTHY)
        await stop_when_ready(world, lifecycle)

    life = live(script)
    assert life.error is None
    assert life.states[4:7] == [State.READY, State.DEGRADED, State.READY]
    assert life.lifecycle.snapshot.reason is None
    assert life.world.calls.count("probe.canary") == 1
    assert "engine.release" not in life.world.calls[: life.world.calls.index("probe.canary")]


def test_healthy_answers_from_before_do_not_count_for_a_recovery() -> None:
    async def script(world: FakeWorld, lifecycle: Lifecycle) -> None:
        await until(lifecycle, State.READY)
        say(world, *[HEALTHY] * 50, MISSED, HEALTHY, MISSED, HEALTHY)
        await asyncio.sleep(1)
        assert lifecycle.snapshot.state is State.DEGRADED
        lifecycle.ask_to_stop("test")

    life = live(script)
    assert "probe.canary" not in life.world.calls


def test_the_machine_itself_refuses_a_recovery_after_too_few_answers() -> None:
    async def script(world: FakeWorld, lifecycle: Lifecycle) -> None:
        await until(lifecycle, State.READY)
        say(world, MISSED, HEALTHY)
        await asyncio.sleep(1)
        with pytest.raises(TransitionRefused, match="healthy_in_a_row"):
            await lifecycle.fire(Trigger.RECOVER)
        lifecycle.ask_to_stop("test")

    assert live(script).error is None


def test_a_canary_that_fails_or_hangs_keeps_it_degraded() -> None:
    async def script(world: FakeWorld, lifecycle: Lifecycle) -> None:
        await until(lifecycle, State.READY)
        say(world, MISSED, HEALTHY, HEALTHY)  # the first canary fails
        await asyncio.sleep(1)
        say(world, HEALTHY, HEALTHY)  # the second hangs
        await asyncio.sleep(60)
        assert lifecycle.snapshot.state is State.DEGRADED
        say(world, HEALTHY, HEALTHY)
        await stop_when_ready(world, lifecycle)

    life = live(script, probe_canary=[Outcome(0, StartError("no")), HANG, Outcome()])
    assert life.world.calls.count("probe.canary") == 3


def test_too_many_misses_end_with_75_and_the_cause() -> None:
    async def script(world: FakeWorld, lifecycle: Lifecycle) -> None:
        await until(lifecycle, State.READY)
        say(world, *[MISSED] * Settings().health.give_up_after)

    life = live(script, settings=NO_RESTARTS)
    assert isinstance(life.error, EngineDiedError)
    assert life.error.code == "engine_hung"
    assert life.error.exit_code == ExitCode.ENGINE_DIED
    assert State.DEGRADED in life.states


@pytest.mark.parametrize("code", ["engine_died", "server_exited", "watchdog_failed"])
def test_a_fault_in_ready_degrades_and_ends_with_75(code: str) -> None:
    async def script(world: FakeWorld, lifecycle: Lifecycle) -> None:
        await until(lifecycle, State.READY)
        lifecycle.post_fault(Fault(code, "it ended"))

    life = live(script, settings=NO_RESTARTS)
    assert isinstance(life.error, EngineDiedError)
    assert life.error.code == code
    assert life.states[-3:] == [State.DEGRADED, State.STOPPING, State.STOPPED]


@pytest.mark.parametrize("code", ["engine_died", "unheard_of"])
def test_with_a_budget_a_dead_engine_is_restarted_and_the_socket_kept(code: str) -> None:
    async def script(world: FakeWorld, lifecycle: Lifecycle) -> None:
        await until(lifecycle, State.READY)
        lifecycle.post_fault(Fault(code, "it ended"))
        await until(lifecycle, State.READY, restarts=1)
        lifecycle.ask_to_stop("test")

    life = live(script, settings=Settings.model_validate({"restart": {"max": 1}}))
    assert life.error is None
    assert life.lifecycle.snapshot.restarts == 1
    assert life.world.released.count("socket") == life.world.released.count("server") == 1
    assert life.world.released.count("engine") == 2
    # What the dead engine was working on gets an answer before its app goes away.
    calls = life.world.calls
    assert calls.index("server.cut") < calls.index("watchdog.stop") < calls.index("engine.release")


def test_what_a_replaced_engine_tells_is_no_fault_of_its_successor() -> None:
    async def script(world: FakeWorld, lifecycle: Lifecycle) -> None:
        await until(lifecycle, State.READY)
        restart = asyncio.create_task(lifecycle.command("restart"))
        await asyncio.sleep(1)
        assert world.calls[-1] == "engine.release"
        world.faults[0](Fault("engine_died", "of course"))
        await restart
        await until(lifecycle, State.READY, restarts=1)
        world.faults[0](Fault("engine_died", "late"))
        await asyncio.sleep(1)
        assert lifecycle.snapshot.state is State.READY
        lifecycle.ask_to_stop("test")

    assert live(script, engine_release=Outcome(2)).error is None


def test_a_watchdog_that_fails_ends_ready_and_the_next_engine_has_a_new_one() -> None:
    """Its report counts for the engine that it watched, and for no other."""

    async def script(world: FakeWorld, lifecycle: Lifecycle) -> None:
        await until(lifecycle, State.READY)
        report = world.on_watchdog_fault
        assert report is not None
        report(Fault("watchdog_failed", "the watchdog has ended by itself"))
        await until(lifecycle, State.READY, restarts=1)
        assert world.on_watchdog_fault is not report
        report(Fault("watchdog_failed", "the old one again"))
        await asyncio.sleep(1)
        lifecycle.ask_to_stop("enough")

    life = live(script)
    assert life.error is None
    assert life.states.count(State.DEGRADED) == 1
    assert life.world.calls.count("watchdog.start") == 2


def test_when_the_budget_is_spent_it_ends() -> None:
    async def script(world: FakeWorld, lifecycle: Lifecycle) -> None:
        for restarts in range(2):
            await until(lifecycle, State.READY, restarts)
            lifecycle.post_fault(Fault("engine_died", "it ended"))

    life = live(script, settings=Settings.model_validate({"restart": {"max": 1}}))
    assert isinstance(life.error, EngineDiedError)
    assert life.lifecycle.snapshot.restarts == 1


def test_a_fault_after_the_stop_was_asked_for_is_no_failure() -> None:
    async def script(world: FakeWorld, lifecycle: Lifecycle) -> None:
        await stop_when_ready(world, lifecycle)
        lifecycle.post_fault(Fault("engine_died", "of course"))

    assert live(script, server_drained=Outcome(1)).error is None


def test_a_fault_just_before_a_stop_is_not_hidden_by_it() -> None:
    async def script(world: FakeWorld, lifecycle: Lifecycle) -> None:
        await until(lifecycle, State.READY)
        lifecycle.post_fault(Fault("engine_died", "it ended"))
        lifecycle.ask_to_stop("test")

    assert isinstance(live(script).error, EngineDiedError)


def test_a_stop_as_the_engine_is_lost_hides_no_fault_and_starts_no_other() -> None:
    async def script(world: FakeWorld, lifecycle: Lifecycle) -> None:
        def see(snapshot: Any) -> None:
            if snapshot.state is State.DEGRADED:
                lifecycle.ask_to_stop("a listener")

        await until(lifecycle, State.READY)
        lifecycle.listeners.append(see)
        lifecycle.post_fault(Fault("engine_died", "it ended"))

    life = live(script, settings=Settings.model_validate({"restart": {"max": 1}}))
    assert isinstance(life.error, EngineDiedError)
    assert life.error.message == "it ended"
    assert life.world.calls.count("engine.start") == 1


def test_the_machine_itself_refuses_a_restart_once_a_stop_was_asked_for() -> None:
    async def script(world: FakeWorld, lifecycle: Lifecycle) -> None:
        await until(lifecycle, State.READY)
        say(world, MISSED)
        await until(lifecycle, State.DEGRADED)
        lifecycle.ask_to_stop("test")
        with pytest.raises(TransitionRefused, match="guard no_stop_asked does not hold"):
            await lifecycle.fire(Trigger.RESTART_ENGINE)

    settings = Settings.model_validate({"restart": {"max": 1}})
    assert live(script, settings=settings).error is None


# --- the rest


def test_a_stop_before_run_is_not_lost() -> None:
    async def main() -> list[str]:
        life = Life(FakeWorld())
        life.lifecycle.ask_to_stop("early")
        await life.lifecycle.run()
        return life.world.held

    assert run_virtual(main()) == []


def test_a_lifecycle_runs_once() -> None:
    async def main() -> None:
        life = Life(FakeWorld())
        life.lifecycle.ask_to_stop("test")
        await life.lifecycle.run()
        with pytest.raises(RuntimeError, match=r"^a lifecycle runs once"):
            await life.lifecycle.run()

    run_virtual(main())


def test_what_another_thread_asks_for_happens_on_the_loop() -> None:
    told_in: set[threading.Thread] = set()

    async def script(world: FakeWorld, lifecycle: Lifecycle) -> None:
        await until(lifecycle, State.READY)
        lifecycle.listeners.append(lambda _: told_in.add(threading.current_thread()))
        other = threading.Thread(target=lifecycle.ask_to_stop, args=("another thread",))
        other.start()
        other.join()
        assert not lifecycle.snapshot.stop_asked  # the loop has not had its turn yet

    assert live(script).error is None
    assert told_in == {threading.current_thread()}


def test_what_is_asked_for_after_the_loop_was_closed_harms_nobody() -> None:
    life = live(stop_when_ready)
    before = life.lifecycle.snapshot
    life.lifecycle.ask_to_stop("late", now=True)
    assert life.lifecycle.snapshot is before


def _fail(_: Any) -> None:
    raise ValueError


def test_a_failing_listener_harms_nobody() -> None:
    async def main() -> None:
        life = Life(FakeWorld())
        life.lifecycle.listeners.insert(0, _fail)
        run = asyncio.create_task(life.lifecycle.run())
        await until(life.lifecycle, State.READY)
        life.lifecycle.ask_to_stop("test")
        await run

    with structlog.testing.capture_logs() as logs:  # a trace in colours takes half a second
        run_virtual(main())
    assert "listener_failed" in [event["event"] for event in logs]


@pytest.mark.parametrize("stopped_before", [False, True])
def test_cancelling_run_drains_and_cancelling_what_ends_hurries_it(stopped_before: bool) -> None:
    async def main() -> tuple[float, list[str]]:
        life = Life(FakeWorld(plan={"server.drained": Outcome(5)}))
        run = asyncio.create_task(life.lifecycle.run())
        await until(life.lifecycle, State.READY)
        if stopped_before:
            life.lifecycle.ask_to_stop("test")
            await asyncio.sleep(1)
        began = asyncio.get_running_loop().time()
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run
        assert life.states[-1] is State.STOPPED
        stop = next(r for r in life.lifecycle.journal.transitions if r.trigger is Trigger.STOP)
        assert stop.cause == ("test" if stopped_before else "run() was cancelled")
        return asyncio.get_running_loop().time() - began, life.world.calls

    took_s, calls = run_virtual(main())
    assert took_s == pytest.approx(0 if stopped_before else 5, abs=0.1)
    assert ("engine.release_now" if stopped_before else "engine.release") in calls


def test_an_engine_that_is_not_alive_is_not_served() -> None:
    async def script(world: FakeWorld, lifecycle: Lifecycle) -> None:
        def die(snapshot: Any) -> None:
            world.alive = snapshot.state is not State.ENGINE_UP

        lifecycle.listeners.append(die)

    life = live(script, engine_start=Outcome(1))
    assert isinstance(life.error, TransitionRefused)
    assert life.error.message == "serve from ENGINE_UP: guard engine_alive does not hold"
    assert "app" not in life.world.held


@pytest.mark.parametrize("state", list(State)[1:5])
def test_a_stop_in_the_very_step_of_a_change_is_no_failure(state: State) -> None:
    async def script(world: FakeWorld, lifecycle: Lifecycle) -> None:
        def see(snapshot: Any) -> None:
            if snapshot.state is state:
                lifecycle.ask_to_stop("a listener")

        lifecycle.listeners.append(see)

    life = live(script, arguments_validate=Outcome(1))
    assert life.error is None
    assert life.states[-3:] == [state, State.STOPPING, State.STOPPED]


# --- limits of time


@pytest.mark.parametrize(
    ("outer", "inner", "counts"), [(1, 2, "outer"), (2, 1, "inner"), (1, 1, "outer")]
)
def test_the_nearest_deadline_counts(outer: float, inner: float, counts: str) -> None:
    async def main() -> None:
        lifecycle = Lifecycle(FakeWorld().ports(), Settings())
        with (
            lifecycle.deadline(outer, "outer"),
            lifecycle.deadline(inner, "inner"),
            pytest.raises(DeadlineError, match=rf"^{counts} took longer than 1 s$"),
        ):
            await lifecycle.bounded(asyncio.sleep(10), "sleeping")
        assert asyncio.get_running_loop().time() == pytest.approx(1)

    run_virtual(main())


def test_after_an_inner_deadline_the_outer_one_holds_again_and_then_none() -> None:
    async def main() -> None:
        lifecycle = Lifecycle(FakeWorld().ports(), Settings())
        with lifecycle.deadline(5, "outer"):
            with lifecycle.deadline(1, "inner"):
                pass
            with pytest.raises(DeadlineError, match=r"^outer took longer than 5 s$"):
                await lifecycle.bounded(asyncio.sleep(10), "sleeping")
        await lifecycle.bounded(asyncio.sleep(100), "sleeping")

    run_virtual(main())


def test_a_call_gets_what_its_predecessors_have_left_of_a_deadline() -> None:
    async def main() -> None:
        lifecycle = Lifecycle(FakeWorld().ports(), Settings())
        with lifecycle.deadline(1, "both"):
            await lifecycle.bounded(asyncio.sleep(0.9), "first")
            with pytest.raises(DeadlineError):
                await lifecycle.bounded(asyncio.sleep(10), "second")
        assert asyncio.get_running_loop().time() == pytest.approx(1)

    run_virtual(main())


def test_a_call_that_may_not_begin_is_closed() -> None:
    async def main() -> None:
        lifecycle = Lifecycle(FakeWorld().ports(), Settings())
        lifecycle.ask_to_stop("test")
        call = asyncio.sleep(1)
        with pytest.raises(Interrupted):
            await lifecycle.bounded(call, "sleeping")
        assert inspect.getcoroutinestate(call) == inspect.CORO_CLOSED

    run_virtual(main())


@pytest.mark.parametrize("call", ["arguments.validate", "engine.start", "probe.warm_up"])
def test_a_cancellation_of_run_ends_the_call_that_is_under_way(call: str) -> None:
    async def script(world: FakeWorld, lifecycle: Lifecycle) -> None:
        while world.calls[-1:] != [call]:
            await asyncio.sleep(0)
        (run,) = [t for t in asyncio.all_tasks() if "Lifecycle.run" in repr(t.get_coro())]
        run.cancel()

    life = live(script, plan={call.replace(".", "_", 1): HANG})
    assert isinstance(life.error, asyncio.CancelledError)
    (ended,) = [each for each in life.world.history if each.name == call]
    assert ended.cancelled
    assert life.took_s < 1


def test_a_restart_cuts_what_has_begun_since_the_drain() -> None:
    """What only reads may pass in DEGRADED, and would find its app gone."""

    async def script(world: FakeWorld, lifecycle: Lifecycle) -> None:
        await until(lifecycle, State.READY)
        await lifecycle.command("restart")
        lifecycle.ask_to_stop("enough")

    life = live(script)
    assert before(life, "server.drained", "server.cut")
    assert before(life, "server.cut", "server.detach")


# --- the operator's own warm-up requests


def _with_extra(*required: bool) -> Settings:
    extra = [{"path": "/v1/x", "body": {}, "name": "mine", "required": r} for r in required]
    return Settings.model_validate({"warm_up": {"requests": 1, "extra": extra}})


def test_each_extra_request_is_made_once_for_each_engine_and_before_ready() -> None:
    async def script(world: FakeWorld, lifecycle: Lifecycle) -> None:
        await until(lifecycle, State.READY)
        assert world.calls.count("probe.request") == 2
        lifecycle.post_fault(Fault("engine_died", "it ended"))
        await until(lifecycle, State.READY, restarts=1)
        assert world.calls.count("probe.request") == 4
        lifecycle.ask_to_stop("test")

    life = live(script, settings=_with_extra(True, False))
    assert life.error is None
    calls = life.world.calls
    assert calls.index("probe.warm_up") < calls.index("probe.request")
    assert calls.index("probe.request") < calls.index("watchdog.start")


def test_an_extra_request_that_fails_is_a_failed_start_and_is_named() -> None:
    refused = StartError("/v1/x answers 400", root_cause="no such schema")
    outcomes = [Outcome(), Outcome(0, refused)]
    life = live(nothing, settings=_with_extra(True, True), probe_request=outcomes)
    assert isinstance(life.error, StartError)
    assert life.error.line().startswith(
        "warm_up.extra.1 (mine): /v1/x answers 400; cause: no such schema; hint: "
    )
    assert life.error.code == "warm_up_failed"


def test_one_that_is_not_required_is_a_warning_which_goes_with_its_engine() -> None:
    refused = StartError("/v1/x answers 400", root_cause="no such schema")

    async def script(world: FakeWorld, lifecycle: Lifecycle) -> None:
        await until(lifecycle, State.READY)
        (warning,) = lifecycle.snapshot.warnings
        assert warning.code == "warm_up_extra_0_failed"
        assert warning.message == "warm_up.extra.0 (mine): /v1/x answers 400"
        assert warning.root_cause == "no such schema"
        lifecycle.post_fault(Fault("engine_died", "it ended"))
        await until(lifecycle, State.READY, restarts=1)
        assert lifecycle.snapshot.warnings == ()
        lifecycle.ask_to_stop("test")

    outcomes = [Outcome(0, refused), Outcome()]
    assert live(script, settings=_with_extra(False), probe_request=outcomes).error is None
