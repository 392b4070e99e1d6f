"""The time line: when the worker was in which state, drawn in a row for each state.

Places are per cent of the width, so that one drawing fits any screen. What is narrower than a pixel
is drawn together with its neighbours in the same row, and says how many it stands for: no state
that occurred is hidden behind another.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

from ichat_lifecycle.control.page.course import Course, Piece
from ichat_lifecycle.control.page.words import DAY_S, MINUTE_S, clock, length
from ichat_lifecycle.states import State

# Of the drawing; a screen may have more or fewer.
PIXELS = 500
FULL = 100.0  # per cent

TICKS_AT_MOST = 5
STEPS_S = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14_400, 21_600, 43_200)


@dataclass(frozen=True, slots=True)
class Span:
    """What is looked at, on the event loop's clock, and the time of day at its end."""

    begin_s: float
    end_s: float
    end_at: datetime

    @property
    def length_s(self) -> float:
        return self.end_s - self.begin_s

    def at(self, mono_s: float) -> datetime:
        return self.end_at - timedelta(seconds=self.end_s - mono_s)

    def mono_s(self, at: datetime) -> float:
        return self.end_s - (self.end_at - at).total_seconds()

    def place(self, mono_s: float) -> float:
        """Per cent from the left; outside 0 to 100 for what is outside."""
        return (mono_s - self.begin_s) / self.length_s * FULL


@dataclass(frozen=True, slots=True)
class Bar:
    """A stay in a state, or several that are too short to be told apart."""

    left: float
    width: float
    times: int
    told: str


@dataclass(frozen=True, slots=True)
class Row:
    """One state with its bars, and how long the worker was in it within the span."""

    state: State
    bars: tuple[Bar, ...]
    total: str


@dataclass(frozen=True, slots=True)
class Tick:
    left: float
    label: str


def rows(course: Course, span: Span) -> tuple[Row, ...]:
    """The states, each with its bars."""
    return tuple(_row(state, course, span) for state in State)


def _row(state: State, course: Course, span: Span) -> Row:
    stays = course.stays[state]
    pixel_s = span.length_s / PIXELS
    pieces = list(stays.pieces(span.begin_s, span.end_s, pixel_s))
    total_s = stays.total_s(span.begin_s, span.end_s)
    if state is course.state:
        began_s = span.begin_s if course.entered_s is None else course.entered_s
        began_s = min(max(began_s, span.begin_s), span.end_s)
        total_s += span.end_s - began_s
        _add_present(pieces, Piece(began_s, span.end_s, 1), pixel_s)
    bars = tuple(_bar(state, piece, span) for piece in pieces)
    return Row(state, bars, length(total_s) if bars else "")


def _add_present(pieces: list[Piece], present: Piece, pixel_s: float) -> None:
    """The stay that goes on is merged like any other."""
    if pieces and present.begin_s - pieces[-1].end_s < pixel_s:
        last = pieces.pop()
        present = Piece(last.begin_s, present.end_s, last.times + 1)
    pieces.append(present)


def _bar(state: State, piece: Piece, span: Span) -> Bar:
    left = max(0.0, span.place(piece.begin_s))
    width = max(FULL / PIXELS, span.place(piece.end_s) - left)
    left = min(left, FULL - width)  # the newest, too, is seen
    often = f" {piece.times} times" if piece.times > 1 else ""
    begin, end = (clock(span.at(edge_s), span.end_at) for edge_s in (piece.begin_s, piece.end_s))
    told = f"{state}{often}, {begin} to {end} ({length(piece.end_s - piece.begin_s)})"
    return Bar(round(left, 2), round(width, 2), piece.times, told)


def ticks(span: Span) -> tuple[Tick, ...]:
    """Round times of day, at most TICKS_AT_MOST; none too near to the ends to be read."""
    step_s = _step_s(span.length_s)
    pattern = _pattern(step_s)
    end_s = span.end_at.timestamp()
    first = int((end_s - span.length_s) // step_s + 1) * step_s
    found = []
    for second in range(first, int(end_s) + 1, step_s):
        left = span.place(span.end_s - (end_s - second))
        at = span.end_at - timedelta(seconds=end_s - second)
        if _readable(left):
            found.append(Tick(round(left, 2), at.strftime(pattern)))
    return tuple(found)


def _readable(left: float) -> bool:
    return 6 < left < 88  # noqa: PLR2004  # half a label, and "now", are as wide as this


def _step_s(length_s: float) -> int:
    days = int(length_s // (DAY_S * TICKS_AT_MOST) + 1) * DAY_S
    return next((step for step in STEPS_S if length_s / step <= TICKS_AT_MOST), days)


def _pattern(step_s: int) -> str:
    if step_s < MINUTE_S:
        return "%H:%M:%S"
    return "%H:%M" if step_s < DAY_S else "%m-%d"
