"""Times, durations and journal entries in words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, tzinfo

from ichat_lifecycle.client.documents import (
    ATTEMPT,
    PHASE,
    RECOVERY,
    STAGE,
    TRANSITION,
    VERDICT,
    Entry,
    Progress,
    Reason,
)

MINUTE_S, HOUR_S, DAY_S = 60, 3600, 86_400
PRECISE_BELOW_S = 10


def span(seconds: float) -> str:
    """How long something has lasted, as coarse as one would say it: 12 s, 3 min 12 s, 2 d 3 h."""
    whole = int(max(0.0, seconds))
    if whole < MINUTE_S:
        return f"{whole} s"
    if whole < HOUR_S:
        return f"{whole // MINUTE_S} min {whole % MINUTE_S} s"
    if whole < DAY_S:
        return f"{whole // HOUR_S} h {whole % HOUR_S // MINUTE_S} min"
    return f"{whole // DAY_S} d {whole % DAY_S // HOUR_S} h"


def took(seconds: float) -> str:
    """How long something took, with what is worth knowing of it: 1.8 ms, 48 ms, 4.2 s, 24 s."""
    millis = seconds * 1000
    if millis < PRECISE_BELOW_S:
        return f"{millis:.1f} ms"
    if seconds < 1:
        return f"{millis:.0f} ms"
    return f"{seconds:.1f} s" if seconds < PRECISE_BELOW_S else span(seconds)


def clock(moment: datetime, zone: tzinfo | None = None) -> str:
    """The time of day; `zone` None (default): the local one."""
    return f"{moment.astimezone(zone):%H:%M:%S}"


def moment(at: datetime, now: datetime, zone: tzinfo | None = None) -> str:
    """The time of day, or the day where that is not today's."""
    local = at.astimezone(zone)
    today = local.date() == now.astimezone(zone).date()
    return f"{local:%H:%M:%S}" if today else f"{local:%m-%d %H:%M}"


def day_and_clock(moment: datetime, zone: tzinfo | None = None) -> str:
    """Date and time of day, to the millisecond: what happens within a second has an order."""
    local = moment.astimezone(zone)
    return f"{local:%Y-%m-%d %H:%M:%S}.{local.microsecond // 1000:03d}"


def counted(count: int, what: str) -> str:
    """`count` with the word for one or many."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def phase_name(phase: str, fraction: float | None = None) -> str:
    """A phase as people say it, with how far it has come where that is known."""
    name = phase.replace("_", " ") or "starting"
    return name if fraction is None else f"{name} {fraction:.0%}"


def of_expected(progress: Progress) -> str:
    """How long a start has taken so far, and how long earlier ones took."""
    elapsed = took(progress.elapsed_s)
    if progress.expected_s is None:
        return elapsed
    about = f"about {span(progress.expected_s)}"
    if progress.elapsed_s > progress.expected_s:
        return f"{elapsed}, earlier starts took {about}"
    return f"{elapsed} of {about}"


def reason_in_short(reason: Reason) -> str:
    """Code and message, one line."""
    return f"{reason.code}: {reason.message}" if reason.message else reason.code


def in_full(reason: Reason) -> str:
    """Code, message, cause and hint, one line."""
    cause = f"cause: {reason.root_cause}" if reason.root_cause else ""
    return "; ".join(part for part in (reason_in_short(reason), cause, reason.hint) if part)


@dataclass(frozen=True, slots=True)
class Told:
    """An entry in words: what happened, how long it took ("" where that says nothing), and why."""

    what: str
    took: str = ""
    why: str = ""

    @property
    def line(self) -> str:
        """All of it as one line."""
        return f"{self.what}{f' in {self.took}' if self.took else ''}" + (
            f": {self.why}" if self.why else ""
        )


def told(entry: Entry) -> Told:
    """What an entry says; of a kind that is not known here, its name."""
    tell = _TELLERS.get(entry.kind)
    return tell(entry) if tell else Told(entry.kind.replace("_", " "))


def _took(entry: Entry) -> str:
    seconds = entry.number("took_s")
    return "" if seconds is None else took(seconds)


def _transition(entry: Entry) -> Told:
    what = f"{entry.text('source')} → {entry.text('dest')} by {entry.text('trigger')}"
    return Told(what, _took(entry), entry.text("cause"))


def _attempt(entry: Entry) -> Told:
    what = f"{entry.text('trigger')} from {entry.text('source')} {entry.text('outcome')}"
    return Told(what, _took(entry), entry.text("error"))


def _phase(entry: Entry) -> Told:
    return Told(phase_name(entry.text("phase"), entry.number("fraction")))


def _stage(entry: Entry) -> Told:
    stage, outcome = entry.text("stage"), entry.text("outcome").replace("_", " ")
    ended = entry.number("ended")
    many = "" if ended is None else f", {counted(int(ended), 'request')} ended"
    return Told(f"{stage} {outcome}{many}", _took(entry), entry.text("error"))


def _recovery(entry: Entry) -> Told:
    left = f"{counted(entry.count('restarts_left'), 'restart')} left"
    delay_s = entry.number("delay_s")
    pause = "" if delay_s is None else f" of {took(delay_s)}"
    what = {
        "lost": "the engine is lost",
        "backoff": f"a pause{pause} before the next engine",
        "restart": "a new engine is started",
        "canary": "the canary request failed",
    }.get(entry.text("step"), entry.text("step"))
    return Told(f"{what}, {left}", "", entry.text("error"))


def _verdict(entry: Entry) -> Told:
    times = entry.count("times")
    often = f" {times} times" if times > 1 else ""
    return Told(f"{entry.text('kind').replace('_', ' ')}{often}, {_signs(entry)}")


def _signs(entry: Entry) -> str:
    signs = []
    answered_s = entry.number("answered_s")
    if answered_s is not None:
        signs.append(f"answered in {took(answered_s)}")
    signs += _silences(entry)
    if (in_flight := entry.count("in_flight")) > 0:
        signs.append(f"{in_flight} in flight")
    if compiler := entry.text("compiling"):
        signs.append(f"compiling ({compiler})")
    if request := entry.text("admin_request"):
        signs.append(f"during {request}")
    if ranks := entry.numbers("ranks"):
        signs.append(f"ranks {', '.join(f'{rank:g}' for rank in ranks)}")
    if error := entry.text("error"):
        signs.append(error)
    return ", ".join(signs) or "no answer"


def _silences(entry: Entry) -> list[str]:
    said = {"silent_s": "no answer for", "token_silent_s": "no token for", "loop_lag_s": "late by"}
    seconds = ((text, entry.number(name) or 0.0) for name, text in said.items())
    return [f"{text} {took(value)}" for text, value in seconds if value >= 1]


_TELLERS: dict[str, Callable[[Entry], Told]] = {
    TRANSITION: _transition,
    PHASE: _phase,
    ATTEMPT: _attempt,
    STAGE: _stage,
    RECOVERY: _recovery,
    VERDICT: _verdict,
}
