"""What has happened and where we are: transition records, the reason, and the snapshot all read."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from typing import Any

from ichat_lifecycle.errors import LifecycleError
from ichat_lifecycle.ports import Verdict, VerdictKind
from ichat_lifecycle.states import State, Trigger, allowed

# A limit on everything: a worker that flaps for a year must not grow. 10 000 are about 3 MB.
JOURNAL_LIMIT = 10_000
VERDICTS_LIMIT = 200


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


def _alike(one: Verdict, other: Verdict) -> bool:
    """Whether one record is enough for both."""
    same = (one.kind, one.signs.compiling) == (other.kind, other.signs.compiling)
    return same and other.kind is not VerdictKind.HUNG


def verdict_as_dict(verdict: Verdict) -> dict[str, Any]:
    """A verdict with the signs it rests on."""
    return {"kind": verdict.kind.value, **asdict(verdict.signs)}


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a start has come. `fraction` (0 to 1) only where the engine tells."""

    phase: str = "starting"
    fraction: float | None = None
    began_mono_s: float = 0.0
    ended_mono_s: float | None = None
    expected_s: float | None = None


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


class Journal:
    """The transitions of one life, oldest first, at most JOURNAL_LIMIT of the newest.

    And the last VERDICTS_LIMIT verdicts; of those that say that all is well, a row of the same kind
    is one record.
    """

    def __init__(self) -> None:
        self._records: deque[TransitionRecord] = deque(maxlen=JOURNAL_LIMIT)
        self._verdicts: deque[VerdictRecord] = deque(maxlen=VERDICTS_LIMIT)

    def append(self, record: TransitionRecord) -> None:
        self._records.append(record)

    def judged(self, verdict: Verdict, state: State, at: datetime) -> None:
        last = self._verdicts[-1] if self._verdicts else None
        if last is not None and last.state is state and _alike(last.verdict, verdict):
            times = last.times + 1
            self._verdicts[-1] = replace(last, until=at, verdict=verdict, times=times)
        else:
            self._verdicts.append(VerdictRecord(at, at, state, verdict))

    @property
    def verdicts(self) -> tuple[VerdictRecord, ...]:
        """What the watchdog has found, oldest first."""
        return tuple(self._verdicts)

    def __iter__(self) -> Iterator[TransitionRecord]:
        # A copy: the control plane reads from another thread.
        return iter(tuple(self._records))

    def __len__(self) -> int:
        return len(self._records)
