"""The watchdog under virtual time: its cadence, its verdicts, and never two probes at once."""

from __future__ import annotations

import asyncio
import itertools

import pytest
from structlog.testing import capture_logs
from watched_engine import ASLEEP, BUSY, HEALTH, HUNG, IDLE, TOKENS, Rpc, Watch, watch

from ichat_lifecycle.adapters.watchdog import EngineWatchdog
from ichat_lifecycle.config import Health
from ichat_lifecycle.testing.virtual_time import VirtualTimeLoop, run_virtual
from ichat_lifecycle.verdicts import misses


@pytest.mark.parametrize("takes_s", [0.0, 0.001, 3.0, 5.0])
def test_a_healthy_engine_is_asked_at_each_interval(takes_s: float) -> None:
    """From begin to begin, also when an answer takes part of the interval; at once first."""
    seen = watch(Rpc(takes_s), 12)
    assert seen.rpc.asked == [0, 5, 10]
    assert seen.said[:2] == [(takes_s, IDLE), (5 + takes_s, IDLE)]
    assert {verdict.signs.answered_s for verdict in seen.verdicts} == {takes_s}


def test_an_answer_slower_than_the_interval_delays_only_the_next_question() -> None:
    """Within the timeout it is no miss; the next one follows at once."""
    seen = watch(Rpc(takes_s=8), 20)
    assert seen.rpc.asked == [0, 8, 16]
    assert seen.said == [(8, IDLE), (16, IDLE)]


@pytest.mark.parametrize("silent_from_s", [0.0, 0.5, 4.9, 5.1, 7.0])
def test_silence_is_missed_within_interval_and_timeout(silent_from_s: float) -> None:
    """Then once per further timeout, without another question: the one is kept and waited for."""
    rpc = Rpc(takes_s=1e6 if silent_from_s == 0 else 0)

    async def script(seen: Watch) -> None:
        await asyncio.sleep(silent_from_s)
        rpc.takes_s = 1e6
        await asyncio.sleep(50)

    seen = watch(rpc, script)
    missed = [at for at, kind in seen.said if kind == HUNG]
    assert missed[0] - silent_from_s <= HEALTH.interval + HEALTH.timeout
    assert [b - a for a, b in itertools.pairwise(missed)] == [10] * (len(missed) - 1)
    assert missed[0] == rpc.asked[-1] + HEALTH.timeout
    assert len(missed) >= 3
    assert seen.verdicts[-1].signs.answered_s is None
    assert seen.verdicts[-1].signs.silent_s == len(missed) * 10


def test_a_late_answer_counts_at_once() -> None:
    """It ends the silence when it comes, and the next question follows at once."""
    rpc = Rpc(takes_s=23)

    async def script(seen: Watch) -> None:
        await asyncio.sleep(1)
        rpc.takes_s = 0
        await asyncio.sleep(24)

    seen = watch(rpc, script)
    assert seen.said == [(10, HUNG), (20, HUNG), (23, IDLE), (23, IDLE)]
    assert rpc.asked == [0, 23]
    assert seen.verdicts[2].signs.answered_s == 23


@pytest.mark.parametrize("error", [RuntimeError("no RPC"), asyncio.CancelledError()])
def test_a_probe_that_fails_is_a_miss_and_the_watch_goes_on(error: BaseException) -> None:
    rpc = Rpc(error=error)

    async def script(seen: Watch) -> None:
        await asyncio.sleep(7)
        rpc.error = None
        await asyncio.sleep(5)

    seen = watch(rpc, script)
    assert seen.said == [(0, HUNG), (5, HUNG), (10, IDLE)]
    assert "probe failed" in seen.verdicts[0].signs.error
    assert seen.verdicts[0].signs.answered_s is None
    if str(error):
        assert str(error) in seen.verdicts[0].signs.error


def test_a_sleeping_engine_is_asleep() -> None:
    """It answers, so it is neither healthy nor silent."""
    rpc = Rpc(asleep=True)

    async def script(seen: Watch) -> None:
        await asyncio.sleep(7)
        rpc.asleep = False
        await asyncio.sleep(5)

    assert watch(rpc, script).said == [(0, ASLEEP), (5, ASLEEP), (10, IDLE)]


def test_pace_asks_at_once_and_then_at_the_new_interval() -> None:
    async def script(seen: Watch) -> None:
        await asyncio.sleep(6)
        seen.dog.pace(1)
        await asyncio.sleep(2.5)
        seen.dog.pace(4)
        await asyncio.sleep(5)

    assert watch(Rpc(), script).rpc.asked == [0, 5, 6, 7, 8, 8.5, 12.5]


def test_pace_while_a_question_is_open_asks_no_second() -> None:
    """The new interval counts from the open question's begin."""

    async def script(seen: Watch) -> None:
        await asyncio.sleep(1)
        seen.dog.pace(3)
        await asyncio.sleep(6)

    assert watch(Rpc(takes_s=2), script).rpc.asked == [0, 3, 6]


@pytest.mark.parametrize("takes_s", [0.0, 1e6])
@pytest.mark.parametrize("after_s", [0.0, 0.1, 5.0])
def test_stop_leaves_nothing(takes_s: float, after_s: float) -> None:
    """While it waits as while a question is open; see watch()."""
    watch(Rpc(takes_s), after_s)


def test_stop_is_safe_without_start_and_twice() -> None:
    async def main() -> None:
        dog = EngineWatchdog(Rpc().senses(), HEALTH)
        await dog.stop()
        await dog.start(lambda verdict: None, print)
        await dog.stop()
        await dog.stop()

    run_virtual(main())


def test_it_starts_again_at_its_own_pace() -> None:
    """An engine's restart stops and starts the same watchdog, which DEGRADED had hurried."""
    rpc = Rpc()

    async def main() -> None:
        dog = EngineWatchdog(rpc.senses(), HEALTH)
        for _ in range(2):
            await dog.start(lambda verdict: None, print)
            await asyncio.sleep(6)
            dog.pace(1)
            await asyncio.sleep(1.5)
            await dog.stop()

    run_virtual(main())
    first = [0, 5, 6, 7]
    assert rpc.asked == [*first, *(at + 7.5 for at in first)]


# --- three signals


def kinds(seen: Watch) -> list[str]:
    return [kind for _, kind in seen.said]


def test_an_engine_that_gets_on_is_busy_however_long_its_rpc_takes() -> None:
    """A long prefill answers no RPC: it is no hang, and no token is asked for either."""
    seen = watch(Rpc(takes_s=1e6, moves=True, in_flight=4), 100, TOKENS)
    assert set(kinds(seen)) == {BUSY}
    assert len(seen.said) >= 9
    assert all(verdict.signs.progressed for verdict in seen.verdicts)
    assert not any(verdict.answered for verdict in seen.verdicts)
    assert seen.rpc.tokens == []


def test_an_engine_that_stops_getting_on_hangs_a_timeout_after_its_last_progress() -> None:
    rpc = Rpc(takes_s=1e6, moves=True)

    async def script(seen: Watch) -> None:
        await asyncio.sleep(23)
        rpc.moves = False
        await asyncio.sleep(30)

    seen = watch(rpc, script)
    first = next(at for at, kind in seen.said if kind == HUNG)
    # How exactly the last progress is known: the twentieth part of the timeout.
    assert 33 <= first <= 34.5


def test_one_that_answers_and_has_requests_is_busy() -> None:
    assert set(kinds(watch(Rpc(in_flight=1), 12))) == {BUSY}


@pytest.mark.parametrize("begins_s", [0.0, 5.1])
def test_traffic_that_stands_still_is_asked_about_at_once(begins_s: float) -> None:
    """So that a hang under traffic is noticed well within interval and timeout, also under traffic
    that began since the engine was asked last."""
    rpc = Rpc()

    async def script(seen: Watch) -> None:
        await asyncio.sleep(begins_s)
        rpc.in_flight, rpc.moves = 4, True
        await asyncio.sleep(6 - begins_s)
        rpc.moves = False
        rpc.takes_s = 1e6
        await asyncio.sleep(20)

    seen = watch(rpc, script)
    assert rpc.asked[:2] == [0, 5]
    # One look that sees the last progress, one that sees none; half an interval apart where nobody
    # had asked for anything.
    asked_s = 6 + 2 if not begins_s else 5 + HEALTH.interval / 2 + 1
    assert 6 < rpc.asked[2] <= asked_s
    assert next(at for at, kind in seen.said if kind == HUNG) <= asked_s + HEALTH.timeout


def test_an_idle_engine_is_asked_for_a_token_now_and_then() -> None:
    """At the interval, counted from its last progress; never two at a time."""
    assert watch(Rpc(), 50, TOKENS).rpc.tokens == [15, 30, 45]
    assert watch(Rpc(token_takes_s=4), 50, TOKENS).rpc.tokens == [15, 34]
    assert watch(Rpc(moves=True), 50, TOKENS).rpc.tokens == []


@pytest.mark.parametrize("rpc", [Rpc(ready=False), Rpc(asleep=True, ready=False)])
def test_one_that_serves_nobody_is_not(rpc: Rpc) -> None:
    assert watch(rpc, 50, TOKENS).rpc.tokens == []


def test_tokens_can_be_turned_off() -> None:
    rpc = Rpc()

    async def main() -> None:
        dog = EngineWatchdog(rpc.senses(), Health(token_interval=0))
        await dog.start(lambda verdict: None, print)
        await asyncio.sleep(100)
        await dog.stop()

    run_virtual(main())
    assert rpc.tokens == []
    assert len(rpc.asked) == 20


def test_a_token_that_does_not_come_is_a_hang_though_the_rpc_is_answered() -> None:
    """The worker process is stuck: EngineCore answers for itself."""
    seen = watch(Rpc(token_takes_s=1e6), 60, TOKENS)
    first = next(at for at, kind in seen.said if kind == HUNG)
    assert first == TOKENS.token_interval + TOKENS.timeout
    assert set(kinds(seen)[kinds(seen).index(HUNG) :]) == {HUNG}
    assert seen.rpc.tokens == [15]
    assert seen.verdicts[-1].signs.token_silent_s >= 30
    assert seen.verdicts[-1].signs.silent_s == 0


def test_a_token_that_comes_late_ends_the_hang() -> None:
    seen = watch(Rpc(token_takes_s=17), 42, TOKENS)
    assert HUNG in kinds(seen)
    assert [kind for at, kind in seen.said if at > 32] == [IDLE] * 2


def test_a_refused_token_is_no_hang_and_proves_nothing() -> None:
    """The next question follows after the interval of probes, and the log has one line."""
    rpc = Rpc(token_error=RuntimeError("400"))

    async def script(seen: Watch) -> None:
        await asyncio.sleep(28)
        rpc.token_error = None
        await asyncio.sleep(20)

    with capture_logs() as logs:
        seen = watch(rpc, script, TOKENS)
    assert rpc.tokens == [15, 20, 25, 30, 45]
    assert set(kinds(seen)) == {IDLE}
    assert [entry["event"] for entry in logs] == ["token_failed"]


def test_an_engine_that_hangs_after_a_refused_token_is_found() -> None:
    """An answer that needs no engine must not reset the silence of one that hangs."""
    rpc = Rpc(token_error=RuntimeError("400"))

    async def script(seen: Watch) -> None:
        await asyncio.sleep(16)
        rpc.token_takes_s = 1e6  # the next one has to reach the workers, and they are stuck
        await asyncio.sleep(20)

    seen = watch(rpc, script, TOKENS)
    assert rpc.tokens == [15, 20]
    assert next(at for at, kind in seen.said if kind == HUNG) == 30


@pytest.mark.parametrize("blocked_s", [5.0, 30.0, 300.0])
def test_a_loop_of_ours_that_is_blocked_is_not_taken_for_a_hang(blocked_s: float) -> None:
    """Between two questions, and with one open; what is silent after that hangs all the same."""
    rpc = Rpc()

    async def script(seen: Watch) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualTimeLoop)
        await asyncio.sleep(7)
        loop.block(blocked_s)
        await asyncio.sleep(7)
        rpc.takes_s = 1e6
        await asyncio.sleep(7)
        loop.block(blocked_s)
        await asyncio.sleep(30)

    said = kinds(watch(rpc, script))
    assert said.count("loop_blocked") == 2
    assert said[: said.index(HUNG)].count("loop_blocked") == 2
    assert set(said[said.index(HUNG) :]) == {HUNG}


def test_an_engine_that_compiles_is_busy_and_not_hung() -> None:
    """It is looked at only where it would be called hung."""
    rpc = Rpc(takes_s=25, in_flight=1, compiling="torch.compile", look_takes_s=0.1)
    seen = watch(rpc, 27)
    assert rpc.looked == pytest.approx([10, 20.1])
    assert seen.said == [(10.1, BUSY), (20.2, BUSY), (25, BUSY)]
    assert [v.signs.compiling for v in seen.verdicts] == ["torch.compile", "torch.compile", ""]
    assert seen.verdicts[-1].answered


def test_one_that_hangs_after_it_has_compiled_hangs_a_timeout_later() -> None:
    rpc = Rpc(takes_s=1e6, compiling="torch.compile")

    async def script(seen: Watch) -> None:
        await asyncio.sleep(25)
        rpc.compiling = ""
        await asyncio.sleep(20)

    assert watch(rpc, script).said == [(10, BUSY), (20, BUSY), (30, HUNG), (40, HUNG)]


def test_a_compiler_may_take_so_long_and_no_longer() -> None:
    health = HEALTH.model_copy(update={"compile_timeout": 30.0})
    seen = watch(Rpc(takes_s=1e6, compiling="torch.compile"), 45, health)
    assert seen.said == [(10, BUSY), (20, BUSY), (30, HUNG), (40, HUNG)]
    assert misses(seen.verdicts[-1].signs, health.timeout, 1) == 2


def test_what_comes_while_a_compiler_is_looked_for_counts() -> None:
    rpc = Rpc(takes_s=10.4, look_takes_s=0.5)

    async def script(seen: Watch) -> None:
        await asyncio.sleep(10.2)
        rpc.moves = True
        await asyncio.sleep(0.5)

    seen = watch(rpc, script)
    assert HUNG not in kinds(seen)
    assert seen.verdicts[-1].answered


def test_a_token_that_waits_for_a_compiler_is_no_hang_either() -> None:
    seen = watch(Rpc(token_takes_s=12, compiling="Triton"), 40, TOKENS)
    assert HUNG not in kinds(seen)
