"""The page's view model: a life as plain values, ready to be written down. No web, no HTML.

The clock is read first and the snapshot once, as in control/view.py. The time of day is the
snapshot's own, moved on by the event loop's clock: one source for all that is drawn.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from ichat_lifecycle import __version__
from ichat_lifecycle.control.loop_watch import LoopHealth
from ichat_lifecycle.control.page import probes, timeline
from ichat_lifecycle.control.page.course import Course
from ichat_lifecycle.control.page.probes import Line, Mark, Sample
from ichat_lifecycle.control.page.timeline import FULL, Row, Span, Tick
from ichat_lifecycle.control.page.words import (
    category_of,
    clock,
    happened,
    length,
    name_of,
    per_cent,
    signs,
    verdict_name,
    whole,
)
from ichat_lifecycle.control.view import Identity, Life, plain
from ichat_lifecycle.journal import (
    AttemptOutcome,
    AttemptRecord,
    Journal,
    Kind,
    Progress,
    Reason,
    Record,
    RecoveryRecord,
    Snapshot,
    StageOutcome,
    StageRecord,
    TransitionRecord,
    VerdictRecord,
)
from ichat_lifecycle.ports import VerdictKind
from ichat_lifecycle.states import State

# What the time line can be zoomed to, as `?window=…`, with the words for it.
WINDOWS = {"60": "last minute", "600": "10 min", "3600": "hour", "all": "all"}
DEFAULT_WINDOW = "600"
SHORTEST_SPAN_S = 10.0

# Verdicts have a list of their own: one that hangs would fill this one.
EVENTS = tuple(kind for kind in Kind if kind is not Kind.VERDICT)
EVENTS_SHOWN = 14
VERDICTS_SHOWN = 6

MEANINGS = {
    State.PARSED: "reads its arguments and imports vLLM; no port answers but this one",
    State.BOUND: "loads the engine; its port answers 503",
    State.ENGINE_UP: "has its engine, and builds vLLM's API; its port answers 503",
    State.SERVING: "warms up; requests are answered with 503 until it is READY",
    State.READY: "takes requests",
    State.DEGRADED: "takes no new requests; those under way go on",
    State.STOPPING: "takes no requests; lets those under way finish, then releases everything",
    State.STOPPED: "has ended; everything is released",
}
# Colour and sign of a state.
TONES = {
    State.READY: "good",
    State.DEGRADED: "warn",
    State.STOPPING: "end",
    State.STOPPED: "end",
}
SIGNS = {"good": "✓", "warn": "!", "end": "■", "busy": "…"}

SERVED = (State.READY, State.DEGRADED)


@dataclass(frozen=True, slots=True)
class Time:
    """A time for people, and for machines."""

    text: str
    iso: str


@dataclass(frozen=True, slots=True)
class Fact:
    """A value of the header; `unit` says what it is of."""

    name: str
    value: str
    unit: str = ""


@dataclass(frozen=True, slots=True)
class Head:
    """Who and where the worker is."""

    state: State
    tone: str
    sign: str
    meaning: str
    since: Time
    lasts: str
    model: str
    facts: tuple[Fact, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Trouble:
    """Why the worker is not well; `evidence` may outlast the rest."""

    code: str
    message: str
    root_cause: str | None
    hint: str | None
    evidence: str | None


@dataclass(frozen=True, slots=True)
class Phase:
    """A phase of a start; places are per cent of the whole."""

    name: str
    took: str
    left: float
    width: float
    now: bool
    fraction: float | None
    part: str


@dataclass(frozen=True, slots=True)
class Start:
    """The last start, the present one if it has not ended."""

    running: bool
    phases: tuple[Phase, ...]
    elapsed: str
    expected: str | None
    rest: str | None
    expected_at: float | None
    download: str


@dataclass(frozen=True, slots=True)
class Stage:
    name: str
    took: str
    outcome: str
    well: bool
    told: str


@dataclass(frozen=True, slots=True)
class Stop:
    """A stop that is under way. `part` is how much of its bound is over, in per cent."""

    why: str | None
    elapsed: str
    bound: str
    part: float
    stages: tuple[Stage, ...]


@dataclass(frozen=True, slots=True)
class TimeLine:
    window: str
    shown: str
    rows: tuple[Row, ...]
    ticks: tuple[Tick, ...]
    marks: tuple[Mark, ...]
    scale: tuple[Line, ...]
    limit: Line


@dataclass(frozen=True, slots=True)
class Happened:
    """A line of a list: an event, or a verdict."""

    time: Time
    kind: str
    what: str
    bad: bool = False


@dataclass(frozen=True, slots=True)
class Page:
    """All that the page shows but the diagram. `can`: the commands that make sense now."""

    now: Time
    head: Head
    trouble: Trouble | None
    start: Start
    stop: Stop | None
    line: TimeLine
    verdicts: tuple[Happened, ...]
    events: tuple[Happened, ...]
    arguments: tuple[tuple[str, str], ...]
    can: tuple[str, ...]

    @property
    def title(self) -> str:
        return f"{self.head.state} · {self.head.model}"


def page_of(
    life: Life,
    identity: Identity,
    loop: LoopHealth,
    samples: Sequence[Sample],
    course: Course,
    window: str = DEFAULT_WINDOW,
) -> Page:
    """The page of one moment. An unknown `window` is DEFAULT_WINDOW.

    Args:
        course: that of this life; it is brought up to date.
    """
    now_s, snapshot = life.monotonic(), life.snapshot
    now_s = max(now_s, snapshot.since_mono_s)
    now = snapshot.since + timedelta(seconds=now_s - snapshot.since_mono_s)
    journal = life.journal
    course.catch_up()
    window = window if window in WINDOWS else DEFAULT_WINDOW
    return Page(
        now=_time(now, now),
        head=_head(life, identity, loop, snapshot, now_s, now),
        trouble=_trouble(loop.reason or snapshot.reason, snapshot.evidence),
        start=_start(snapshot.progress, identity.download, now_s),
        stop=_stop(life, snapshot, course.cause, now_s),
        line=_line(life, snapshot, course, samples, window, Span(now_s, now_s, now)),
        verdicts=_verdicts(journal.verdicts, now),
        events=_events(journal, now),
        arguments=_arguments(identity),
        can=_can(snapshot),
    )


def _time(at: datetime, now: datetime) -> Time:
    return Time(clock(at, now), at.isoformat())


# Header -------------------------------------------------------------------------------------------


def _head(
    life: Life,
    identity: Identity,
    loop: LoopHealth,
    snapshot: Snapshot,
    now_s: float,
    now: datetime,
) -> Head:
    tone = "warn" if loop.blocked else TONES.get(snapshot.state, "busy")
    return Head(
        state=snapshot.state,
        tone=tone,
        sign=SIGNS[tone],
        meaning=MEANINGS[snapshot.state],
        since=_time(snapshot.since, now),
        lasts=whole(now_s - snapshot.since_mono_s),
        model=identity.model or "(its name is not known yet)",
        facts=_facts(life, identity, loop, snapshot),
        notes=tuple(_notes(loop, snapshot)),
    )


def _facts(
    life: Life, identity: Identity, loop: LoopHealth, snapshot: Snapshot
) -> tuple[Fact, ...]:
    restart = life.settings.restart
    left = f"{life.restarts_left} of {restart.max} left within {whole(restart.window)}"
    return (
        Fact("in flight", str(identity.in_flight), "requests"),
        Fact("restarts", str(snapshot.restarts), left),
        Fact("loop lag", length(loop.lag_s), "blocked" if loop.blocked else ""),
        Fact("pid", str(identity.pid)),
        Fact("vLLM", identity.vllm_version or "not imported yet"),
        Fact("ichat_lifecycle", __version__),
    )


def _notes(loop: LoopHealth, snapshot: Snapshot) -> Iterable[str]:
    if loop.blocked:
        yield "The event loop is blocked: nothing is served, whatever the state says."
    if snapshot.stop_asked and snapshot.state not in (State.STOPPING, State.STOPPED):
        yield "A stop was asked for."
    verdict = snapshot.last_verdict
    if verdict and verdict.kind is VerdictKind.ASLEEP and snapshot.state in SERVED:
        yield "The engine sleeps."
    for notice in snapshot.warnings:
        parts = (notice.message, notice.root_cause and f"cause: {notice.root_cause}", notice.hint)
        yield f"Warning: {'; '.join(part for part in parts if part)}"


def _trouble(reason: Reason | None, evidence: str | None) -> Trouble | None:
    if reason is None:
        return Trouble("", "", None, None, evidence) if evidence else None
    return Trouble(category_of(reason), reason.message, reason.root_cause, reason.hint, evidence)


def _can(snapshot: Snapshot) -> tuple[str, ...]:
    """The commands that make sense; the worker itself decides."""
    if snapshot.state is State.STOPPED:
        return ()
    if snapshot.state is State.STOPPING:
        return ("stop-now",)
    return ("stop", "stop-now", *(("restart", "sleep", "wake") if snapshot.state in SERVED else ()))


def _arguments(identity: Identity) -> tuple[tuple[str, str], ...]:
    return tuple(
        (str(name), json.dumps(value, ensure_ascii=False))
        for name, value in plain(identity.arguments).items()
    )


# A start and a stop -------------------------------------------------------------------------------


def _start(progress: Progress, download: Mapping[str, Any] | None, now_s: float) -> Start:
    took = progress.took(now_s)
    elapsed_s, expected_s = sum(seconds for _, seconds in took), progress.expected_s
    running = progress.ended_mono_s is None
    whole_s = max(elapsed_s, expected_s or 0.0) or 1.0
    return Start(
        running=running,
        phases=_phases(progress, took, whole_s),
        elapsed=length(elapsed_s),
        expected=_expected(expected_s, progress.expected_from) if expected_s is not None else None,
        rest=_rest(expected_s - elapsed_s) if running and expected_s is not None else None,
        expected_at=round(expected_s / whole_s * FULL, 2) if expected_s is not None else None,
        download=str(download["text"]) if download else "",
    )


def _expected(seconds: float, starts: int) -> str:
    earlier = "one earlier start" if starts == 1 else f"the median of {starts} earlier starts"
    return f"{length(seconds)}, {earlier} with these arguments"


def _phases(
    progress: Progress, took: Sequence[tuple[str, float]], whole_s: float
) -> tuple[Phase, ...]:
    phases, began_s = [], 0.0
    for number, (name, seconds) in enumerate(took, 1):
        now = number == len(took) and progress.ended_mono_s is None
        fraction = progress.fraction if now else None
        phases.append(
            Phase(
                name=name_of(name),
                took=length(seconds),
                left=round(began_s / whole_s * FULL, 2),
                width=round(seconds / whole_s * FULL, 2),
                now=now,
                fraction=fraction,
                part=per_cent(fraction) if fraction is not None else "",
            )
        )
        began_s += seconds
    return tuple(phases)


def _rest(seconds: float) -> str:
    if seconds >= 0:
        return f"about {whole(seconds)} left"
    return f"{whole(-seconds)} longer than expected"


def _stop(life: Life, snapshot: Snapshot, cause: str | None, now_s: float) -> Stop | None:
    if snapshot.state is not State.STOPPING:
        return None
    elapsed_s, bound_s = now_s - snapshot.since_mono_s, life.settings.stop_bound
    stages = life.journal.records(Kind.STAGE)
    ours = [s for s in stages if isinstance(s, StageRecord) and s.at >= snapshot.since]
    return Stop(
        why=cause,
        elapsed=length(elapsed_s),
        bound=length(bound_s),
        part=round(min(1.0, elapsed_s / bound_s) * FULL, 2),
        stages=tuple(_stage(stage) for stage in ours),
    )


def _stage(stage: StageRecord) -> Stage:
    ended = f"{stage.ended} requests ended" if stage.ended is not None else ""
    return Stage(
        name=name_of(stage.stage),
        took=length(stage.took_s),
        outcome=name_of(stage.outcome),
        well=stage.outcome is StageOutcome.DONE,
        told=", ".join(filter(None, [ended, stage.error])),
    )


# Time line and lists ------------------------------------------------------------------------------


def _line(
    life: Life,
    snapshot: Snapshot,
    course: Course,
    samples: Sequence[Sample],
    window: str,
    now: Span,
) -> TimeLine:
    begin_s = snapshot.since_mono_s if course.begin_s is None else course.begin_s
    age_s = now.end_s - begin_s
    shown_s = max(SHORTEST_SPAN_S, age_s if window == "all" else min(age_s, float(window)))
    span = replace(now, begin_s=now.end_s - shown_s)
    timeout_s = life.settings.health.timeout
    longest_s = max(probes.LONGEST_S, timeout_s)
    return TimeLine(
        window=window,
        shown=whole(shown_s),
        rows=timeline.rows(course, span),
        ticks=timeline.ticks(span),
        marks=probes.marks(samples, span, longest_s),
        scale=probes.scale(longest_s),
        limit=probes.limit(timeout_s, longest_s),
    )


def _verdicts(verdicts: Sequence[VerdictRecord], now: datetime) -> tuple[Happened, ...]:
    newest = reversed(verdicts[-VERDICTS_SHOWN:])
    return tuple(
        Happened(
            _time(record.until, now),
            verdict_name(record),
            signs(record.verdict),
            record.verdict.kind in probes.MISSES,
        )
        for record in newest
    )


def _events(journal: Journal, now: datetime) -> tuple[Happened, ...]:
    found = []
    for entry in reversed(journal.newest(EVENTS_SHOWN, EVENTS)):
        record = entry.record
        found.append(
            Happened(_time(record.at, now), entry.kind.value, happened(record), _bad(record))
        )
    return tuple(found)


def _bad(record: Record) -> bool:
    """Whether somebody should look at it."""
    match record:
        case TransitionRecord():
            return record.dest is State.DEGRADED
        case AttemptRecord():
            return record.outcome is not AttemptOutcome.INTERRUPTED
        case VerdictRecord():
            return record.verdict.kind in probes.MISSES
        case StageRecord():
            return record.outcome is not StageOutcome.DONE
        case RecoveryRecord():
            return record.step == "lost" or (record.step == "canary" and record.error is not None)
        case _:
            return False
