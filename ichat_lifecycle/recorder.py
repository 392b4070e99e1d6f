"""What everybody else sees of a life: the snapshot, the journal, the ready event, the listeners."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import structlog

from ichat_lifecycle.journal import (
    Journal,
    Progress,
    Reason,
    Snapshot,
    TransitionRecord,
    verdict_as_dict,
)
from ichat_lifecycle.ports import Clock, Verdict, VerdictKind
from ichat_lifecycle.states import State, Trigger

log = structlog.get_logger("ichat_lifecycle")

_BAD = (VerdictKind.HUNG, VerdictKind.LOOP_BLOCKED)


class Recorder:
    """Written by the lifecycle's loop only; `snapshot` and `journal` are read from any thread.

    Args:
        ready_event: set exactly while the state is READY.
    """

    def __init__(self, clock: Clock, ready_event: asyncio.Event) -> None:
        self._clock = clock
        self._ready = ready_event
        self.journal = Journal()
        self.listeners: list[Callable[[Snapshot], None]] = []
        self.snapshot = Snapshot(State.PARSED, clock.now(), 0.0)

    def begin(self, mono_s: float) -> None:
        """run() has begun."""
        progress = replace(self.snapshot.progress, began_mono_s=mono_s)
        self.publish(since=self._clock.now(), since_mono_s=mono_s, progress=progress)

    def publish(self, **changes: Any) -> None:
        """Replaces the snapshot and tells the listeners; one that fails harms nobody."""
        self.snapshot = replace(self.snapshot, **changes)
        for listener in tuple(self.listeners):
            try:
                listener(self.snapshot)
            except Exception:
                log.exception("listener_failed")

    def phase(self, phase: str, fraction: float | None) -> None:
        """How far a start has come; ignored once it has ended."""
        progress = self.snapshot.progress
        if progress.ended_mono_s is None:
            self.publish(progress=replace(progress, phase=phase, fraction=fraction))

    def judged(self, verdict: Verdict) -> None:
        """What the watchdog has found."""
        self.journal.judged(verdict, self.snapshot.state, self._clock.now())
        self.publish(last_verdict=verdict)
        tell = log.warning if verdict.kind in _BAD else log.info
        tell("verdict", **{k: v for k, v in verdict_as_dict(verdict).items() if v})

    def expect(self, seconds: float | None) -> None:
        """How long this start should take."""
        self.publish(progress=replace(self.snapshot.progress, expected_s=seconds))

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
        record = TransitionRecord(old.seq + 1, trigger, source, dest, now, mono_s, took_s, cause)
        self.journal.append(record)
        self.publish(
            state=dest,
            since=now,
            since_mono_s=mono_s,
            seq=record.seq,
            reason=reason,
            restarts=old.restarts + (trigger is Trigger.RESTART_ENGINE),
            ever_ready=old.ever_ready or dest is State.READY,
            progress=_progress_in(dest, trigger, old.progress, mono_s),
        )
        fields = record.as_dict()
        log.info("transition", **{k: v for k, v in fields.items() if k != "at"})


def _progress_in(dest: State, trigger: Trigger, progress: Progress, mono_s: float) -> Progress:
    if trigger is Trigger.RESTART_ENGINE:
        return Progress("restarting", None, mono_s, None, progress.expected_s)
    if dest in (State.READY, State.STOPPING) and progress.ended_mono_s is None:
        phase = "ready" if dest is State.READY else progress.phase
        return replace(progress, phase=phase, fraction=None, ended_mono_s=mono_s)
    return progress
