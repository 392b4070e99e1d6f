"""What has happened and where we are: the journal, the reason, and the snapshot that all read."""

from __future__ import annotations

import bisect
import enum
import heapq
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from typing import Any, Protocol, cast

from ichat_lifecycle.errors import LifecycleError
from ichat_lifecycle.ports import Verdict, VerdictKind
from ichat_lifecycle.states import State, Trigger, allowed


class Kind(enum.StrEnum):
    """What an entry of the journal is about."""

    TRANSITION = "transition"
    ATTEMPT = "attempt"
    VERDICT = "verdict"
    PHASE = "phase"
    STAGE = "stage"
    RECOVERY = "recovery"


# A limit on everything: a worker that flaps for a year must not grow. 10 000 transitions are about
# 3 MB. Of what is many, the newest are enough.
LIMITS = {
    Kind.TRANSITION: 10_000,
    Kind.ATTEMPT: 1000,
    Kind.VERDICT: 200,
    Kind.PHASE: 1000,
    Kind.STAGE: 1000,
    Kind.RECOVERY: 1000,
}


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a worker is not READY, or why it ends."""

    code: str
    message: str
    root_cause: str | None = None
    hint: str | None = None
    category: str | None = None

    @classmethod
    def of(cls, error: BaseException) -> Reason:
        """The reason in an error; the code of a foreign error is its class's name."""
        if isinstance(error, LifecycleError):
            return cls(error.code, error.message, error.root_cause, error.hint, error.category)
        return cls(type(error).__name__, str(error) or repr(error))

    def as_dict(self) -> dict[str, Any]:
        return {
            "code": self.code,
            "message": self.message,
            "root_cause": self.root_cause,
            "hint": self.hint,
            "category": self.category,
        }


@dataclass(frozen=True, slots=True)
class TransitionRecord:
    """One transition. `took_s` is the time since the trigger was fired, its action included when
    that runs before the change of state; `mono_s` is the event loop's clock."""

    seq: int
    trigger: Trigger
    source: State
    dest: State
    at: datetime
    mono_s: float
    took_s: float
    cause: str | None

    def as_dict(self) -> dict[str, Any]:
        return {
            "seq": self.seq,
            "trigger": self.trigger.value,
            "source": self.source.value,
            "dest": self.dest.value,
            "at": self.at.isoformat(),
            "took_s": round(self.took_s, 6),
            "cause": self.cause,
        }


class AttemptOutcome(enum.StrEnum):
    """Why a transition did not take place."""

    REFUSED = "refused"  # by the table or a guard
    FAILED = "failed"  # its action did, or took too long
    INTERRUPTED = "interrupted"  # by a stop, a fault or a cancellation


@dataclass(frozen=True, slots=True)
class AttemptRecord:
    """A transition that was tried, and did not take place."""

    at: datetime
    trigger: Trigger
    source: State
    outcome: AttemptOutcome
    took_s: float
    error: str | None

    def as_dict(self) -> dict[str, Any]:
        return {
            "at": self.at.isoformat(),
            "trigger": self.trigger.value,
            "source": self.source.value,
            "outcome": self.outcome.value,
            "took_s": round(self.took_s, 6),
            "error": self.error,
        }


@dataclass(frozen=True, slots=True)
class VerdictRecord:
    """What the watchdog found, `times` in a row from `at` to `until`; the signs are the last."""

    at: datetime
    until: datetime
    state: State
    verdict: Verdict
    times: int = 1

    def as_dict(self) -> dict[str, Any]:
        return {
            "at": self.at.isoformat(),
            "until": self.until.isoformat(),
            "state": self.state.value,
            "times": self.times,
            **verdict_as_dict(self.verdict),
        }


@dataclass(frozen=True, slots=True)
class PhaseRecord:
    """A phase of a start has begun, or has come so far: `fraction` is 0 to 1, where it is told."""

    at: datetime
    phase: str
    fraction: float | None
    elapsed_s: float

    def as_dict(self) -> dict[str, Any]:
        return {
            "at": self.at.isoformat(),
            "phase": self.phase,
            "fraction": self.fraction,
            "elapsed_s": round(self.elapsed_s, 3),
        }


class StageOutcome(enum.StrEnum):
    """How a stage has ended."""

    DONE = "done"
    TIMED_OUT = "timed_out"
    FAILED = "failed"
    INTERRUPTED = "interrupted"


@dataclass(frozen=True, slots=True)
class StageRecord:
    """A stage of a stop, of a restart or of a drain has ended.

    Attributes:
        stage: `drain`, `cut`, or `release RESOURCE`.
        ended: requests that ended meanwhile: by themselves in a drain, with an error in a cut; None
            where that says nothing.
    """

    at: datetime
    stage: str
    outcome: StageOutcome
    took_s: float
    ended: int | None = None
    error: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return {
            "at": self.at.isoformat(),
            "stage": self.stage,
            "outcome": self.outcome.value,
            "took_s": round(self.took_s, 6),
            "ended": self.ended,
            "error": self.error,
        }


@dataclass(frozen=True, slots=True)
class RecoveryRecord:
    """A step of an engine's recovery, or of its replacement.

    Attributes:
        step: `lost`, `backoff`, `restart`, or `canary`.
        restarts_left: of the budget.
        delay_s: of a backoff.
        error: what was lost and why, or why the canary failed.
    """

    at: datetime
    step: str
    restarts_left: int
    delay_s: float | None = None
    error: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return {
            "at": self.at.isoformat(),
            "step": self.step,
            "restarts_left": self.restarts_left,
            "delay_s": self.delay_s,
            "error": self.error,
        }


def _alike(one: Verdict, other: Verdict) -> bool:
    """Whether one record is enough for both."""
    same = (one.kind, one.signs.compiling) == (other.kind, other.signs.compiling)
    return same and other.kind is not VerdictKind.HUNG


def verdict_as_dict(verdict: Verdict) -> dict[str, Any]:
    """A verdict with the signs it rests on."""
    return {"kind": verdict.kind.value, **asdict(verdict.signs)}


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a start has come. `fraction` (0 to 1) only where the engine tells; `expected_s` only
    where there were earlier starts, `expected_from` of them, of the same model and arguments."""

    phase: str = "starting"
    fraction: float | None = None
    began_mono_s: float = 0.0
    ended_mono_s: float | None = None
    expected_s: float | None = None
    expected_from: int = 0
    # The phases so far, and when each began.
    phases: tuple[tuple[str, float], ...] = ()

    def took(self, now_mono_s: float) -> tuple[tuple[str, float], ...]:
        """Each phase with its length in seconds, the last one's so far; their sum is the whole."""
        end = self.ended_mono_s if self.ended_mono_s is not None else now_mono_s
        ends = [*(began for _, began in self.phases[1:]), end]
        together = zip(self.phases, ends, strict=False)  # no phase: nothing to end either
        return tuple((name, max(0.0, ended - began)) for (name, began), ended in together)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Immutable view of a life; replaced as a whole, so that any thread can read it."""

    state: State
    since: datetime
    since_mono_s: float
    seq: int = 0
    reason: Reason | None = None
    restarts: int = 0
    stop_asked: bool = False
    ever_ready: bool = False
    progress: Progress = field(default_factory=Progress)
    last_verdict: Verdict | None = None
    evidence: str | None = None

    @property
    def ready(self) -> bool:
        return self.state is State.READY

    @property
    def allowed(self) -> tuple[Trigger, ...]:
        return allowed(self.state)


class Record(Protocol):
    """What an entry of the journal holds."""

    @property
    def at(self) -> datetime: ...

    def as_dict(self) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing that happened. `id` counts all that a life writes down, from 1."""

    id: int
    kind: Kind
    record: Record

    def as_dict(self) -> dict[str, Any]:
        return {"id": self.id, "event": self.kind.value, **self.record.as_dict()}


def _id_of(entry: Entry) -> int:
    return entry.id


class Journal:
    """All that has happened in one life, oldest first; of each kind at most so many of the newest.

    One thread writes, any thread reads.
    """

    def __init__(self) -> None:
        self._entries: dict[Kind, deque[Entry]] = {
            kind: deque(maxlen=limit) for kind, limit in LIMITS.items()
        }
        self.last_id = 0
        self.dropped_id = 0  # up to here something may be missing

    def add(self, kind: Kind, record: Record, *, instead: bool = False) -> None:
        """Writes it down; with `instead`, in place of the newest of its kind."""
        entries = self._entries[kind]
        if instead:
            entries.pop()
        elif len(entries) == entries.maxlen:
            self.dropped_id = max(self.dropped_id, entries[0].id)
        entries.append(Entry(self.last_id + 1, kind, record))
        self.last_id += 1  # last: whoever sees the number finds the entry

    def since(self, after: int) -> list[Entry]:
        """The entries with a greater id, in the order of their ids."""
        last_id = self.last_id  # before anything is read: what comes meanwhile comes next time
        if after >= last_id:
            return []
        newer = (_between(tuple(entries), after, last_id) for entries in self._entries.values())
        return list(heapq.merge(*newer, key=_id_of))

    def newest(self, count: int, kinds: Iterable[Kind] = Kind) -> list[Entry]:
        """The newest so many of these kinds, in the order of their ids."""
        tails = (tuple(self._entries[kind])[-count:] for kind in kinds)
        return list(heapq.merge(*tails, key=_id_of))[-count:]

    def judged(self, verdict: Verdict, state: State, at: datetime) -> None:
        """Of verdicts that say that all is well, a row of the same kind is one record."""
        last = next(reversed(self.verdicts), None)
        if last is not None and last.state is state and _alike(last.verdict, verdict):
            again = replace(last, until=at, verdict=verdict, times=last.times + 1)
            self.add(Kind.VERDICT, again, instead=True)
        else:
            self.add(Kind.VERDICT, VerdictRecord(at, at, state, verdict))

    @property
    def transitions(self) -> tuple[TransitionRecord, ...]:
        return cast("tuple[TransitionRecord, ...]", self.records(Kind.TRANSITION))

    @property
    def verdicts(self) -> tuple[VerdictRecord, ...]:
        """What the watchdog has found."""
        return cast("tuple[VerdictRecord, ...]", self.records(Kind.VERDICT))

    def records(self, kind: Kind) -> tuple[Record, ...]:
        """What it holds of one kind, oldest first."""
        # A copy first: the control plane reads from another thread.
        return tuple(entry.record for entry in tuple(self._entries[kind]))


class Reader:
    """Reads a journal as it grows, each entry once. For one thread."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._seen = 0

    def news(self) -> Iterator[Entry]:
        """What has been written since the last time."""
        for entry in self._journal.since(self._seen):
            self._seen = entry.id
            yield entry


def _between(entries: Sequence[Entry], after: int, last: int) -> Sequence[Entry]:
    begin = bisect.bisect_right(entries, after, key=_id_of)
    return entries[begin : bisect.bisect_right(entries, last, key=_id_of)]
