"""What is printed too fast is left out and counted; bursts and last words come whole."""

from __future__ import annotations

import asyncio
import itertools
import sys
import time
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ichat_lifecycle.adapters import engine_lines, output_tail
from ichat_lifecycle.adapters.engine_lines import CHILDREN_KEPT, EngineLines
from ichat_lifecycle.adapters.line_splitter import LINE_LIMIT
from ichat_lifecycle.adapters.line_throttle import (
    BURST,
    LINE_COST,
    PER_S,
    REPORT_EVERY_S,
    ThrottledLines,
)
from ichat_lifecycle.adapters.output_tail import OutputTail
from ichat_lifecycle.token_bucket import TokenBucket

CHUNK = 16_384


def chunks_of(data: bytes) -> list[bytes]:
    return [data[n : n + CHUNK] for n in range(0, len(data), CHUNK)]


# --- the bucket


def test_a_burst_goes_and_then_only_the_rate() -> None:
    bucket = TokenBucket(per_s=2, burst=3)
    assert [bucket.take(0.0) for _ in range(4)] == [True, True, True, False]
    assert bucket.wait_s() == 0.5
    assert bucket.take(0.5)
    assert not bucket.take(0.5)
    assert [bucket.take(1000.0) for _ in range(4)] == [True, True, True, False]


def test_more_than_there_ever_is_goes_once_and_is_paid_back() -> None:
    bucket = TokenBucket(per_s=1, burst=3)
    assert bucket.take(0.0, 10)
    assert bucket.wait_s() == 8
    assert not bucket.take(7.0)
    assert bucket.take(8.0)


@given(st.lists(st.tuples(st.floats(0, 10), st.floats(0, 50)), max_size=50))
def test_no_more_than_the_burst_and_the_rate_ever_goes(asked: list[tuple[float, float]]) -> None:
    bucket, now_s, taken, largest = TokenBucket(per_s=2, burst=10), 0.0, 0.0, 0.0
    for pause_s, amount in asked:
        now_s += pause_s
        if bucket.take(now_s, amount):
            taken += amount
            largest = max(largest, amount)
        assert taken <= 10 + 2 * now_s + largest + 1e-6


# --- lines


def test_a_traceback_of_a_megabyte_comes_whole() -> None:
    text = "".join(f'  File "x.py", line {n}, in f\n' for n in range(20_000))
    lines = ThrottledLines()
    found = [line for chunk in chunks_of(text.encode()) for line in lines.feed(chunk, 0.0)]
    assert found == text.splitlines()
    assert lines.take_dropped(0.0) == 0


def test_a_flood_is_cut_and_its_last_words_come() -> None:
    total = 1_000_000
    data = b"".join(b"line %d\n" % n for n in range(total)) + b"ichat-lifecycle: error: why"
    lines = ThrottledLines()
    found = [line for chunk in chunks_of(data) for line in lines.feed(chunk, 0.0)]
    came = len(found)
    assert found[:-1] == [f"line {n}" for n in range(came - 1)]
    assert f"line {came - 1}".startswith(found[-1]), "cut where the dropping begins"
    assert came * LINE_COST < BURST + 2 * CHUNK * LINE_COST
    last = list(lines.end())
    assert last[-2:] == [f"line {total - 1}", "ichat-lifecycle: error: why"]
    dropped = lines.take_dropped(0.0)
    assert abs(came + dropped + len(last) - total) <= 3, "a line that is cut may count twice"


def test_last_words_without_an_end_come_after_a_flood() -> None:
    lines = ThrottledLines()
    for chunk in chunks_of(b"x\n" * BURST + b"[" * 15_000):
        list(lines.feed(chunk, 0.0))
    (last,) = lines.end()
    assert last == "[" * len(last) and last


def test_it_goes_on_with_whole_lines_and_reports_now_and_then() -> None:
    lines = ThrottledLines()
    chunk = b"x" * 99 + b"\n"
    for _ in range(BURST // (len(chunk) + LINE_COST) + 1):
        list(lines.feed(chunk, 0.0))
    assert list(lines.feed(b"lost\nhalf of ", 0.0)) == []
    assert lines.rest == ""
    assert lines.take_dropped(0.0) == 1
    assert list(lines.feed(b"another\nwhole\nbeg", 10.0)) == ["whole"]
    assert list(lines.feed(b"un\n", 10.0)) == ["begun"]
    assert lines.take_dropped(10.0) == 0
    for _ in range(2 * BURST // len(chunk)):
        list(lines.feed(chunk, 10.0))
    assert lines.take_dropped(REPORT_EVERY_S - 1) == 0, "the last report is not 10 s old"
    assert lines.take_dropped(REPORT_EVERY_S) > 0
    list(lines.feed(chunk, 10.0))
    assert lines.take_dropped(10.0, at_end=True) == 1


def test_a_flood_costs_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory does not grow with what is printed, and what is dropped is not looked at."""
    lines = ThrottledLines()
    flood = itertools.repeat(b"\n" * CHUNK, 2000)
    list(lines.feed(b"\n" * CHUNK * 8, 0.0))
    tracemalloc.start()
    try:
        assert not any(line for chunk in flood for line in lines.feed(chunk, 0.0))
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_the_rate_holds_over_time() -> None:
    lines, seconds = ThrottledLines(), 60
    chunk = b"x" * 99 + b"\n"
    came = 0
    for tenth in range(seconds * 10):
        for _ in range(1000):
            came += sum(1 for _ in lines.feed(chunk, tenth / 10))
    assert came * (len(chunk) + LINE_COST) <= BURST + seconds * PER_S + CHUNK


# --- what is kept


def test_the_tail_of_a_worker_is_bounded_in_bytes() -> None:
    tail = OutputTail()
    for n in range(output_tail.KEPT):
        tail.add("a", f"{n}" + "\U0001f600" * LINE_LIMIT)
    tail.add("a", "last")

    async def read() -> list[str]:
        return [line async for text in tail.read("a", 10_000) for line in text.split("\n")]

    lines = asyncio.run(read())
    assert sum(map(sys.getsizeof, lines)) <= output_tail.BYTES_KEPT
    assert lines[-1] == "last"
    assert lines[-2].startswith(f"{output_tail.KEPT - 1}\U0001f600")


def test_an_engines_lines_are_bounded_in_bytes_and_the_chatty_one_loses() -> None:
    kept = EngineLines()
    kept.append("(Quiet pid=1) INFO 11-22 16:00:00 [core.py:1] words")
    began_s = time.monotonic()
    for n in range(4 * CHILDREN_KEPT):
        for _ in range(10):
            kept.append(f"(Child{n} pid=1) " + "\U0001f600" * LINE_LIMIT)
    lines = [line for lines in kept.by_child.values() for line in lines]
    assert sum(map(sys.getsizeof, lines)) <= engine_lines.BYTES_KEPT
    assert len(kept.by_child["Quiet"]) == 1
    assert time.monotonic() - began_s < 60
