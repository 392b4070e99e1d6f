"""Who reads a worker's lines: how fast, how much at once, and what waits for who does not read."""

from __future__ import annotations

import asyncio
import itertools
import sys

import pytest

from ichat_lifecycle.adapters.output_tail import (
    AT_ONCE,
    BYTES_KEPT,
    KEPT,
    PAUSE_S,
    PIECE,
    OutputTail,
)
from ichat_lifecycle.testing.virtual_time import run_virtual

LOOKS = 20


def test_a_follower_looks_at_a_pace_and_gets_what_is_kept_at_most() -> None:
    """However fast a worker prints, all that follow it cost a bounded share of a core."""

    async def scenario() -> None:
        tail, loop = OutputTail(), asyncio.get_running_loop()
        numbers = itertools.count()

        async def print_much() -> None:
            while True:  # 20 times as much as is kept, for each look
                for _ in range(KEPT):
                    tail.add("a", str(next(numbers)))
                await asyncio.sleep(PAUSE_S / 20)

        printing = asyncio.create_task(print_much())
        looks: dict[float, list[int]] = {}
        async for text in tail.follow("a", KEPT):
            looks.setdefault(loop.time(), []).extend(map(int, text.splitlines()))
            if len(looks) > LOOKS:
                break
        printing.cancel()
        times = sorted(looks)
        assert (
            min(later - earlier for earlier, later in itertools.pairwise(times)) >= PAUSE_S * 0.99
        )
        assert max(map(len, looks.values())) <= KEPT
        seen = [number for at in times for number in looks[at]]
        assert seen == sorted(set(seen)), "in order, and none twice"

    run_virtual(scenario())


def test_the_newest_come_once_it_is_quiet() -> None:
    """What came too fast is left out, and what is shown is not what is old."""

    async def scenario() -> None:
        tail = OutputTail()
        lines = tail.follow("a", 0)
        reading = asyncio.ensure_future(anext(lines))
        await asyncio.sleep(0)
        for n in range(3 * KEPT):
            tail.add("a", str(n))
        seen = (await reading).splitlines()
        while len(seen) < KEPT:
            seen += (await anext(lines)).splitlines()
        assert seen == [str(n) for n in range(2 * KEPT, 3 * KEPT)]

    run_virtual(scenario())


@pytest.mark.parametrize("follows", [False, True])
@pytest.mark.parametrize("length", [0, 10, 1000, 10 * PIECE])
def test_a_client_that_does_not_read_has_one_piece_waiting(follows: bool, length: int) -> None:
    """Neither what is joined for it nor what was kept when it came adds up."""

    async def scenario() -> None:
        tail = OutputTail()
        for _ in range(500):
            tail.add("a", "x" * length)
        tail.close()
        texts = [text async for text in (tail.follow if follows else tail.read)("a", 500)]
        pieces = [text.split("\n") for text in texts]
        kept = BYTES_KEPT // sys.getsizeof("x" * length)
        assert sum(map(len, pieces)) == min(500, kept)
        assert max(map(len, pieces)) <= AT_ONCE
        assert max(map(len, texts)) < PIECE + length + AT_ONCE

    run_virtual(scenario())


def test_what_is_gone_before_a_slow_reader_comes_to_it_is_left_out() -> None:
    async def scenario() -> None:
        tail = OutputTail()
        for n in range(KEPT):
            tail.add("a", str(n))
        lines = tail.read("a", KEPT)
        seen = (await anext(lines)).splitlines()
        for n in range(KEPT, KEPT + 500):
            tail.add("a", str(n))
        async for text in lines:
            seen += text.splitlines()
        assert seen[:AT_ONCE] == [str(n) for n in range(AT_ONCE)]
        assert seen[AT_ONCE] == "500"
        assert int(seen[KEPT - 400 - 1]) >= KEPT - 1, "up to what there was when it asked"

    run_virtual(scenario())


def test_a_worker_without_lines_has_none() -> None:
    async def scenario() -> None:
        tail = OutputTail()
        assert [text async for text in tail.read("nobody", 5)] == []
        tail.add("a", "x")
        assert [text async for text in tail.read("a", 0)] == []

    run_virtual(scenario())
