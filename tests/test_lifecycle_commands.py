"""What operators ask of a life, and verdicts while that goes on."""

from __future__ import annotations

import asyncio

import pytest
from lifecycle_lives import (
    ASLEEP,
    HANG,
    HEALTHY,
    MISSED,
    NO_RESTARTS,
    ORDER,
    live,
    stop_when_ready,
    until,
)

from ichat_lifecycle.config import Settings
from ichat_lifecycle.errors import (
    EngineDiedError,
    LifecycleError,
    TransitionRefused,
)
from ichat_lifecycle.lifecycle import Lifecycle
from ichat_lifecycle.states import State
from ichat_lifecycle.testing.fakes import FakeWorld, say
from ichat_lifecycle.testing.plan import Outcome

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


def test_a_command_that_nobody_waits_for_any_more_is_not_run_late() -> None:
    """Its caller was answered "no outcome in time" before its turn came."""

    async def script(world: FakeWorld, lifecycle: Lifecycle) -> None:
        await until(lifecycle, State.READY)
        first = asyncio.create_task(lifecycle.command("sleep", 1))
        second = asyncio.create_task(lifecycle.command("reset_prefix_cache"))
        await asyncio.sleep(0.5)
        second.cancel()
        await asyncio.gather(first, second, return_exceptions=True)
        await asyncio.sleep(5)
        lifecycle.ask_to_stop("test", now=True)

    life = live(script, engine_sleep=Outcome(1))
    assert life.error is None
    assert "engine.reset_prefix_cache" not in life.world.calls


@pytest.mark.parametrize("name", ["restart", "sleep", "wake", "reset_prefix_cache"])
@pytest.mark.parametrize("drain", [0.0, 120.0, 3600.0])
def test_whoever_asks_waits_longer_than_the_command_may_take(name: str, drain: float) -> None:
    """One deadline, derived from the settings; also of what waits for its turn behind others."""
    settings = Settings.model_validate({"stop": {"drain": drain}})
    own = settings.command_deadline(name)
    assert own > (drain + settings.stop.cut if name in ("restart", "sleep") else 0)
    releases = settings.stop.app + settings.stop.engine if name == "restart" else 0
    assert settings.command_bound(name) > own + releases

    async def script(world: FakeWorld, lifecycle: Lifecycle) -> None:
        await until(lifecycle, State.READY)
        alone = lifecycle.command_bound_s(name)
        assert alone == lifecycle.settings.command_bound(name)
        ahead = asyncio.create_task(lifecycle.command("sleep", 1))
        await asyncio.sleep(0.5)
        later = lifecycle.command_bound_s(name)
        assert later == alone + lifecycle.settings.command_bound("sleep")
        lifecycle.ask_to_stop("test", now=True)
        await asyncio.gather(ahead, return_exceptions=True)

    assert live(script, engine_sleep=HANG).error is None


def test_a_restart_whose_drain_takes_its_time_is_not_late() -> None:
    async def script(world: FakeWorld, lifecycle: Lifecycle) -> None:
        await until(lifecycle, State.READY)
        async with asyncio.timeout(lifecycle.command_bound_s("restart")):
            await lifecycle.command("restart")
        await until(lifecycle, State.READY, restarts=1)
        lifecycle.ask_to_stop("test", now=True)

    slow = Settings.model_validate({"stop": {"drain": 120}})
    assert live(script, settings=slow, server_drained=Outcome(119)).error is None


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
