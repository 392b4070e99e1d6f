"""What everybody else sees of a life: the snapshot, the journal, the ready event, the listeners."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import structlog

from ichat_lifecycle.bounds import Interrupted
from ichat_lifecycle.errors import TransitionRefused
from ichat_lifecycle.journal import (
    TEXT_LIMIT,
    AttemptOutcome,
    AttemptRecord,
    Journal,
    Kind,
    PhaseRecord,
    Progress,
    Reason,
    Record,
    RecoveryRecord,
    Snapshot,
    StageOutcome,
    StageRecord,
    TransitionRecord,
    changed,
    text_of,
    verdict_as_dict,
)
from ichat_lifecycle.ports import Clock, Notice, Verdict, VerdictKind
from ichat_lifecycle.scrubbed import scrubbed
from ichat_lifecycle.states import State, Trigger

log = structlog.get_logger("ichat_lifecycle")

WARNINGS_KEPT = 20
_BAD = (VerdictKind.HUNG, VerdictKind.LOOP_BLOCKED)


class Recorder:
    """Written by the lifecycle's loop only; `snapshot` and `journal` are read from any thread.

    Args:
        ready_event: set exactly while the state is READY.
        scrub: takes secrets out of what is recorded: of everything that others see of a life.

    Attributes:
        head_start_s: what the process had taken before run(); it counts as part of the start.
    """

    def __init__(
        self, clock: Clock, ready_event: asyncio.Event, scrub: Callable[[str], str] = str
    ) -> None:
        self._clock = clock
        self._scrub = scrub
        self._ready = ready_event
        self.journal = Journal()
        self.listeners: list[Callable[[Snapshot], None]] = []
        self.head_start_s = 0.0
        self._bound_mono_s = 0.0  # when the engine of now began to start
        self.snapshot = Snapshot(State.PARSED, clock.now(), 0.0)

    def begin(self, mono_s: float) -> None:
        """run() has begun."""
        progress = self.snapshot.progress
        began = _begun(progress, progress.phase, mono_s - self.head_start_s)
        self._note_phase(began, mono_s)
        self.publish(since=self._clock.now(), since_mono_s=mono_s, progress=began)

    def publish(self, **changes: Any) -> None:
        """Replaces the snapshot and tells the listeners; one that fails harms nobody.

        Without changes there is news in the journal alone.
        """
        if changes.get("reason") is not None:
            changes["reason"] = scrubbed(changes["reason"], self._scrub)
        if changes:
            self.snapshot = changed(self.snapshot, **changes)
        for listener in tuple(self.listeners):
            try:
                listener(self.snapshot)
            except Exception:
                log.exception("listener_failed")

    def phase(self, phase: str, fraction: float | None, mono_s: float) -> None:
        """How far a start has come; ignored once it has ended."""
        progress = self.snapshot.progress
        if progress.ended_mono_s is not None:
            return
        same = phase == progress.phase
        phases = progress.phases if same else (*progress.phases, (phase, mono_s))
        progress = changed(progress, phase=phase, fraction=fraction, phases=phases)
        self._note_phase(progress, mono_s, instead=same)
        self.publish(progress=progress)

    def _note_phase(self, progress: Progress, mono_s: float, *, instead: bool = False) -> None:
        elapsed_s = mono_s - progress.began_mono_s
        record = PhaseRecord(self._clock.now(), progress.phase, progress.fraction, elapsed_s)
        self.journal.add(Kind.PHASE, record, instead=instead)

    def attempt(self, trigger: Trigger, source: State, took_s: float, error: BaseException) -> None:
        """A transition that did not take place, and why."""
        outcome = _outcome_of(error)
        text = self._scrub(str(error) or type(error).__name__)[:TEXT_LIMIT]
        record = AttemptRecord(self._clock.now(), trigger, source, outcome, took_s, text)
        self.journal.add(Kind.ATTEMPT, record)
        self.publish()
        interrupted = outcome is AttemptOutcome.INTERRUPTED
        _tell(log.info if interrupted else log.warning, Kind.ATTEMPT, record)

    def stage(
        self,
        stage: str,
        outcome: StageOutcome,
        took_s: float,
        *,
        ended: int | None = None,
        error: BaseException | None = None,
    ) -> None:
        """A stage of a stop, a restart or a drain has ended."""
        text = self._scrub(repr(error))[:TEXT_LIMIT] if error is not None else None
        record = StageRecord(self._clock.now(), stage, outcome, took_s, ended, text)
        self.journal.add(Kind.STAGE, record)
        self.publish()
        _tell(log.info if error is None else log.error, Kind.STAGE, record)

    def recovery(
        self,
        step: str,
        restarts_left: int,
        *,
        delay_s: float | None = None,
        error: BaseException | None = None,
    ) -> None:
        """A step of an engine's recovery, or of its replacement."""
        text = self._scrub(text_of(error)) if error is not None else None
        record = RecoveryRecord(self._clock.now(), step, restarts_left, delay_s, text)
        self.journal.add(Kind.RECOVERY, record)
        self.publish()
        _tell(log.info, Kind.RECOVERY, record)

    def judged(self, verdict: Verdict) -> None:
        """Record what the watchdog has found, and log it: at info where it is news."""
        before, verdict = self.snapshot.last_verdict, scrubbed(verdict, self._scrub)
        self.journal.judged(verdict, self.snapshot.state, self._clock.now())
        self.publish(last_verdict=verdict)
        write = _level_of(verdict, before)
        write("verdict", **{k: v for k, v in verdict_as_dict(verdict).items() if v})

    def warn(self, *notices: Notice, instead_of: frozenset[str] = frozenset()) -> None:
        """Keep these warnings, at most WARNINGS_KEPT, and log those that are new.

        Args:
            instead_of: codes of earlier warnings that are dropped.
        """
        before, notices = self.snapshot.warnings, scrubbed(notices, self._scrub)
        gone = instead_of | {notice.code for notice in notices}
        kept = tuple(notice for notice in before if notice.code not in gone)
        now = (*kept, *notices)[-WARNINGS_KEPT:]
        if now != before:
            self.publish(warnings=now)
        for notice in notices:
            if notice not in before:
                log.warning("worker_warning", **notice.as_dict())

    def expect(self, seconds: float, starts: int) -> None:
        """How long this start should take, going by so many earlier ones."""
        progress = self.snapshot.progress
        self.publish(progress=changed(progress, expected_s=seconds, expected_from=starts))

    def entered(  # one argument for each field of the record
        self,
        trigger: Trigger,
        source: State,
        dest: State,
        *,
        mono_s: float,
        took_s: float,
        reason: Reason | None,
        cause: str | None,
    ) -> None:
        """In the same step as the change of state: the event, the record, the snapshot."""
        (self._ready.set if dest is State.READY else self._ready.clear)()
        now, old = self._clock.now(), self.snapshot
        cause = scrubbed(cause, self._scrub)
        record = TransitionRecord(old.seq + 1, trigger, source, dest, now, mono_s, took_s, cause)
        self.journal.add(Kind.TRANSITION, record)
        if trigger in (Trigger.BIND, Trigger.RESTART_ENGINE):
            self._bound_mono_s = mono_s
        took_engine_s = old.engine_took_s
        if trigger is Trigger.BECOME_READY:
            took_engine_s = round(mono_s - self._bound_mono_s, 3)
        progress = _progress_in(dest, trigger, old.progress, mono_s, took_engine_s)
        if trigger is Trigger.RESTART_ENGINE:
            self._note_phase(progress, mono_s)
        self.publish(
            state=dest,
            since=now,
            since_mono_s=mono_s,
            seq=record.seq,
            reason=reason,
            restarts=old.restarts + (trigger is Trigger.RESTART_ENGINE),
            ever_ready=old.ever_ready or dest is State.READY,
            progress=progress,
            engine_took_s=took_engine_s,
        )
        log.info("transition", **record.told())


def _level_of(verdict: Verdict, before: Verdict | None) -> Callable[..., None]:
    """The log method for a verdict: a healthy engine is news only after something else.

    Every 5 s one line that repeats the last one would be 17,280 a day.
    """
    repeats = before is None or _condition(before) == _condition(verdict)
    write: Callable[..., None] = log.debug if repeats else log.info
    if verdict.kind in _BAD:
        write = log.warning
    return write


def _condition(verdict: Verdict) -> tuple[str, bool]:
    """What a reader of the log would call a change: idle and busy are the same, healthy."""
    healthy = verdict.kind in (VerdictKind.IDLE, VerdictKind.BUSY)
    return "healthy" if healthy else verdict.kind.value, bool(
        verdict.signs.compiling or verdict.signs.admin_request
    )


def _tell(tell: Callable[..., None], kind: Kind, record: Record) -> None:
    """The same in the log."""
    tell(kind.value, **{k: v for k, v in record.told().items() if v is not None})


def _outcome_of(error: BaseException) -> AttemptOutcome:
    match error:
        case TransitionRefused():
            return AttemptOutcome.REFUSED
        case Interrupted() | asyncio.CancelledError():
            return AttemptOutcome.INTERRUPTED
        case _:
            return AttemptOutcome.FAILED


def _begun(progress: Progress, phase: str, mono_s: float) -> Progress:
    return changed(
        progress,
        phase=phase,
        fraction=None,
        began_mono_s=mono_s,
        ended_mono_s=None,
        phases=((phase, mono_s),),
    )


def _progress_in(
    dest: State, trigger: Trigger, progress: Progress, mono_s: float, engine_took_s: float | None
) -> Progress:
    if trigger is Trigger.RESTART_ENGINE:
        # The imports of a whole start, which earlier processes have measured, do not come again.
        begun = _begun(progress, "restarting", mono_s)
        known = engine_took_s is not None
        return changed(begun, expected_s=engine_took_s, expected_from=int(known))
    if dest in (State.READY, State.STOPPING) and progress.ended_mono_s is None:
        phase = "ready" if dest is State.READY else progress.phase
        return changed(progress, phase=phase, fraction=None, ended_mono_s=mono_s)
    return progress
