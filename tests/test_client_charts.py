"""Charts and words: exact widths, true heights, and nothing that is rounded to please."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from rich.cells import cell_len
from rich.text import Text

from ichat_lifecycle.client.charts import CELLS, Stay, meter, sparkline, strip, waterfall
from ichat_lifecycle.client.lines import cut, folded, labelled, spread
from ichat_lifecycle.client.look import _ASCII, STATE_STYLE
from ichat_lifecycle.client.words import counted, moment, phase_name, span, took
from ichat_lifecycle.states import State


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (-1, "0 s"),
        (0, "0 s"),
        (59.9, "59 s"),
        (60, "1 min 0 s"),
        (3599, "59 min 59 s"),
        (3 * 3600 + 12 * 60, "3 h 12 min"),
        (2 * 86_400 + 3 * 3600, "2 d 3 h"),
    ],
)
def test_how_long_something_lasts(seconds: float, said: str) -> None:
    assert span(seconds) == said


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.0004, "0.4 ms"), (0.048, "48 ms"), (0.9, "900 ms"), (4.2, "4.2 s"), (24.4, "24 s")],
)
def test_how_long_something_took(seconds: float, said: str) -> None:
    assert took(seconds) == said


def test_words_for_counts_and_phases() -> None:
    assert (counted(1, "restart"), counted(0, "restart")) == ("1 restart", "0 restarts")
    assert (phase_name("loading_weights", 0.456), phase_name("")) == (
        "loading weights 46%",
        "starting",
    )


def test_a_time_of_another_day_says_which() -> None:
    noon = datetime(2026, 1, 2, 12, tzinfo=UTC)
    assert moment(noon, noon + timedelta(hours=11), UTC) == "12:00:00"
    assert moment(noon, noon + timedelta(hours=13), UTC) == "01-02 12:00"


# --- charts


def test_a_sparkline_begins_at_zero_and_ends_with_the_newest() -> None:
    assert sparkline([1, 2, 4, 8], 4) == ["▁▂▄█"]
    assert sparkline([1, 2, 4, 8], 6) == ["  ▁▂▄█"]
    assert sparkline([9, 1, 2, 4, 8], 4) == ["▁▂▄█"], "the oldest goes"
    assert sparkline([8, 0.001, 0], 3) == ["█▁▁"], "an answer is seen, however quick"
    assert sparkline([8, None, 8], 3) == ["█x█"]
    assert sparkline([None], 2) == [" x"]
    assert sparkline([0.0], 1) == ["▁"]
    assert sparkline([], 3) == ["   "]
    assert sparkline([1.0], 0) == [""]


def test_a_higher_sparkline_has_more_levels() -> None:
    assert sparkline([4, 8, None], 3, rows=2) == [" █ ", "██x"]
    assert sparkline([5, 8], 2, rows=2) == ["▂█", "██"]


R, D, B = State.READY, State.DEGRADED, State.BOUND


def test_a_strip_is_divided_by_time() -> None:
    assert strip([Stay(B, 0, 25), Stay(R, 25, 100)], 8) == [B, B, *[R] * 6]
    assert strip([Stay(B, 0, 0)], 3) == [B, B, B]
    assert strip([], 3) == []
    assert strip([Stay(R, 0, 1)], 0) == []


def test_a_moment_without_service_is_seen_in_a_strip() -> None:
    """However short, and wherever it falls."""
    for begin in (0.0, 37.5, 49.99, 50.0, 99.9):
        stays = [Stay(R, 0, begin), Stay(D, begin, begin + 0.01), Stay(R, begin + 0.01, 100)]
        assert strip(stays, 10).count(D) == 1, begin
        assert len(strip(stays, 10)) == 10
    at_the_end = [Stay(R, 0, 100), Stay(State.STOPPING, 100, 100)]
    assert strip(at_the_end, 4) == [R, R, R, State.STOPPING]


def test_a_waterfall_has_each_bar_where_it_was() -> None:
    assert waterfall(0, 5, 10, 10) == "━━━━━     "
    assert waterfall(5, 10, 10, 10) == "     ━━━━━"
    assert waterfall(10, 10, 10, 10) == "         ━", "one cell at least"
    assert waterfall(3, 3.01, 10, 10) == "   ━      "
    assert waterfall(0, 0, 0, 4) == "━   "
    assert waterfall(0, 1, 1, 0) == ""


def test_a_meter_is_full_at_one_and_never_longer() -> None:
    shown = [meter(fraction, 4) for fraction in (-1, 0, 0.5, 0.99, 1, 7)]
    assert shown == ["────", "────", "━━──", "━━━─", "━━━━", "━━━━"]


def test_every_state_has_a_cell_and_a_colour_of_its_own() -> None:
    assert set(CELLS) == set(STATE_STYLE) == set(State)
    assert len(set(CELLS.values())) == len(State)
    assert max(State, key=list(CELLS).index) is State.DEGRADED, "nothing hides it"


def test_what_stands_for_a_character_in_ascii_is_as_wide() -> None:
    for character, replacement in _ASCII.items():
        assert cell_len(chr(character)) == cell_len(chr(replacement)) == 1
        assert chr(replacement).isascii()


# --- lines


def test_text_is_folded_and_nothing_of_it_is_lost() -> None:
    text = "a path /var/lib/a-very-long-name/that/has/no/blank and 演示演示演示 more"
    for width in (1, 2, 5, 12, 40, 200):
        lines = folded(text, width)
        assert all(cell_len(line) <= max(width, 2) for line in lines)  # 演 has two cells
        assert "".join("".join(lines).split()) == "".join(text.split())
    assert folded("", 10) == []
    assert folded("one two", 7) == ["one two"]


def test_lines_have_their_width() -> None:
    assert cut(Text("longer"), 4).plain == "lon…"
    assert cut(Text("演示演示"), 5).cell_len <= 5
    assert spread(Text("left"), Text("right"), 12).plain == "left   right"
    assert spread(Text("much longer"), Text("right"), 12).plain == "much…  right"
    shown = [line.plain for line in labelled("Load", [Text("one"), Text("two")], 12)]
    assert shown == [" Load     o…", "          t…"]
    assert labelled("Load", [], 12) == []


@pytest.mark.parametrize(("begin_s", "end_s"), [(-1e10, -5.0), (1e10, -1e10), (0.0, 1e10)])
def test_times_that_run_backwards_stay_within_the_width(begin_s: float, end_s: float) -> None:
    """A worker may say anything of when it was; what it says is drawn soon, or not at all."""
    stays = [Stay(State.READY, 0.0, begin_s), Stay(State.BOUND, begin_s, end_s)]
    assert len(strip(stays, 20)) == 20
    assert len(waterfall(begin_s, end_s, 0.0, 20)) == 20
