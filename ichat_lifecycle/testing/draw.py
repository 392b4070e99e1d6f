"""Whole lives from plain numbers: one number is one thing that goes other than usual.

Hypothesis draws them in the tests, a seeded generator in `fuzz`. Fewer and smaller numbers
are simpler lives, so that what Hypothesis shrinks to is a plan that a person can read.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from ichat_lifecycle.states import Trigger
from ichat_lifecycle.testing.plan import CALLS, USUAL, Do, Event, Outcome, Plan

# Times lie on the same grid as the usual durations of calls: what happens at once, happens often.
GRID_S = 0.05
TIMES = 320
UNTIL_S = 10.0
NTH = 3
MOST = 10  # things in one life that go other than usual

# Worlds to live in, by name.
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    "no restarts": {"restart": {"max": 0}},
    "impatient": {
        "start": {
            "arguments_timeout": 3,
            "bind_timeout": 1,
            "engine_timeout": 6,
            "serve_timeout": 2,
            "ready_timeout": 3,
        },
        "health": {
            "interval": 2,
            "timeout": 2,
            "recovery_interval": 0.5,
            "degrade_after": 2,
            "recover_after": 1,
            "give_up_after": 3,
            "canary_timeout": 1,
        },
        "restart": {"max": 1},
        "stop": {"cancel": 0.5, "drain": 2, "cut": 0.5, "app": 0.5, "engine": 1},
    },
    "bare": {"warm_up": {"requests": 0}, "stop": {"drain": 0}, "restart": {"max": 1}},
}

_EVENTS: tuple[tuple[Do, tuple[float | str | None, ...]], ...] = (
    ("stop", (None,)),
    ("engine_dies", (None,)),
    ("engine_freezes", (None,)),
    ("engine_thaws", (None,)),
    ("request", (0.5, 3.0, 20.0)),
    ("cancel", (None,)),
    ("stop_now", (None,)),
    ("restart", (None,)),
    ("sleep", (None,)),
    ("wake", (None,)),
    ("server_exits", (None,)),
    ("gateway_refuses", (None,)),
    ("engine_falls_asleep", (None,)),
    ("probe_misses", (None,)),
    ("probe_misses", (None,)),
    ("probe_answers", (None,)),
    ("stale_fault", (None,)),
    ("reset_prefix_cache", (None,)),
    ("block_loop", (0.3, 7.0, 60.0)),
    ("step_clock", (-3600.0, 3600.0)),
    ("fire", tuple(trigger.value for trigger in Trigger)),
)
_OUTCOMES = (
    Outcome(error="StartError"),
    Outcome(hang=True),
    Outcome(delay_s=2.0),
    Outcome(error="OSError", delay_s=0.5),
    Outcome(says_no=True),
    Outcome(hang=True, ignore_cancel_s=0.3),
    Outcome(hang=True, ignore_cancel_s=40.0),
    Outcome(delay_s=12.0),
    Outcome(error="LimitError"),
    Outcome(error="CancelledError"),
    Outcome(delay_s=1.0, error="ValueError", ignore_cancel_s=2.0),
    Outcome(delay_s=0.0),
)
_CALLS = tuple(CALLS)
_KINDS = 2 * len(_EVENTS) + len(_CALLS)

# A number holds when, which variant, and what, from its lowest part to its highest.
_VARIANTS = 36  # divisible by the number of outcomes, and by NTH
NUMBERS = TIMES * _VARIANTS * _KINDS


def numbers_in(drawn: bytes) -> list[int]:
    """One from every three bytes. Hypothesis draws bytes evenly, but integers mostly small."""
    return [
        int.from_bytes(drawn[at : at + 3], "big") * NUMBERS >> 24 for at in range(0, len(drawn), 3)
    ]


def plan_of(numbers: Sequence[int], settings: Mapping[str, Any] | None = None) -> Plan:
    """The plan that these numbers, each below NUMBERS, stand for."""
    calls: dict[str, list[Outcome]] = {}
    events: list[Event] = []
    for number in numbers:
        rest, when = divmod(number, TIMES)
        what, variant = divmod(rest, _VARIANTS)
        if what < 2 * len(_EVENTS):
            do, arguments = _EVENTS[what // 2]
            events.append(Event(round(when * GRID_S, 2), do, arguments[variant % len(arguments)]))
        else:
            name = _CALLS[(what - 2 * len(_EVENTS)) % len(_CALLS)]
            _plan_call(calls.setdefault(name, []), when % NTH, _OUTCOMES[variant % len(_OUTCOMES)])
    return Plan(
        settings or {},
        {name: (*outcomes, USUAL) for name, outcomes in calls.items()},
        tuple(sorted(events, key=lambda event: event.at_s)),
        until_s=UNTIL_S,
    )


def _plan_call(outcomes: list[Outcome], nth: int, outcome: Outcome) -> None:
    outcomes += [USUAL] * (nth + 1 - len(outcomes))
    outcomes[nth] = outcome


def numbers_of(generator: random.Random) -> list[int]:
    """Numbers for a life, drawn without Hypothesis."""
    return [generator.randrange(NUMBERS) for _ in range(generator.randint(0, MOST))]
