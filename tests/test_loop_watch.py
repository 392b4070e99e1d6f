"""A loop that does not turn is noticed from outside it, said, and forgotten once it turns again."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable

import pytest
import structlog

from ichat_lifecycle.control.loop_watch import LoopHealth, LoopWatch


def seen_while(block: Callable[[], None], watch: LoopWatch) -> list[LoopHealth]:
    """What another thread reads while this loop runs `block`."""
    seen: list[LoopHealth] = []
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(0.01):
            seen.append(watch.health())

    async def main() -> None:
        with watch.watching():
            thread = threading.Thread(target=look)
            thread.start()
            block()
            await asyncio.sleep(0.2)
            ended.set()
            thread.join()

    asyncio.run(main())
    return seen


def test_a_blocked_loop_is_said_with_the_place_that_blocks() -> None:
    def a_slow_middleware() -> None:
        time.sleep(0.6)

    with structlog.testing.capture_logs() as logs:
        seen = seen_while(a_slow_middleware, LoopWatch(0.2, 0.02))
    blocked = [health for health in seen if health.blocked]
    assert blocked
    assert "in a_slow_middleware" in (blocked[0].where or "")
    reason = blocked[-1].reason
    assert reason is not None
    assert reason.code == "loop_blocked"
    assert reason.root_cause == blocked[-1].where
    assert not seen[-1].blocked, "it turns again"
    assert [entry["event"] for entry in logs] == ["loop_blocked", "loop_turns_again"]
    assert "time.sleep(0.6)" in logs[0]["stack"]


def test_a_loop_that_turns_is_well() -> None:
    seen = seen_while(lambda: None, LoopWatch(0.5, 0.02))
    assert not any(health.blocked for health in seen)
    assert seen[-1].reason is None
    assert seen[-1].lag_s < 0.5


def test_the_lag_of_a_silent_loop_grows_from_the_question_on() -> None:
    now = 10.0
    watch = LoopWatch(3.0, clock=lambda: now)
    watch._asked_at = 9.0
    assert watch.health() == LoopHealth(1.0, False, None)
    now = 12.0
    assert watch.health().blocked


@pytest.mark.parametrize("times", [1, 2])
def test_nothing_is_left_of_it(times: int) -> None:
    watch = LoopWatch(0.2, 0.02)
    for _ in range(times):
        seen_while(lambda: None, watch)
    assert "loop-watch" not in [thread.name for thread in threading.enumerate()]
    assert watch.health() == LoopHealth(watch.health().lag_s)
