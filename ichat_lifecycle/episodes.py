"""A life in episodes: a start, a recovery, a stop with its drain; each with its parts and times.

Pure: made from the journal and the snapshot. The traces are made of them (see adapters/otlp).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

from ichat_lifecycle.journal import (
    AttemptRecord,
    Journal,
    Reader,
    Record,
    RecoveryRecord,
    Snapshot,
    StageRecord,
    TransitionRecord,
)
from ichat_lifecycle.states import Trigger

START, RECOVERY, STOP = "start", "recovery", "stop"

# Two readings of two clocks in one step.
CLOCKS_DIFFER = timedelta(milliseconds=10)

Value = str | float | int | bool


@dataclass(frozen=True)
class Part:
    """A phase, a stage or a step of an episode; a step without a length ends as it begins."""

    name: str
    begin: datetime
    end: datetime
    attributes: dict[str, Value] = field(default_factory=dict)
    error: str | None = None


@dataclass(frozen=True)
class Episode:
    """One whole.

    Attributes:
        name: START, RECOVERY or STOP.
        parts: in the order in which they were written down.
        error: why it did not end well.
    """

    name: str
    begin: datetime
    end: datetime
    parts: tuple[Part, ...]
    attributes: dict[str, Value] = field(default_factory=dict)
    error: str | None = None


class Episodes:
    """Cuts one life into episodes, as it is lived; a listener of the lifecycle's.

    Args:
        journal: of that life.
        on_episode: gets each one when it has ended.
    """

    def __init__(self, journal: Journal, on_episode: Callable[[Episode], None]) -> None:
        self._reader = Reader(journal)
        self._on_episode = on_episode
        self._begun = False
        self._open: Episode | None = None

    def changed(self, snapshot: Snapshot) -> None:
        """Takes what is new in the journal."""
        for entry in self._reader.news():
            if not self._begun:
                self._begin(START, _began(snapshot))
            self._begun = True
            self._take(entry.record, snapshot)

    def close(self, snapshot: Snapshot) -> None:
        """The life is over: what is open has no end of its own, and is told all the same."""
        if self._open is not None:
            last = max((part.end for part in self._open.parts), default=snapshot.since)
            self._end(last, snapshot, "it did not end")

    def _take(self, record: Record, snapshot: Snapshot) -> None:
        match record:
            case TransitionRecord():
                self._on_transition(record, snapshot)
            case StageRecord():
                self._add(_stage(record))
            case RecoveryRecord():
                self._add(_step(record))
            case AttemptRecord():
                self._add(_attempt(record))

    def _on_transition(self, record: TransitionRecord, snapshot: Snapshot) -> None:
        match record.trigger:
            case Trigger.DEGRADE:
                self._begin(RECOVERY, record.at, record.cause)
            case Trigger.BECOME_READY | Trigger.RECOVER | Trigger.FINISH:
                self._end(record.at, snapshot)
            case Trigger.STOP:
                self._end(record.at, snapshot, "stopped before it was READY")
                self._begin(STOP, record.at, record.cause)

    def _begin(self, name: str, at: datetime, cause: str | None = None) -> None:
        self._open = Episode(name, at, at, (), {"cause": cause} if cause else {})

    def _add(self, part: Part) -> None:
        if self._open is not None:
            self._open = replace(self._open, parts=(*self._open.parts, part))

    def _end(self, at: datetime, snapshot: Snapshot, why: str | None = None) -> None:
        episode, self._open = self._open, None
        if episode is None:
            return  # a stop while READY ends nothing
        parts = [*_phases(episode, at, snapshot), *episode.parts]
        parts.sort(key=lambda part: part.begin)
        ended = replace(
            episode,
            # A whole holds its parts, also where two clocks differ by microseconds.
            begin=min([episode.begin, *(part.begin for part in parts)]),
            end=max([at, *(part.end for part in parts)]),
            parts=tuple(parts),
            attributes={**episode.attributes, "state": snapshot.state.value},
            error=snapshot.reason.message if snapshot.reason else why,
        )
        self._on_episode(ended)


def _phases(episode: Episode, end: datetime, snapshot: Snapshot) -> Iterator[Part]:
    """Those of the start that it holds, if it holds one."""
    progress, begin = snapshot.progress, _began(snapshot)
    if episode.name == STOP or begin < episode.begin - CLOCKS_DIFFER:
        return  # that was before
    for phase, took_s in progress.took(snapshot.since_mono_s):
        done = min(end, begin + timedelta(seconds=took_s))
        yield Part(phase, begin, done)
        begin = done


def _began(snapshot: Snapshot) -> datetime:
    """When the last start began: the journal's times are the wall's, those of phases the loop's."""
    ago_s = snapshot.since_mono_s - snapshot.progress.began_mono_s
    return snapshot.since - timedelta(seconds=ago_s)


def _stage(record: StageRecord) -> Part:
    attributes: dict[str, Value] = {"outcome": record.outcome.value}
    if record.ended is not None:
        attributes["requests_ended"] = record.ended
    begin = record.at - timedelta(seconds=record.took_s)
    return Part(record.stage, begin, record.at, attributes, record.error)


def _step(record: RecoveryRecord) -> Part:
    end = record.at + timedelta(seconds=record.delay_s or 0)
    return Part(record.step, record.at, end, {"restarts_left": record.restarts_left}, record.error)


def _attempt(record: AttemptRecord) -> Part:
    begin = record.at - timedelta(seconds=record.took_s)
    attributes: dict[str, Value] = {"outcome": record.outcome.value}
    return Part(record.trigger.value, begin, record.at, attributes, record.error)
