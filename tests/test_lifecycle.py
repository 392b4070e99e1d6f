"""Lives of the real lifecycle on fake ports, under virtual time."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from ichat_lifecycle.config import Settings
from ichat_lifecycle.errors import (
    AddressError,
    DeadlineError,
    EngineDiedError,
    ExitCode,
    LifecycleError,
    StartError,
    StopDeadlineError,
    TransitionRefused,
)
from ichat_lifecycle.lifecycle import Lifecycle
from ichat_lifecycle.ports import Fault, Verdict, VerdictKind
from ichat_lifecycle.states import TABLE, State, Trigger
from ichat_lifecycle.testing.fakes import FakeWorld, say
from ichat_lifecycle.testing.plan import Outcome
from ichat_lifecycle.testing.virtual_time import run_virtual

HEALTHY = Verdict(VerdictKind.HEALTHY, 0.001)
MISSED = Verdict(VerdictKind.MISSED)
ASLEEP = Verdict(VerdictKind.ASLEEP, 0.001)
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
    records = list(life.lifecycle.journal)
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


async def until(lifecycle: Lifecycle, state: State, restarts: int = 0) -> None:
    async with asyncio.timeout(10_000):
        while (lifecycle.snapshot.state, lifecycle.snapshot.restarts) != (state, restarts):
            await asyncio.sleep(0.01)


async def nothing(world: FakeWorld, lifecycle: Lifecycle) -> None:
    return None


async def stop_when_ready(world: FakeWorld, lifecycle: Lifecycle) -> None:
    await until(lifecycle, State.READY)
    lifecycle.ask_to_stop("test")


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
    assert [r.trigger for r in life.lifecycle.journal].count(Trigger.STOP) == 1


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

    life = live(script)
    assert isinstance(life.error, EngineDiedError)
    assert life.error.code == "engine_hung"
    assert life.error.exit_code == ExitCode.ENGINE_DIED
    assert State.DEGRADED in life.states


@pytest.mark.parametrize("code", ["engine_died", "server_exited"])
def test_a_fault_in_ready_degrades_and_ends_with_75(code: str) -> None:
    async def script(world: FakeWorld, lifecycle: Lifecycle) -> None:
        await until(lifecycle, State.READY)
        lifecycle.post_fault(Fault(code, "it ended"))

    life = live(script)
    assert isinstance(life.error, EngineDiedError)
    assert life.error.code == code
    assert life.states[-3:] == [State.DEGRADED, State.STOPPING, State.STOPPED]


def test_with_a_budget_a_dead_engine_is_restarted_and_the_socket_kept() -> None:
    async def script(world: FakeWorld, lifecycle: Lifecycle) -> None:
        await until(lifecycle, State.READY)
        lifecycle.post_fault(Fault("engine_died", "it ended"))
        await until(lifecycle, State.READY, restarts=1)
        lifecycle.ask_to_stop("test")

    life = live(script, settings=Settings.model_validate({"restart": {"max": 1}}))
    assert life.error is None
    assert life.lifecycle.snapshot.restarts == 1
    assert life.world.released.count("socket") == life.world.released.count("server") == 1
    assert life.world.released.count("engine") == 2


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


# --- commands


def test_asleep_is_not_ready_and_waking_leads_back_through_a_canary() -> None:
    async def script(world: FakeWorld, lifecycle: Lifecycle) -> None:
        await until(lifecycle, State.READY)
        await lifecycle.command("sleep", 1)
        assert world.asleep
        assert lifecycle.snapshot.state is State.DEGRADED
        assert lifecycle.snapshot.reason is not None
        assert lifecycle.snapshot.reason.code == "asleep"
        say(world, *[ASLEEP] * 20)  # healthy, for as long as it sleeps
        await asyncio.sleep(600)
        assert lifecycle.snapshot.state is State.DEGRADED
        await lifecycle.command("wake")
        say(world, HEALTHY, HEALTHY)
        await stop_when_ready(world, lifecycle)

    life = live(script)
    assert life.error is None
    assert life.world.calls.count("probe.canary") == 1


def test_an_engine_put_to_sleep_by_others_is_noticed() -> None:
    async def script(world: FakeWorld, lifecycle: Lifecycle) -> None:
        await until(lifecycle, State.READY)
        say(world, ASLEEP)
        await until(lifecycle, State.DEGRADED)
        lifecycle.ask_to_stop("test")

    assert live(script).error is None


def test_a_stale_answer_cannot_wake_a_sleeping_engine() -> None:
    async def script(world: FakeWorld, lifecycle: Lifecycle) -> None:
        await until(lifecycle, State.READY)
        command = asyncio.create_task(lifecycle.command("sleep", 1))
        await asyncio.sleep(0.5)
        say(world, HEALTHY, HEALTHY, HEALTHY)  # on their way while it fell asleep
        await command
        await asyncio.sleep(5)
        assert lifecycle.snapshot.state is State.DEGRADED
        lifecycle.ask_to_stop("test")

    assert live(script, engine_sleep=Outcome(1)).error is None


def test_a_command_in_the_wrong_state_is_refused_and_one_that_fails_says_so() -> None:
    async def script(world: FakeWorld, lifecycle: Lifecycle) -> None:
        with pytest.raises(TransitionRefused, match="not possible in"):
            await lifecycle.command("sleep", 1)
        await until(lifecycle, State.READY)
        with pytest.raises(LifecycleError, match="reset_prefix_cache failed: no"):
            await lifecycle.command("reset_prefix_cache")
        assert lifecycle.snapshot.state is State.READY
        lifecycle.ask_to_stop("test")

    assert live(script, engine_reset_prefix_cache=Outcome(0, ValueError("no"))).error is None


def test_a_command_that_a_stop_interrupts_is_answered() -> None:
    async def script(world: FakeWorld, lifecycle: Lifecycle) -> None:
        await until(lifecycle, State.READY)
        commands = [asyncio.create_task(lifecycle.command("sleep", 1)) for _ in range(3)]
        await asyncio.sleep(0.5)
        lifecycle.ask_to_stop("test")
        results = await asyncio.gather(*commands, return_exceptions=True)
        assert all(isinstance(result, TransitionRefused) for result in results)

    assert live(script, engine_sleep=HANG).error is None


def test_a_restart_on_request_needs_no_budget_and_drains_first() -> None:
    async def script(world: FakeWorld, lifecycle: Lifecycle) -> None:
        await until(lifecycle, State.READY)
        await lifecycle.command("restart")
        await until(lifecycle, State.READY, restarts=1)
        lifecycle.ask_to_stop("test")

    life = live(script)
    assert life.error is None
    assert life.lifecycle.snapshot.restarts == 1
    calls = life.world.calls
    assert calls.index("server.drained") < calls.index("engine.release")


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
        with pytest.raises(RuntimeError, match="runs once"):
            await life.lifecycle.run()

    run_virtual(main())


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

    run_virtual(main())
