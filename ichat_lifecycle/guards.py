"""The guards: pure predicates over a frozen snapshot of facts. No I/O, no clock, no awaiting."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Facts:
    """Everything a guard may look at, taken by the lifecycle in one step of its loop."""

    arguments_valid: bool = False
    socket_open: bool = False
    stop_asked: bool = False
    engine_alive: bool = False
    health_answered: bool = False
    warmed_up: bool = False
    fault_known: bool = False
    healthy_streak: int = 0
    recover_after: int = 1
    canary_answered: bool = False
    restarts_left: int = 0
    resources_held: int = 0


Guard = Callable[[Facts], bool]

GUARDS: Mapping[str, Guard] = {
    "arguments_valid": lambda f: f.arguments_valid,
    "socket_open": lambda f: f.socket_open,
    "no_stop_asked": lambda f: not f.stop_asked,
    "engine_alive": lambda f: f.engine_alive,
    "health_answered": lambda f: f.health_answered,
    "warmed_up": lambda f: f.warmed_up,
    "fault_known": lambda f: f.fault_known,
    "healthy_in_a_row": lambda f: f.healthy_streak >= f.recover_after,
    "canary_answered": lambda f: f.canary_answered,
    "restart_budget_left": lambda f: f.restarts_left > 0,
    "everything_released": lambda f: f.resources_held == 0,
}


def failing(names: tuple[str, ...], facts: Facts) -> tuple[str, ...]:
    """The guards among `names` that do not hold for `facts`, in order.

    Only `True` holds: a guard that says anything else is broken, and a broken guard refuses.

    Raises:
        KeyError: there is no guard of that name.
    """
    return tuple(name for name in names if GUARDS[name](facts) is not True)
