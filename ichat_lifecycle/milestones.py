"""Two lines of a log for people: where a READY worker is, and how it has ended."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import structlog

from ichat_lifecycle.errors import exit_code_of
from ichat_lifecycle.journal import Journal, Kind, Snapshot, StageRecord, TransitionRecord
from ichat_lifecycle.states import State, Trigger

log = structlog.get_logger("ichat_lifecycle")


class Milestones:
    """Logs `ready` with each engine that has started, and `ended` once.

    Args:
        journal: of the life that is logged.
        where: gives the model and the addresses of a READY worker, by the names of the line.
    """

    def __init__(self, journal: Journal, where: Callable[[], Mapping[str, str | None]]) -> None:
        self._journal = journal
        self._where = where
        self._told_mono_s: float | None = None

    def changed(self, snapshot: Snapshot) -> None:
        """A listener: a start that has ended in READY is news, once."""
        ended_s = snapshot.progress.ended_mono_s
        if snapshot.state is State.READY and ended_s is not None and ended_s != self._told_mono_s:
            self._told_mono_s = ended_s
            took_s = round(ended_s - snapshot.progress.began_mono_s, 1)
            log.info("ready", took_s=took_s, restarts=snapshot.restarts, **self._where())

    def end(self, error: BaseException | None) -> None:
        """The life is over: what its stop cut, and what the process ends with.

        Args:
            error: what run() raised; None after a stop that was asked for.
        """
        stop = self._stop()
        log.info(
            "ended",
            exit_code=int(exit_code_of(error)) if error else 0,
            cause=stop.cause if stop else None,
            completed=self._requests("drain", stop),
            cut=self._requests("cut", stop),
        )

    def _stop(self) -> TransitionRecord | None:
        newest = reversed(self._journal.transitions)
        return next((record for record in newest if record.trigger is Trigger.STOP), None)

    def _requests(self, stage: str, stop: TransitionRecord | None) -> int:
        """How many ended in this stage of the stop; those of earlier recoveries are not counted."""
        if stop is None:
            return 0
        records = self._journal.records(Kind.STAGE)
        stages = [r for r in records if isinstance(r, StageRecord) and r.at >= stop.at]
        return sum(record.ended or 0 for record in stages if record.stage == stage)
