"""The life of a worker as its supervisor sees it: states, triggers and the table. Data only."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Stage(enum.StrEnum):
    """Where a worker of a fleet is."""

    PENDING = "pending"
    STARTING = "starting"
    SERVING = "serving"
    BACKING_OFF = "backing_off"
    STOPPING = "stopping"
    STOPPED = "stopped"
    GIVEN_UP = "given_up"


class Event(enum.StrEnum):
    """What leads from one to the next."""

    START = "start"
    SERVE = "serve"
    BACK_OFF = "back_off"
    RETRY = "retry"
    GIVE_UP = "give_up"
    END = "end"
    STOP = "stop"
    FINISH = "finish"


@dataclass(frozen=True, slots=True)
class Row:
    """One way from some stages to another."""

    event: Event
    sources: tuple[Stage, ...]
    dest: Stage
    when: str
    effect: str


TABLE: tuple[Row, ...] = (
    Row(
        Event.START,
        (Stage.PENDING,),
        Stage.STARTING,
        "fewer than `fleet.max_parallel_starts` workers are starting",
        "start a process of `serve` with the listening socket handed down",
    ),
    Row(
        Event.SERVE,
        (Stage.STARTING,),
        Stage.SERVING,
        "it has told that it is READY",
        "let the next one start",
    ),
    Row(
        Event.BACK_OFF,
        (Stage.STARTING, Stage.SERVING),
        Stage.BACKING_OFF,
        "it has ended with a code that is worth another start, and there are some left",
        "answer 503 on its socket, wait",
    ),
    Row(
        Event.RETRY,
        (Stage.BACKING_OFF, Stage.STOPPED, Stage.GIVEN_UP),
        Stage.PENDING,
        "the wait is over, or somebody has asked for it",
        "wait for its turn",
    ),
    Row(
        Event.GIVE_UP,
        (Stage.PENDING, Stage.STARTING, Stage.SERVING, Stage.BACKING_OFF, Stage.STOPPING),
        Stage.GIVEN_UP,
        "it has ended with 2, 66 or 69, or too often; or its supervision has failed, a defect",
        "answer 503 on its socket, leave it alone",
    ),
    Row(
        Event.END,
        (Stage.STARTING, Stage.SERVING),
        Stage.STOPPED,
        "it has ended with 0: somebody else has stopped it",
        "answer 503 on its socket, leave it alone",
    ),
    Row(
        Event.STOP,
        (Stage.STARTING, Stage.SERVING),
        Stage.STOPPING,
        "a stop, a restart or a change of the file",
        "send SIGTERM; kill it once its bound is over",
    ),
    Row(
        Event.FINISH,
        (Stage.PENDING, Stage.BACKING_OFF, Stage.STOPPING),
        Stage.STOPPED,
        "its process has ended, or there was none",
        "nothing",
    ),
)

RESTING = (Stage.STOPPED, Stage.GIVEN_UP)


def row_for(stage: Stage, event: Event) -> Row | None:
    """The row that `event` takes from `stage`, or None where there is none."""
    return next((r for r in TABLE if r.event is event and stage in r.sources), None)
