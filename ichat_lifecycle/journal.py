"""What has happened and where we are: the journal, the reason, and the snapshot that all read."""

from __future__ import annotations

import bisect
import enum
import heapq
import json
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import datetime
from functools import cache, cached_property
from typing import Any, TypeVar, cast

from ichat_lifecycle.errors import LifecycleError
from ichat_lifecycle.ports import Notice, Signs, Verdict, VerdictKind
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
LIMITS: Mapping[enum.StrEnum, int] = {
    Kind.TRANSITION: 10_000,
    Kind.ATTEMPT: 1000,
    Kind.VERDICT: 200,
    Kind.PHASE: 1000,
    Kind.STAGE: 1000,
    Kind.RECOVERY: 1000,
}
# Words are others' (an engine's, a worker's), and may be long: so many bytes of them for each kind,
# and so many characters of one.
WORDS_BYTES = 4 * 2**20
TEXT_LIMIT = 10_000


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
            texts = (error.message, error.root_cause, error.hint)
            message, root_cause, hint = (text and text[:TEXT_LIMIT] for text in texts)
            return cls(error.code, message or "", root_cause, hint, error.category)
        return cls(type(error).__name__, text_of(error))

    def as_dict(self) -> dict[str, Any]:
        return {
            "code": self.code,
            "message": self.message,
            "root_cause": self.root_cause,
            "hint": self.hint,
            "category": self.category,
        }


def text_of(error: BaseException) -> str:
    """What an error says, at most TEXT_LIMIT characters."""
    return (str(error) or repr(error))[:TEXT_LIMIT]


class Record:
    """What an entry of the journal holds."""

    __slots__ = ()
    at: datetime

    def told(self) -> dict[str, Any]:
        """All but when: the log has times of its own."""
        raise NotImplementedError

    def as_dict(self) -> dict[str, Any]:
        return {"at": self.at.isoformat(), **self.told()}


@dataclass(frozen=True, slots=True)
class TransitionRecord(Record):
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

    def told(self) -> dict[str, Any]:
        return {
            "seq": self.seq,
            "trigger": self.trigger.value,
            "source": self.source.value,
            "dest": self.dest.value,
            "took_s": round(self.took_s, 6),
            "cause": self.cause,
        }


class AttemptOutcome(enum.StrEnum):
    """Why a transition did not take place."""

    REFUSED = "refused"  # by the table or a guard
    FAILED = "failed"  # its action did, or took too long
    INTERRUPTED = "interrupted"  # by a stop, a fault or a cancellation


@dataclass(frozen=True, slots=True)
class AttemptRecord(Record):
    """A transition that was tried, and did not take place."""

    at: datetime
    trigger: Trigger
    source: State
    outcome: AttemptOutcome
    took_s: float
    error: str | None

    def told(self) -> dict[str, Any]:
        return {
            "trigger": self.trigger.value,
            "source": self.source.value,
            "outcome": self.outcome.value,
            "took_s": round(self.took_s, 6),
            "error": self.error,
        }


@dataclass(frozen=True, slots=True)
class VerdictRecord(Record):
    """What the watchdog found, `times` in a row from `at` to `until`; the signs are the last."""

    at: datetime
    until: datetime
    state: State
    verdict: Verdict
    times: int = 1

    def told(self) -> dict[str, Any]:
        return {
            "until": self.until.isoformat(),
            "state": self.state.value,
            "times": self.times,
            **verdict_as_dict(self.verdict),
        }


@dataclass(frozen=True, slots=True)
class PhaseRecord(Record):
    """A phase of a start has begun, or has come so far: `fraction` is 0 to 1, where it is told."""

    at: datetime
    phase: str
    fraction: float | None
    elapsed_s: float

    def told(self) -> dict[str, Any]:
        return {
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
class StageRecord(Record):
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

    def told(self) -> dict[str, Any]:
        return {
            "stage": self.stage,
            "outcome": self.outcome.value,
            "took_s": round(self.took_s, 6),
            "ended": self.ended,
            "error": self.error,
        }


@dataclass(frozen=True, slots=True)
class RecoveryRecord(Record):
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

    def told(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "restarts_left": self.restarts_left,
            "delay_s": self.delay_s,
            "error": self.error,
        }


def _alike(one: Verdict, other: Verdict) -> bool:
    """Whether one record is enough for both."""
    return _essence(one) == _essence(other) and other.kind is not VerdictKind.HUNG


def _essence(verdict: Verdict) -> tuple[object, ...]:
    signs = verdict.signs
    return verdict.kind, signs.compiling, signs.admin_request, signs.ranks


_SIGNS = tuple(sign.name for sign in fields(Signs))


def verdict_as_dict(verdict: Verdict) -> dict[str, Any]:
    """A verdict with the signs it rests on."""
    signs = verdict.signs
    return {"kind": verdict.kind.value, **{name: getattr(signs, name) for name in _SIGNS}}


@dataclass(frozen=True)  # no slots: see changed()
class Progress:
    """How far a start has come. `fraction` (0 to 1) only where the engine tells; `expected_s` only
    where there were earlier starts, `expected_from` of them, of the same model and arguments. In a
    recovery that is the last one of this process."""

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


@dataclass(frozen=True)  # no slots: see changed()
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
    warnings: tuple[Notice, ...] = ()
    # What this process' last engine took from BOUND to READY, and so a recovery will; None before.
    engine_took_s: float | None = None

    @property
    def ready(self) -> bool:
        return self.state is State.READY

    @property
    def allowed(self) -> tuple[Trigger, ...]:
        return allowed(self.state)


T = TypeVar("T", Progress, Snapshot)


def changed(old: T, **changes: Any) -> T:
    """`dataclasses.replace` at a tenth of its price: a snapshot is made of all that happens."""
    if unknown := changes.keys() - vars(old).keys():
        raise TypeError(f"no fields of {type(old).__name__}: {', '.join(unknown)}")
    new = object.__new__(type(old))
    vars(new).update(vars(old), **changes)
    return new


@dataclass(frozen=True)
class Entry:
    """One thing that happened. `id` counts all that a life writes down, from 1."""

    id: int
    kind: enum.StrEnum
    record: Record

    def as_dict(self) -> dict[str, Any]:
        return {"id": self.id, "event": self.kind.value, **self.record.as_dict()}

    @cached_property
    def as_json(self) -> str:
        """The same as text: written once, however many read it."""
        return json.dumps(self.as_dict(), separators=(",", ":"))


def _id_of(entry: Entry) -> int:
    return entry.id


class Journal:
    """All that has happened in one life, oldest first; of each kind at most so many of the newest,
    and at most so many bytes of words.

    One thread writes, any thread reads.

    Args:
        limits: the kinds of entries, and how many it keeps of each.
        words_bytes: what the texts of the entries of one kind take at most, the newest aside.
    """

    def __init__(
        self, limits: Mapping[enum.StrEnum, int] = LIMITS, words_bytes: int = WORDS_BYTES
    ) -> None:
        self._limits = limits
        self._words_bytes = words_bytes
        self._entries: dict[enum.StrEnum, deque[Entry]] = {kind: deque() for kind in limits}
        self._words = dict.fromkeys(limits, 0)  # bytes
        self.last_id = 0
        self.dropped_id = 0  # up to here something may be missing

    def add(self, kind: enum.StrEnum, record: Record, *, instead: bool = False) -> None:
        """Writes it down; with `instead`, in place of the newest of its kind."""
        entries = self._entries[kind]
        if instead:
            self._words[kind] -= _words_in(entries.pop().record)
        self._words[kind] += _words_in(record)
        while entries and self._is_full(kind):
            self.dropped_id = max(self.dropped_id, entries[0].id)
            self._words[kind] -= _words_in(entries.popleft().record)
        entries.append(Entry(self.last_id + 1, kind, record))
        self.last_id += 1  # last: whoever sees the number finds the entry

    def _is_full(self, kind: enum.StrEnum) -> bool:
        many = len(self._entries[kind]) >= self._limits[kind]
        return many or self._words[kind] > self._words_bytes

    def since(self, after: int) -> list[Entry]:
        """The entries with a greater id, in the order of their ids."""
        last_id = self.last_id  # before anything is read: what comes meanwhile comes next time
        if after >= last_id:
            return []
        newer = (_between(tuple(entries), after, last_id) for entries in self._entries.values())
        return list(heapq.merge(*newer, key=_id_of))

    def newest(self, count: int, kinds: Iterable[enum.StrEnum] = ()) -> list[Entry]:
        """The newest so many of these kinds, by default of all, in the order of their ids."""
        tails = (tuple(self._entries[kind])[-count:] for kind in kinds or self._entries)
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

    def records(self, kind: enum.StrEnum) -> tuple[Record, ...]:
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


def _words_in(record: Record) -> int:
    """What the texts of a record take in memory, in bytes."""
    values = (getattr(record, name) for name in _names_in(cast("Any", type(record))))
    return sum(sys.getsizeof(value) for value in values if type(value) is str)


@cache
def _names_in(kind: type[Any]) -> tuple[str, ...]:
    return tuple(known.name for known in fields(kind))


def _between(entries: Sequence[Entry], after: int, last: int) -> Sequence[Entry]:
    begin = bisect.bisect_right(entries, after, key=_id_of)
    return entries[begin : bisect.bisect_right(entries, last, key=_id_of)]
