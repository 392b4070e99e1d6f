"""What excuses a silence, for how long, and a watchdog that must not end unheard."""

from __future__ import annotations

import asyncio

import pytest
from structlog.testing import capture_logs
from watched_engine import BUSY, HEALTH, HUNG, IDLE, TOKENS, Rpc, Watch, now, watch

from ichat_lifecycle.config import Health
from ichat_lifecycle.ports import Fault

STOP_PROFILE = "POST /stop_profile"
SILENT = 1e6
SHORT = Health(interval=5, timeout=10, token_interval=0, admin_timeout=45, compile_timeout=0)


def kinds(seen: Watch) -> list[str]:
    return [kind for _, kind in seen.said]


def test_an_engine_that_does_what_an_administrator_asked_is_busy() -> None:
    """A profile is written for minutes: killed after 60 s it would never be."""
    seen = watch(Rpc(takes_s=SILENT, admin=(STOP_PROFILE, 0.0)), 301)
    assert set(kinds(seen)) == {BUSY}
    assert {v.signs.admin_request for v in seen.verdicts} == {STOP_PROFILE}


def test_the_token_of_an_idle_engine_waits_for_an_administrator_too() -> None:
    seen = watch(Rpc(token_takes_s=SILENT, admin=(STOP_PROFILE, 14.0)), 100, TOKENS)
    assert HUNG not in kinds(seen)


def test_an_administrators_request_excuses_no_hang_for_ever() -> None:
    seen = watch(Rpc(takes_s=SILENT, admin=(STOP_PROFILE, 0.0)), 61, SHORT)
    assert seen.said == [(10, BUSY), (20, BUSY), (30, BUSY), (40, BUSY), (50, HUNG), (60, HUNG)]


def test_one_that_came_to_a_silent_engine_excuses_nothing() -> None:
    """Else who asks for a profile again and again would hide a hang."""
    rpc = Rpc(takes_s=SILENT)

    async def script(seen: Watch) -> None:
        await asyncio.sleep(5)
        rpc.admin = STOP_PROFILE, now()
        await asyncio.sleep(6)

    assert watch(rpc, script).said == [(10, HUNG)]


def test_an_engine_that_hangs_after_it_hangs_a_timeout_later() -> None:
    rpc = Rpc(takes_s=SILENT, admin=(STOP_PROFILE, 0.0))

    async def script(seen: Watch) -> None:
        await asyncio.sleep(25)
        rpc.admin = None
        await asyncio.sleep(10)

    assert watch(rpc, script).said == [(10, BUSY), (20, BUSY), (30, HUNG)]


SIGNS = ("progress", "in_flight", "ready", "works")
EXCUSES = ("admin_request", "compiling")


@pytest.mark.parametrize("sign", [*SIGNS, *EXCUSES])
def test_a_sign_that_raises_reports_nothing_and_the_watch_goes_on(sign: str) -> None:
    """For less than a timeout: a hang is found afterwards as it was before."""
    rpc = Rpc(in_flight=1)

    async def script(seen: Watch) -> None:
        rpc.broken = {sign}
        await asyncio.sleep(TOKENS.timeout - 2)
        assert set(kinds(seen)) <= {BUSY, IDLE}
        rpc.broken, rpc.hanging = set(), {0}
        await asyncio.sleep(2 * TOKENS.timeout)

    seen = watch(rpc, script, TOKENS)
    assert HUNG in kinds(seen)
    assert seen.faults == []


@pytest.mark.parametrize("sign", SIGNS)
def test_a_sign_that_fails_for_good_is_a_fault(sign: str) -> None:
    """READY would stand over an engine that nobody sees any more."""
    rpc = Rpc(in_flight=1)

    async def script(seen: Watch) -> None:
        rpc.broken = {sign}
        await asyncio.sleep(3 * TOKENS.timeout + TOKENS.token_interval)

    with capture_logs() as logs:
        (fault,) = watch(rpc, script, TOKENS).faults
    assert fault.code == "watchdog_failed"
    failures = [line["sign"] for line in logs if line["event"] == "sign_failed"]
    assert failures == [sign], "once for each run of failures"


@pytest.mark.parametrize("sign", EXCUSES)
def test_a_source_of_excuses_that_fails_excuses_nothing(sign: str) -> None:
    rpc = Rpc(in_flight=1)

    async def script(seen: Watch) -> None:
        rpc.broken, rpc.hanging = {sign}, {0}
        await asyncio.sleep(4 * TOKENS.timeout)

    seen = watch(rpc, script, TOKENS)
    assert HUNG in kinds(seen)
    assert seen.faults == []


def test_a_failure_that_comes_again_is_logged_again() -> None:
    rpc = Rpc()

    async def script(seen: Watch) -> None:
        for broken in ({"progress"}, set(), {"progress"}):
            rpc.broken = broken
            await asyncio.sleep(HEALTH.interval)

    with capture_logs() as logs:
        watch(rpc, script)
    assert [line["event"] for line in logs] == ["sign_failed", "sign_failed"]


@pytest.mark.parametrize("health", [HEALTH, TOKENS])
def test_a_watchdog_that_ends_by_itself_is_a_fault(health: Health) -> None:
    """Whatever ends it, here a listener that raises: nobody would watch the engine any more."""

    seen = watch(Rpc(), _deaf, health)
    assert [fault.code for fault in seen.faults] == ["watchdog_failed"]
    assert "LookupError" in (seen.faults[0].root_cause or "")


async def _deaf(seen: Watch) -> None:
    seen.deaf = True
    await asyncio.sleep(6)


@pytest.mark.parametrize("health", [HEALTH, TOKENS])
def test_a_watchdog_that_somebody_else_cancels_is_a_fault(health: Health) -> None:
    async def script(seen: Watch) -> None:
        await asyncio.sleep(1)
        (task,) = [t for t in asyncio.all_tasks() if t.get_name() == "watchdog"]
        task.cancel()
        await asyncio.sleep(1)

    assert [fault.code for fault in watch(Rpc(), script, health).faults] == ["watchdog_failed"]


def test_one_that_is_stopped_is_none() -> None:
    faults: list[Fault] = watch(Rpc(takes_s=3), 1).faults
    assert faults == []
