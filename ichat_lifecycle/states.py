"""The states, the triggers and the one table of transitions. Data only: read this file first.

Rules, which the machine, the guards, the tests, `states.md` and the control plane all follow:

1. A transition happens only by a row of TABLE. Only the lifecycle's own loop fires triggers.
2. Every guard of the row must hold, else the trigger is refused and nothing changes.
3. A row's action runs BEFORE the state changes when it can fail (the state stays, `stop` follows),
   and AFTER it when it must not fail but has to be seen (STOPPING is visible while it drains).
4. The ready event is set exactly while the state is READY.
5. `stop` can be asked for in every state but the last two; nothing leaves STOPPING but to STOPPED.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class State(enum.StrEnum):
    """Where a worker is in its life."""

    PARSED = "PARSED"
    BOUND = "BOUND"
    ENGINE_UP = "ENGINE_UP"
    SERVING = "SERVING"
    READY = "READY"
    DEGRADED = "DEGRADED"
    STOPPING = "STOPPING"
    STOPPED = "STOPPED"


class Trigger(enum.StrEnum):
    """What may move a worker from one state to another."""

    BIND = "bind"
    START_ENGINE = "start_engine"
    SERVE = "serve"
    BECOME_READY = "become_ready"
    DEGRADE = "degrade"
    RECOVER = "recover"
    RESTART_ENGINE = "restart_engine"
    STOP = "stop"
    FINISH = "finish"


class When(enum.StrEnum):
    """Whether a row's action runs before or after the change of state (rule 3)."""

    BEFORE = "before"
    AFTER = "after"


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table.

    `guards` name predicates in guards.py, `action` a method in actions.py. `meaning` is for people.
    """

    trigger: Trigger
    sources: tuple[State, ...]
    dest: State
    guards: tuple[str, ...]
    action: str | None
    meaning: str
    when: When = When.BEFORE


STARTING_STATES = (State.PARSED, State.BOUND, State.ENGINE_UP, State.SERVING)
LIVE_STATES = (
    *STARTING_STATES,
    State.READY,
    State.DEGRADED,
)

TABLE: tuple[Row, ...] = (
    Row(
        Trigger.BIND,
        (State.PARSED,),
        State.BOUND,
        ("arguments_valid",),
        "bind",
        "bind the listening socket, raise RLIMIT_NOFILE, answer 503 on it",
    ),
    Row(
        Trigger.START_ENGINE,
        (State.BOUND,),
        State.ENGINE_UP,
        ("socket_open", "no_stop_asked"),
        "start_engine",
        "start vLLM's engine client",
    ),
    Row(
        Trigger.SERVE,
        (State.ENGINE_UP,),
        State.SERVING,
        ("engine_alive",),
        "serve",
        "build vLLM's app and its state, attach them to the server on the socket",
    ),
    Row(
        Trigger.BECOME_READY,
        (State.SERVING,),
        State.READY,
        ("health_answered", "warmed_up"),
        "become_ready",
        "set the ready event, start the watchdog",
    ),
    Row(
        Trigger.DEGRADE,
        (State.READY,),
        State.DEGRADED,
        ("fault_known",),
        None,
        "clear the ready event, record the reason",
    ),
    Row(
        Trigger.RECOVER,
        (State.DEGRADED,),
        State.READY,
        ("healthy_in_a_row", "canary_answered"),
        None,
        "set the ready event",
    ),
    Row(
        Trigger.RESTART_ENGINE,
        (State.DEGRADED,),
        State.BOUND,
        ("restart_budget_left", "no_stop_asked"),
        "restart_engine",
        "release the app and the engine, keep the socket",
    ),
    Row(
        Trigger.STOP,
        LIVE_STATES,
        State.STOPPING,
        (),
        "stop",
        "refuse new work, drain, release in reverse order",
        When.AFTER,
    ),
    Row(
        Trigger.FINISH,
        (State.STOPPING,),
        State.STOPPED,
        ("everything_released",),
        None,
        "nothing: it is the proof that everything is released",
    ),
)


def allowed(state: State) -> tuple[Trigger, ...]:
    """The triggers that have a row from `state`, in the table's order; empty for STOPPED."""
    return tuple(row.trigger for row in TABLE if state in row.sources)


def row_for(state: State, trigger: Trigger) -> Row | None:
    """The row that `trigger` takes from `state`, or None where there is none."""
    return next((r for r in TABLE if r.trigger is trigger and state in r.sources), None)
