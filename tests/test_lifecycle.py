"""Lives of the real lifecycle on fake ports, under virtual time."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import structlog

from ichat_lifecycle.bounds import Interrupted
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
from ichat_lifecycle.journal import Kind, Snapshot
from ichat_lifecycle.lifecycle import Lifecycle
from ichat_lifecycle.ports import Fault, Signs, Verdict, VerdictKind
from ichat_lifecycle.states import TABLE, State, Trigger
from ichat_lifecycle.testing.fakes import FakeWorld, say
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


@pytest.mark.parametrize("code", ["engine_died", "server_exited"])
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


@pytest.mark.parametrize("drained", [Outcome(1), HANG], ids=["in_time", "late"])
def test_requests_are_drained_before_a_sleep_and_cut_only_if_late(drained: Outcome) -> None:
    async def script(world: FakeWorld, lifecycle: Lifecycle) -> None:
        await until(lifecycle, State.READY)
        await lifecycle.command("sleep", 1)
        calls = [call for call in world.calls if call in ("server.cut", "engine.sleep")]
        assert calls == ["server.cut", "engine.sleep"][0 if drained.hang else 1 :]
        lifecycle.ask_to_stop("test", now=True)

    assert live(script, server_drained=drained).error is None


def test_a_stop_during_a_commands_drain_cuts_nothing() -> None:
    async def script(world: FakeWorld, lifecycle: Lifecycle) -> None:
        await until(lifecycle, State.READY)
        command = asyncio.create_task(lifecycle.command("sleep", 1))
        await asyncio.sleep(1)
        lifecycle.ask_to_stop("test")
        await asyncio.gather(command, return_exceptions=True)

    life = live(script, server_drained=[HANG, Outcome(2)])
    assert life.error is None
    assert "server.cut" not in life.world.calls
    assert "engine.sleep" not in life.world.calls


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
        with pytest.raises(TransitionRefused, match=r"^sleep: not possible in PARSED$"):
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


def test_a_stop_does_not_wait_for_the_releases_of_a_restart() -> None:
    async def script(world: FakeWorld, lifecycle: Lifecycle) -> None:
        await until(lifecycle, State.READY)
        restart = asyncio.create_task(lifecycle.command("restart"))
        await asyncio.sleep(1)
        assert world.calls[-1] == "engine.release"
        lifecycle.ask_to_stop("test")
        await asyncio.sleep(0.1)
        assert lifecycle.snapshot.state is State.STOPPING
        await asyncio.gather(restart, return_exceptions=True)

    life = live(script, engine_release=Outcome(4))
    assert life.error is None
    assert life.world.released == ORDER[::-1]


def test_a_restart_on_request_that_loses_the_engine_ends_the_life() -> None:
    async def script(world: FakeWorld, lifecycle: Lifecycle) -> None:
        await until(lifecycle, State.READY)
        with pytest.raises(EngineDiedError, match="not released in time: app, engine; a new"):
            await lifecycle.command("restart")
        await lifecycle.ended()

    life = live(script, server_detach=HANG, engine_release=HANG)
    assert isinstance(life.error, EngineDiedError)
    assert life.error.code == "engine_not_released"


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


# --- what is told of a life


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


# --- evidence


def before(life: Life, first: str, second: str) -> bool:
    calls = life.world.calls
    return calls.index(first) < calls.index(second)


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


# --- verdicts while something else goes on


@pytest.mark.parametrize("command", ["wake", "reset_prefix_cache", "sleep", "restart"])
def test_a_verdict_under_a_command_is_judged_at_once(command: str) -> None:
    async def script(world: FakeWorld, lifecycle: Lifecycle) -> None:
        await until(lifecycle, State.READY)
        asking = asyncio.create_task(asked(lifecycle))
        await asyncio.sleep(1)
        say(world, MISSED)
        await asyncio.sleep(0.01)
        assert lifecycle.snapshot.reason is not None
        assert lifecycle.snapshot.reason.code == "engine_unresponsive"
        say(world, *[MISSED] * Settings().health.give_up_after)
        await asking

    async def asked(lifecycle: Lifecycle) -> None:
        with pytest.raises(LifecycleError, match="the engine hangs"):
            await lifecycle.command(command, 1)

    plan = {"engine_wake_up": HANG, "engine_reset_prefix_cache": HANG, "server_drained": HANG}
    life = live(script, settings=NO_RESTARTS, plan=plan)
    assert isinstance(life.error, EngineDiedError)
    assert life.error.code == "engine_hung"
    assert life.took_s < 30


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
