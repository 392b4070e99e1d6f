"""What has happened to the workers of a fleet, for its journal."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from ichat_lifecycle.fleet.states import Event, Stage
from ichat_lifecycle.journal import Record


class FleetKind(enum.StrEnum):
    """What an entry is about."""

    WORKER = "worker"
    STATE = "state"
    RELOAD = "reload"


LIMITS: Mapping[enum.StrEnum, int] = {
    FleetKind.WORKER: 10_000,
    FleetKind.STATE: 10_000,
    FleetKind.RELOAD: 1000,
}


@dataclass(frozen=True, slots=True)
class StageRecord(Record):
    """A worker has gone from one stage to the next.

    `code` is what its process ended with, if it has; `delay_s` how long it backs off.
    """

    at: datetime
    worker: str
    event: Event
    source: Stage
    dest: Stage
    cause: str | None = None
    pid: int | None = None
    code: int | None = None
    delay_s: float | None = None

    def told(self) -> dict[str, Any]:
        return {
            "worker": self.worker,
            "trigger": self.event.value,
            "source": self.source.value,
            "dest": self.dest.value,
            "cause": self.cause,
            "pid": self.pid,
            "code": self.code,
            "delay_s": self.delay_s,
        }


@dataclass(frozen=True, slots=True)
class StateRecord(Record):
    """A worker has told of a new state of its own life."""

    at: datetime
    worker: str
    state: str
    reason: str | None = None

    def told(self) -> dict[str, Any]:
        return {
            "worker": self.worker,
            "state": self.state,
            "reason": self.reason,
        }


@dataclass(frozen=True, slots=True)
class ReloadRecord(Record):
    """The file was read again. `error` says why nothing, or not all of it, was done."""

    at: datetime
    started: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    renewed: tuple[str, ...] = ()  # whose certificate is another one
    error: str | None = None

    def told(self) -> dict[str, Any]:
        return {
            "started": list(self.started),
            "replaced": list(self.replaced),
            "removed": list(self.removed),
            "renewed": list(self.renewed),
            "error": self.error,
        }
