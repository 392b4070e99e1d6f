"""The course of a life, kept so that any part of it is looked up and none of it is gone through.

The page is written once a second for each who looks, and a journal may hold 10 000 transitions: so
what they add up to is taken from each once.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from ichat_lifecycle.diagram import Edge
from ichat_lifecycle.journal import LIMITS, Journal, Kind, PhaseRecord, Reader, TransitionRecord
from ichat_lifecycle.states import State

KEPT = LIMITS[Kind.TRANSITION]


@dataclass(frozen=True, slots=True)
class Piece:
    """A stay in a state, or several with less than a pixel between them; on the loop's clock."""

    begin_s: float
    end_s: float
    times: int


@dataclass(slots=True)
class Stays:
    """The stays in one state that are over, oldest first."""

    begins: list[float] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)
    # Of all stays up to each one, the first that was left out included.
    totals: list[float] = field(default_factory=lambda: [0.0])

    def add(self, begin_s: float, end_s: float) -> None:
        """One that begins after the end of the last; the oldest go where there are too many."""
        self.begins.append(begin_s)
        self.ends.append(end_s)
        self.totals.append(self.totals[-1] + end_s - begin_s)
        if len(self.begins) > 2 * KEPT:  # seldom, since each time costs as much as all of them
            del self.begins[:KEPT], self.ends[:KEPT], self.totals[:KEPT]

    def pieces(self, begin_s: float, end_s: float, pixel_s: float) -> Iterator[Piece]:
        """What is to be drawn of them; each piece costs a search, however many stays it has."""
        first, beyond = bisect_right(self.ends, begin_s), bisect_left(self.begins, end_s)
        while first < beyond:
            last = self._last_near(first, beyond, pixel_s)
            begun_s = max(begin_s, self.begins[first])
            yield Piece(begun_s, min(end_s, self.ends[last]), last - first + 1)
            first = last + 1

    def _last_near(self, first: int, beyond: int, pixel_s: float) -> int:
        """The last one that is drawn together with the first."""
        last = first
        while True:
            end_s = self.ends[last] + pixel_s
            near = bisect_left(self.begins, end_s, last + 1, beyond)
            if near == last + 1:
                return last
            last = near - 1

    def total_s(self, begin_s: float, end_s: float) -> float:
        """How long they lasted, within these limits."""
        first, beyond = bisect_right(self.ends, begin_s), bisect_left(self.begins, end_s)
        if first >= beyond:
            return 0.0
        cut_s = max(0.0, begin_s - self.begins[first]) + max(0.0, self.ends[beyond - 1] - end_s)
        return self.totals[beyond] - self.totals[first] - cut_s


class Course:
    """Where the life of a journal has been, when, and by which ways. Used by one thread.

    Attributes:
        state: where it is; `entered_s`: since when, on the event loop's clock.
        begin_s: when the first state that is known was entered; None before any transition.
        taken: how often it went along each edge.
        cause: of the last transition.
    """

    def __init__(self, journal: Journal) -> None:
        self.state = State.PARSED
        self.entered_s: float | None = None
        self.begin_s: float | None = None
        self.taken: Counter[Edge] = Counter()
        self.cause: str | None = None
        self.stays = {state: Stays() for state in State}
        self._journal = journal
        self._reader = Reader(journal)

    def catch_up(self) -> None:
        """Takes what is new in the journal."""
        for entry in self._reader.news():
            if isinstance(entry.record, TransitionRecord):
                self._take(entry.record)

    def _take(self, record: TransitionRecord) -> None:
        if self.entered_s is None:
            self.begin_s = self.entered_s = _begin_s(record, self._journal)
        self.stays[record.source].add(self.entered_s, record.mono_s)
        self.taken[record.trigger, record.source] += 1
        self.state, self.entered_s, self.cause = record.dest, record.mono_s, record.cause


def _begin_s(first: TransitionRecord, journal: Journal) -> float:
    """When the state before this transition was entered.

    The first entry of all is the first phase of the first start. Where the oldest transitions have
    been dropped, that is not known.
    """
    if first.seq > 1:
        return first.mono_s
    phase = next(iter(journal.records(Kind.PHASE)), None)
    if isinstance(phase, PhaseRecord) and phase.at <= first.at:
        return first.mono_s - (first.at - phase.at).total_seconds()
    return first.mono_s - first.took_s
