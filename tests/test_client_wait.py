"""`ichat-lifecycle wait`: what counts as reached, what as too late, and that nothing is missed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from client_story import Story
from client_worker import (
    LiveWorker,
    http_answer,
    lived,
    nobody,
    own_proc,
    something_else,
)
from on_loop import eventually

from ichat_lifecycle.client import find
from ichat_lifecycle.client.documents import parse_status
from ichat_lifecycle.client.errors import ForeignError, SeveralWorkersError
from ichat_lifecycle.client.wait import ENDED, REACHED, TIMED_OUT, Judge, reachable, wait_command
from ichat_lifecycle.journal import Reason
from ichat_lifecycle.states import State, Trigger

LONG_S = 50.0
SHORT_S = 0.5
UP = (Trigger.BIND, Trigger.START_ENGINE, Trigger.SERVE, Trigger.BECOME_READY)


class Bench:
    """A judge over a story: both have the same clock, and the waiting begins where it is made."""

    def __init__(self, target: State, story: Story) -> None:
        self.story = story
        self.judge = Judge(target, story.monotonic)

    def see(self) -> int | None:
        outcome = self.judge.see(parse_status(self.story.document()))
        return outcome.code if outcome else None

    def hear_all(self) -> int | None:
        """The whole journal, as it comes first."""
        outcomes = (self.judge.hear(entry) for entry in self.story.entries())
        return next((outcome.code for outcome in outcomes if outcome), None)


# --- what a state means


def test_what_can_still_come_is_read_from_the_table() -> None:
    assert reachable(State.STOPPED) == set()
    assert reachable(State.STOPPING) == {State.STOPPED}
    assert reachable(State.PARSED) == set(State) - {State.PARSED}
    assert State.SERVING in reachable(State.READY), "a restart leads there"


@pytest.mark.parametrize("target", State)
def test_the_current_state_is_reached_at_once(target: State) -> None:
    story = Story()
    for trigger in (*UP, Trigger.DEGRADE, Trigger.STOP, Trigger.FINISH):
        if story.snapshot.state is not target:
            story.after(1).fire(trigger)
    assert story.snapshot.state is target
    assert Bench(target, story).see() == REACHED


def test_a_state_that_was_left_long_ago_is_not_reached() -> None:
    bench = Bench(State.DEGRADED, Story().serving().after(9))
    bench.story.fire(Trigger.DEGRADE).after(9).fire(Trigger.RECOVER).after(9)
    bench.judge = Judge(State.DEGRADED, bench.story.monotonic)
    assert (bench.see(), bench.hear_all()) == (None, None)
    bench.story.after(1).fire(Trigger.DEGRADE)
    assert bench.hear_all() == REACHED


def test_a_state_that_was_passed_before_the_first_answer_counts() -> None:
    """The worker may not have been there yet when the waiting began."""
    bench = Bench(State.ENGINE_UP, Story())
    for trigger in UP:
        bench.story.after(0.001).fire(trigger)
    assert (bench.see(), bench.hear_all()) == (None, REACHED)


def test_a_first_answer_that_comes_late_lets_nothing_old_count() -> None:
    bench = Bench(State.DEGRADED, Story().serving().after(9))
    bench.story.fire(Trigger.DEGRADE).after(1).fire(Trigger.RECOVER).after(9)
    bench.judge = Judge(State.DEGRADED, bench.story.monotonic)
    bench.story.after(2)
    assert (bench.see(), bench.hear_all()) == (None, None)


def test_the_two_clocks_need_not_agree() -> None:
    """The same, where ours is days off: only the worker's own is asked for times of day."""
    bench = Bench(State.ENGINE_UP, Story().serving().after(60))
    bench.judge = Judge(State.ENGINE_UP, lambda: bench.story.monotonic() + 1e6)
    assert (bench.see(), bench.hear_all()) == (None, None)


@pytest.mark.parametrize("target", [State.BOUND, State.READY])
def test_a_worker_that_stops_cannot_reach_it_any_more(target: State) -> None:
    bench = Bench(target, Story().after(1))
    assert bench.see() is None
    bench.story.after(1).fire(Trigger.STOP, Reason("engine_start_failed", "no memory"))
    assert bench.hear_all() == ENDED
    assert bench.see() == ENDED
    outcome = bench.judge.see(parse_status(bench.story.document()))
    assert outcome is not None
    assert "engine_start_failed: no memory" in outcome.line


def test_parsed_does_not_come_again() -> None:
    assert Bench(State.PARSED, Story().fire(Trigger.BIND)).see() == ENDED


def test_one_that_goes_away_while_it_stops_has_stopped() -> None:
    bench = Bench(State.STOPPED, Story().serving())
    assert bench.see() is None
    bench.story.after(1).fire(Trigger.STOP)
    assert bench.hear_all() is None
    assert bench.judge.gone().code == REACHED


def test_one_that_goes_away_otherwise_has_not() -> None:
    bench = Bench(State.STOPPED, Story().serving())
    assert bench.see() is None
    assert bench.judge.gone().code == ENDED
    assert "READY when it was last seen" in bench.judge.gone().line


def test_another_process_in_its_place_is_the_end_of_the_first() -> None:
    bench = Bench(State.READY, Story())
    assert bench.see() is None
    bench.story.identity.start_id = "another"
    assert bench.see() == ENDED


# --- on a real control plane


async def outcome_of(url: str | None, target: State, timeout_s: float = LONG_S) -> tuple[int, str]:
    outcome = await wait_command(url, target, timeout_s)
    return outcome.code, outcome.line


def test_it_returns_at_once_where_it_is_so_already() -> None:
    async def scenario() -> None:
        async with LiveWorker() as worker:
            worker.story.serving()
            assert await outcome_of(worker.url, State.READY) == (REACHED, "demo is READY")

    lived(scenario)


def listening(worker: LiveWorker) -> Callable[[], bool]:
    """Whether a reader of the events is there: writing to nobody proves nothing."""
    return lambda: worker.readers > 0


def test_it_returns_when_it_happens() -> None:
    async def scenario() -> None:
        async with LiveWorker() as worker:
            waiting = asyncio.create_task(outcome_of(worker.url, State.READY))
            await eventually(listening(worker))
            assert not waiting.done()
            for trigger in UP:
                worker.story.fire(trigger)
            assert (await waiting)[0] == REACHED

    lived(scenario)


@pytest.mark.parametrize("target", [State.BOUND, State.ENGINE_UP, State.SERVING])
def test_a_state_that_is_left_at_once_is_not_missed(target: State) -> None:
    async def scenario() -> None:
        async with LiveWorker() as worker:
            waiting = asyncio.create_task(outcome_of(worker.url, target))
            await eventually(listening(worker))
            for trigger in UP:
                worker.story.fire(trigger)
            assert worker.story.snapshot.state is State.READY
            assert (await waiting)[0] == REACHED

    lived(scenario)


def test_a_worker_that_ends_without_it_is_told_with_its_reason() -> None:
    async def scenario() -> None:
        async with LiveWorker() as worker:
            waiting = asyncio.create_task(outcome_of(worker.url, State.READY))
            await eventually(listening(worker))
            worker.story.fire(Trigger.STOP, Reason("model_missing", "no such model"), "failed")
            code, line = await waiting
            assert code == ENDED
            assert line.startswith("demo is STOPPING, from where it cannot become READY")
            assert line.endswith("model_missing: no such model")

    lived(scenario)


def test_a_worker_that_is_killed_is_told() -> None:
    async def scenario() -> None:
        async with LiveWorker() as worker:
            waiting = asyncio.create_task(outcome_of(worker.url, State.READY))
            await eventually(listening(worker))
            await worker.stop()
            code, line = await waiting
            assert (code, "PARSED when it was last seen" in line) == (ENDED, True)

    lived(scenario)


def test_a_worker_that_stops_and_goes_is_stopped() -> None:
    async def scenario() -> None:
        async with LiveWorker() as worker:
            worker.story.serving()
            waiting = asyncio.create_task(outcome_of(worker.url, State.STOPPED))
            await eventually(listening(worker))
            worker.story.fire(Trigger.STOP, cause="SIGTERM")
            await worker.stop()
            assert (await waiting)[0] == REACHED

    lived(scenario)


def test_a_lost_stream_is_asked_for_again() -> None:
    """A control plane with too many connections lets the oldest go: the worker is still there."""

    async def scenario() -> None:
        async with LiveWorker() as worker:
            waiting = asyncio.create_task(outcome_of(worker.url, State.READY))
            await eventually(listening(worker))
            worker.hang_up()
            await eventually(lambda: worker.readers > 1)
            for trigger in UP:
                worker.story.fire(trigger)
            assert (await waiting)[0] == REACHED

    lived(scenario)


def test_the_time_is_limited_and_it_says_where_the_worker_is() -> None:
    async def scenario() -> None:
        async with LiveWorker() as worker:
            worker.story.fire(Trigger.BIND)
            waiting = asyncio.create_task(outcome_of(worker.url, State.READY, SHORT_S))
            await eventually(listening(worker))
            worker.story.phase("loading_weights")
            code, line = await waiting
            assert code == TIMED_OUT
            assert line.endswith("demo is BOUND (loading weights)")

    lived(scenario)


def test_a_command_that_was_frozen_looks_once_more() -> None:
    """The events have passed it by, and so has its time: what is now decides."""
    frozen_s = 0.0

    def clock() -> float:
        return time.monotonic() + frozen_s

    async def scenario() -> None:
        nonlocal frozen_s
        async with LiveWorker() as worker:
            waiting = asyncio.create_task(wait_command(worker.url, State.READY, SHORT_S, clock))
            await eventually(listening(worker))
            worker.story.recorder.listeners.pop()  # nobody is told
            for trigger in UP:
                worker.story.fire(trigger)
            frozen_s = 3600.0
            assert (await waiting).code == REACHED

    lived(scenario)


def test_a_time_out_tells_why_the_worker_is_not_ready() -> None:
    bench = Bench(State.READY, Story().serving().after(1))
    bench.story.fire(Trigger.DEGRADE, Reason("asleep", "it sleeps"), "it sleeps")
    assert bench.see() is None
    assert bench.judge.late(None).line.endswith("demo is DEGRADED: asleep: it sleeps")


def test_a_url_where_nobody_is_yet_is_asked_until_somebody_is() -> None:
    async def scenario() -> None:
        with nobody() as url:
            code, line = await outcome_of(url, State.READY, SHORT_S)
            assert (code, "connection refused" in line) == (TIMED_OUT, True)
            waiting = asyncio.create_task(outcome_of(url, State.BOUND))
            await asyncio.sleep(0)
        async with LiveWorker(port=int(url.rpartition(":")[2])) as worker:
            for trigger in UP:
                worker.story.fire(trigger)  # BOUND may be over before the first answer
            assert (await waiting)[0] == REACHED

    lived(scenario)


def test_something_else_is_told_at_once() -> None:
    async def scenario() -> None:
        html = http_answer("200 OK", "text/html", b"<h1>Welcome</h1>")
        async with something_else(html) as url:
            with pytest.raises(ForeignError):
                await wait_command(url, State.READY, LONG_S)

    lived(scenario)


def test_without_a_url_a_worker_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(find, "PROC", own_proc(tmp_path))

    async def scenario() -> None:
        code, line = await outcome_of(None, State.READY, SHORT_S)
        assert (code, "no worker runs on this machine" in line) == (TIMED_OUT, True)
        waiting = asyncio.create_task(outcome_of(None, State.READY))
        await asyncio.sleep(0)
        async with LiveWorker() as worker:
            await eventually(listening(worker))
            worker.story.serving()
            assert (await waiting)[0] == REACHED
        async with LiveWorker(), LiveWorker():
            with pytest.raises(SeveralWorkersError):
                await wait_command(None, State.READY, LONG_S)

    lived(scenario)
