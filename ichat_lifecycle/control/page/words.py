"""Values as people read them. Pure functions; all lengths are in seconds, all times in UTC."""

from __future__ import annotations

import functools
from datetime import UTC, datetime

from ichat_lifecycle.journal import (
    AttemptRecord,
    PhaseRecord,
    Reason,
    Record,
    RecoveryRecord,
    StageRecord,
    TransitionRecord,
    VerdictRecord,
)
from ichat_lifecycle.ports import Verdict

MINUTE_S, HOUR_S, DAY_S = 60, 3600, 86_400
SHORT_S, TENTHS_BELOW_S = 0.01, 10

TIMES = "\N{MULTIPLICATION SIGN}"


def length(seconds: float) -> str:
    """A length with the two units that matter: `0.3 ms`, `4.2 s`, `3 min 12 s`, `2 d 4 h`."""
    if seconds <= 0:
        return "0 s"
    if seconds < SHORT_S:
        return f"{seconds * 1000:.1f} ms"
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < TENTHS_BELOW_S:
        return f"{seconds:.1f} s"
    return whole(seconds)


def whole(seconds: float) -> str:
    """The same without parts of seconds, for what counts on while somebody looks."""
    count = int(max(0.0, seconds))
    if count < MINUTE_S:
        return f"{count} s"
    if count < HOUR_S:
        return _two(count // MINUTE_S, "min", count % MINUTE_S, "s")
    if count < DAY_S:
        return _two(count // HOUR_S, "h", count % HOUR_S // MINUTE_S, "min")
    return _two(count // DAY_S, "d", count % DAY_S // HOUR_S, "h")


def _two(many: int, unit: str, few: int, smaller: str) -> str:
    return f"{many} {unit} {few} {smaller}" if few else f"{many} {unit}"


def clock(at: datetime, now: datetime) -> str:
    """The time of day; with the day where that is another one."""
    at, now = at.astimezone(UTC), now.astimezone(UTC)
    return at.strftime("%H:%M:%S" if at.date() == now.date() else "%m-%d %H:%M:%S")


def per_cent(fraction: float) -> str:
    return f"{min(1.0, max(0.0, fraction)):.0%}".replace("%", " %")


def name_of(phase: str) -> str:
    """A phase's or a stage's name without its underscores."""
    return phase.replace("_", " ")


def signs(verdict: Verdict) -> str:
    """What a verdict rests on, in a line."""
    s = verdict.signs
    told = [
        f"answered in {length(s.answered_s)}" if s.answered_s is not None else "no answer",
        f"silent for {length(s.silent_s)}" if s.silent_s else "",
        f"no token for {length(s.token_silent_s)}" if s.token_silent_s else "",
        "progress" if s.progressed else "",
        f"{s.in_flight} in flight" if s.in_flight else "",
        f"compiling: {s.compiling}" if s.compiling else "",
        f"during {s.admin_request}" if s.admin_request else "",
        f"ranks: {', '.join(map(str, s.ranks))}" if s.ranks else "",
        f"our loop {length(s.loop_lag_s)} late" if s.loop_lag_s else "",
        s.error,
    ]
    return ", ".join(filter(None, told))


def verdict_name(record: VerdictRecord) -> str:
    """A verdict's kind, and how often it was found in a row."""
    often = f" {TIMES} {record.times}" if record.times > 1 else ""
    return f"{name_of(record.verdict.kind)}{often}"


@functools.singledispatch
def happened(record: Record) -> str:
    """A journal's record in a line, without its time and its kind."""
    return str(record)


@happened.register
def _(record: TransitionRecord) -> str:
    took = f"{record.source} → {record.dest} by {record.trigger}, {length(record.took_s)}"
    return _joined(took, record.cause)


@happened.register
def _(record: AttemptRecord) -> str:
    tried = f"{record.trigger} from {record.source} {record.outcome}"
    return _joined(f"{tried} after {length(record.took_s)}", record.error)


@happened.register
def _(record: VerdictRecord) -> str:
    return f"{verdict_name(record)}: {signs(record.verdict)}"


@happened.register
def _(record: PhaseRecord) -> str:
    part = f" {per_cent(record.fraction)}" if record.fraction is not None else ""
    return f"{name_of(record.phase)}{part}, {length(record.elapsed_s)} after the beginning"


@happened.register
def _(record: StageRecord) -> str:
    ended = f", {record.ended} requests ended" if record.ended is not None else ""
    took = f"in {length(record.took_s)}{ended}"
    return _joined(f"{name_of(record.stage)} {name_of(record.outcome)} {took}", record.error)


@happened.register
def _(record: RecoveryRecord) -> str:
    wait = f" {length(record.delay_s)}" if record.delay_s is not None else ""
    return _joined(f"{record.step}{wait}, {record.restarts_left} restarts left", record.error)


def _joined(what: str, why: str | None) -> str:
    return f"{what}: {why}" if why else what


def category_of(reason: Reason) -> str:
    """The reason's code, with what kind of thing it is where that is known."""
    return f"{reason.code} ({reason.category})" if reason.category else reason.code
