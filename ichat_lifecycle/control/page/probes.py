"""What the watchdog has found, as a chart: how long each answer took, and each miss.

The journal keeps verdicts that say the same as one record, which is right for a history and too
little for a chart: so each one is noted here, too, with its time and its latency.
"""

from __future__ import annotations

import bisect
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from ichat_lifecycle.control.page.timeline import FULL, Span
from ichat_lifecycle.control.page.words import clock, length, name_of, signs
from ichat_lifecycle.journal import Journal, Reader, Snapshot, VerdictRecord
from ichat_lifecycle.ports import VerdictKind
from ichat_lifecycle.verdicts import silence_s

# At one in 5 s, an hour and a half.
KEPT = 1100
# Next to each other; of those that fall into the same place, the worst is drawn.
PLACES = 100

SHORTEST_S, LONGEST_S = 0.0001, 10.0
MISSES = (VerdictKind.HUNG, VerdictKind.LOOP_BLOCKED)


@dataclass(frozen=True, slots=True)
class Sample:
    """One verdict, with all that is drawn of it: it is made once, and drawn every second.

    Attributes:
        kind: see Mark.
        latency_s: how long the answer took, or how long there has been none.
        badness: orders them.
    """

    at: datetime
    kind: str
    latency_s: float
    badness: tuple[bool, float]
    told: str

    @classmethod
    def of(cls, record: VerdictRecord) -> Sample:
        """The newest of the verdicts that the record stands for."""
        verdict, found = record.verdict, record.verdict.signs
        answered, missed = found.answered_s is not None, verdict.kind in MISSES
        latency_s = silence_s(found) if found.answered_s is None else found.answered_s
        kind = "miss" if missed else "answer" if answered else "silent"
        told = f"{clock(record.until, record.until)} {name_of(verdict.kind)}: {signs(verdict)}"
        return cls(record.until, kind, latency_s, (missed, latency_s), told)


def _at(sample: Sample) -> datetime:
    return sample.at


class Samples:
    """The newest KEPT verdicts of a journal. Written by its loop, read from any thread."""

    def __init__(self, journal: Journal) -> None:
        self._reader = Reader(journal)
        self._samples: deque[Sample] = deque(maxlen=KEPT)

    def note(self, snapshot: Snapshot) -> None:
        """A listener of the lifecycle's."""
        for entry in self._reader.news():
            if isinstance(entry.record, VerdictRecord):
                self._samples.append(Sample.of(entry.record))

    def newest(self) -> tuple[Sample, ...]:
        """Oldest first."""
        return tuple(self._samples)


@dataclass(frozen=True, slots=True)
class Mark:
    """One verdict in the chart. `kind` is `answer`, `silent` (no answer, but no harm) or `miss`;
    places are per cent from the left and from the top."""

    left: float
    top: float
    kind: str
    told: str


@dataclass(frozen=True, slots=True)
class Line:
    """A line of the scale."""

    top: float
    label: str


def marks(samples: Sequence[Sample], span: Span, longest_s: float) -> tuple[Mark, ...]:
    """The verdicts of the span; of those at one place only the worst.

    Args:
        samples: oldest first.
    """
    begin_at = span.at(span.begin_s)
    worst: dict[int, Sample] = {}
    for sample in samples[bisect.bisect_left(samples, begin_at, key=_at) :]:
        place = int((sample.at - begin_at).total_seconds() / span.length_s * PLACES)
        if place not in worst or worst[place].badness < sample.badness:
            worst[place] = sample
    return tuple(_mark(sample, span, longest_s) for sample in worst.values())


def _mark(sample: Sample, span: Span, longest_s: float) -> Mark:
    left = min(FULL, span.place(span.mono_s(sample.at)))
    return Mark(round(left, 2), _top(sample.latency_s, longest_s), sample.kind, sample.told)


def scale(longest_s: float) -> tuple[Line, ...]:
    """A line for each power of ten, from the shortest latency to the longest."""
    powers = range(round(math.log10(SHORTEST_S)) + 1, math.floor(math.log10(longest_s)) + 1)
    return tuple(Line(_top(10.0**power, longest_s), _round_length(power)) for power in powers)


def _round_length(power: int) -> str:
    return length(10.0**power).replace(".0", "")


def _top(latency_s: float, longest_s: float) -> float:
    """Per cent from the top, on a logarithmic scale from SHORTEST_S to `longest_s`."""
    shown = min(max(latency_s, SHORTEST_S), longest_s)
    height = math.log(shown / SHORTEST_S) / math.log(longest_s / SHORTEST_S)
    return round(FULL * (1 - height), 2)


def limit(timeout_s: float, longest_s: float) -> Line:
    """From where on silence is a miss."""
    return Line(_top(timeout_s, longest_s), f"a miss: {length(timeout_s)}")
