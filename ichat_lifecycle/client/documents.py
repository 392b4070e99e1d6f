"""The worker's JSON documents as values: what is needed is checked, the rest has a default.

Text is made fit for a terminal here, and numbers for arithmetic: a model's name, an engine's last
words, and a stranger's whole answer may hold anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from ichat_lifecycle.printable import one_line
from ichat_lifecycle.states import State

# Longer than anything that a worker of ours says; what is longer is cut.
TEXT_LIMIT = 8192  # characters
LIST_LIMIT = 1000
# Of seconds, 317 years. Times of day and durations within these can be added to each other.
NUMBER_LIMIT = 1e10
FIRST_YEAR, LAST_YEAR = 1969, 2200

TRANSITION, ATTEMPT, VERDICT, PHASE, STAGE, RECOVERY = KINDS = (
    "transition",
    "attempt",
    "verdict",
    "phase",
    "stage",
    "recovery",
)

_HISTORY = {
    "transitions": TRANSITION,
    "attempts": ATTEMPT,
    "verdicts": VERDICT,
    "phases": PHASE,
    "stages": STAGE,
    "recoveries": RECOVERY,
}


class MalformedError(ValueError):
    """A document is not what it should be; the text says what is wrong with it."""


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a worker is not READY, or why it ends."""

    code: str
    message: str = ""
    root_cause: str = ""
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Phase:
    """A phase of a start; `began_s` seconds after the start began."""

    name: str
    began_s: float


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a start has come. Seconds; `expected_s` as earlier starts took, None if unknown."""

    phase: str = ""
    fraction: float | None = None
    elapsed_s: float = 0.0
    expected_s: float | None = None
    phases: tuple[Phase, ...] = ()
    download: str = ""  # bytes, rate, and time left of one that is under way, for people


@dataclass(frozen=True, slots=True)
class Status:
    """What `GET /lifecycle` says. `raw` is the document as it came."""

    state: State
    since: datetime
    for_s: float = 0.0
    ready: bool = False
    reason: Reason | None = None
    progress: Progress = field(default_factory=Progress)
    in_flight: int = 0
    restarts: int = 0
    seq: int = 0
    stop_bound_s: float | None = None
    evidence: str = ""
    warnings: tuple[Reason, ...] = ()
    model: str = ""
    pid: int | None = None
    start_id: str = ""
    control_url: str = ""
    vllm_version: str = ""
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def now(self) -> datetime:
        """The worker's own time of day when it answered: its clock need not be ours."""
        return self.since + timedelta(seconds=self.for_s)


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of the journal.

    Attributes:
        kind: what it is about; one of KINDS, or one of a newer version.
        id: counts what a life writes down; 0 in a history.
        start_id: of which life it is; "" in a history.
        size: characters that it came in; 0 in a history.
    """

    kind: str
    at: datetime
    fields: Mapping[str, Any]
    id: int = 0
    start_id: str = ""
    size: int = 0

    def text(self, name: str) -> str:
        return as_text(self.fields.get(name))

    def number(self, name: str) -> float | None:
        return as_number(self.fields.get(name))

    def count(self, name: str) -> int:
        return int(self.number(name) or 0)

    def numbers(self, name: str) -> list[float]:
        """The numbers of a list; empty where there is no list."""
        values = map(as_number, as_list(self.fields.get(name)))
        return [value for value in values if value is not None]

    @property
    def until(self) -> datetime:
        """When it was last so: a verdict that stays the same is one entry."""
        return as_moment(self.fields.get("until")) or self.at

    @property
    def dest(self) -> State | None:
        """The state that a transition leads to."""
        return as_state(self.fields.get("dest")) if self.kind == TRANSITION else None


@dataclass(frozen=True, slots=True)
class Gap:
    """So many events are missing: they were dropped before they could be sent."""

    missing: int


def parse_status(document: Any) -> Status:
    """Raises MalformedError where it is no lifecycle document."""
    if not isinstance(document, Mapping) or "state" not in document:
        raise MalformedError("it has no state")
    state, since = as_state(document["state"]), as_moment(document.get("since"))
    if state is None:
        raise MalformedError(f"its state is {str(document['state'])[:40]!r}")
    if since is None:
        raise MalformedError("it does not say since when")
    return Status(
        state=state,
        since=since,
        for_s=max(0.0, as_number(document.get("for_s")) or 0.0),
        ready=document.get("ready") is True,
        reason=_reason(document.get("reason")),
        progress=_progress(document.get("progress")),
        in_flight=int(as_number(document.get("in_flight")) or 0),
        restarts=int(as_number(document.get("restarts")) or 0),
        seq=int(as_number(document.get("seq")) or 0),
        stop_bound_s=_positive(document.get("stop_bound_s")),
        evidence=as_text(document.get("evidence")),
        warnings=_reasons(document.get("warnings")),
        model=as_text(document.get("model")),
        pid=_whole(document.get("pid")),
        start_id=as_text(document.get("start_id")),
        control_url=as_text(document.get("control_url")),
        vllm_version=as_text(document.get("vllm_version")),
        raw=document,
    )


def parse_history(document: Any) -> tuple[Entry, ...]:
    """All entries of `GET /lifecycle/history`, in the order of their times.

    Raises:
        MalformedError: it is no such document.
    """
    if not isinstance(document, Mapping) or not isinstance(document.get("transitions"), list):
        raise MalformedError("it has no list of transitions")
    return tuple(sorted(_listed(document), key=lambda entry: entry.at))


def _listed(document: Mapping[str, Any]) -> Iterator[Entry]:
    for name, kind in _HISTORY.items():
        items = document.get(name)
        for item in items if isinstance(items, list) else ():
            yield parse_entry(kind, item)


def parse_entry(kind: str, item: Any, start_id: str = "", size: int = 0) -> Entry:
    """Raises MalformedError where it is no entry."""
    at = as_moment(item.get("at")) if isinstance(item, Mapping) else None
    if at is None:
        raise MalformedError(f"an entry ({kind[:20]!r}) does not say when it was")
    number = as_number(item.get("id"))
    return Entry(as_text(kind), at, item, int(number or 0), start_id, size)


def parse_gap(item: Any) -> Gap:
    """Raises MalformedError where it is no gap."""
    ends = item if isinstance(item, Mapping) else {}
    after, to = as_number(ends.get("after")), as_number(ends.get("to"))
    if after is None or to is None:
        raise MalformedError("a gap without its ends")
    return Gap(max(0, int(to - after)))


def as_text(value: Any) -> str:
    """One line that can be printed; "" where it is none."""
    return one_line(value, TEXT_LIMIT) if isinstance(value, str) else ""


def as_number(value: Any) -> float | None:
    """None where it is none, or one that nothing of ours can have."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    # Compared before it is converted: an integer may have thousands of digits.
    return float(value) if -NUMBER_LIMIT <= value <= NUMBER_LIMIT else None


def as_moment(value: Any) -> datetime | None:
    """None where it is no time of day with a zone, or one that no clock shows."""
    try:
        moment = datetime.fromisoformat(value)
    except (TypeError, ValueError):
        return None
    return moment if moment.tzinfo and FIRST_YEAR <= moment.year <= LAST_YEAR else None


def as_list(value: Any) -> list[Any]:
    """The newest of a list; empty where there is none."""
    return value[-LIST_LIMIT:] if isinstance(value, list) else []


def as_state(value: Any) -> State | None:
    return State(value) if isinstance(value, str) and value in State.__members__ else None


def _whole(value: Any) -> int | None:
    number = as_number(value)
    return None if number is None else int(number)


def _positive(value: Any) -> float | None:
    number = as_number(value)
    return number if number is not None and number > 0 else None


def _reason(value: Any) -> Reason | None:
    if not isinstance(value, Mapping):
        return None
    names = ("code", "message", "root_cause", "hint")
    return Reason(*(as_text(value.get(name)) for name in names))


def _reasons(value: Any) -> tuple[Reason, ...]:
    found = map(_reason, as_list(value))
    return tuple(reason for reason in found if reason is not None)


def _progress(value: Any) -> Progress:
    if not isinstance(value, Mapping):
        return Progress()
    phases, download = map(_phase, as_list(value.get("phases"))), value.get("download")
    return Progress(
        as_text(value.get("phase")),
        as_number(value.get("fraction")),
        max(0.0, as_number(value.get("elapsed_s")) or 0.0),
        _positive(value.get("expected_s")),
        tuple(phase for phase in phases if phase is not None),
        as_text(download.get("text")) if isinstance(download, Mapping) else "",
    )


def _phase(value: Any) -> Phase | None:
    began_s = as_number(value.get("began_s")) if isinstance(value, Mapping) else None
    return None if began_s is None else Phase(as_text(value.get("phase")), began_s)
