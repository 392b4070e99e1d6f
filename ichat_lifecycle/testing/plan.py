"""A life, written down: what each call to the world does, what comes from outside, and when.

As JSON it can be kept, changed by hand and lived again: `ichat-lifecycle simulate PLAN.json`.
"""

from __future__ import annotations

import asyncio
import difflib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import ConfigDict, TypeAdapter, ValidationError

from ichat_lifecycle.config import Settings
from ichat_lifecycle.errors import (
    AddressError,
    ArgumentsError,
    InputMissingError,
    LimitError,
    StartError,
)

_STRICT = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

# What a call can be planned to raise. The last two are nobody's plan in real life.
ERRORS: Mapping[str, Callable[[str], BaseException]] = {
    "AddressError": AddressError,
    "ArgumentsError": ArgumentsError,
    "LimitError": LimitError,
    "StartError": StartError,
    "OSError": OSError,
    "ValueError": ValueError,
    "CancelledError": asyncio.CancelledError,
}

# What happens to a worker from outside. Those with an argument: `request` (seconds of work),
# `block_loop` (seconds), `step_clock` (seconds), `fire` (a trigger).
Do = Literal[
    "stop",
    "stop_now",
    "cancel",
    "engine_dies",
    "engine_freezes",
    "engine_thaws",
    "engine_falls_asleep",
    "server_exits",
    "gateway_refuses",
    "stale_fault",
    "probe_misses",
    "probe_answers",
    "request",
    "sleep",
    "wake",
    "restart",
    "reset_prefix_cache",
    "block_loop",
    "step_clock",
    "fire",
]
DOS: tuple[Do, ...] = get_args(Do)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one call does: after `delay_s` (None: as long as usual) it returns, or raises `error`.

    `hang` waits until cancelled; `ignore_cancel_s` swallows cancellation and goes on that long;
    `says_no` is the answer of a call that asks (health: no; is_sleeping: yes, asleep).
    """

    delay_s: float | None = None
    error: str | BaseException | None = None
    hang: bool = False
    ignore_cancel_s: float = 0.0
    says_no: bool = False

    async def play(
        self,
        call: str = "call",
        usual_s: float = 0.0,
        on_cancel: Callable[[], None] = lambda: None,
    ) -> None:
        """Takes its time, then returns or raises; `on_cancel` is called when it is cancelled."""
        seconds = usual_s if self.delay_s is None else self.delay_s
        try:
            if seconds or self.hang:
                await asyncio.sleep(1e9 if self.hang else seconds)
        except asyncio.CancelledError:
            on_cancel()
            if not self.ignore_cancel_s:
                raise
            await asyncio.sleep(self.ignore_cancel_s)
        if self.error is not None:
            raise self.make_error(call)

    def make_error(self, call: str) -> BaseException:
        """The error of this call."""
        if isinstance(self.error, str):
            return ERRORS[self.error](f"planned: {call}")
        assert self.error is not None
        return self.error


USUAL = Outcome()

# Every call that can be planned, and how many seconds it usually takes in a simulated life.
CALLS: Mapping[str, float] = {
    "control.start": 0.0,
    "heartbeat.start": 0.0,
    "arguments.validate": 0.5,
    "binder.bind": 0.0,
    "server.open": 0.0,
    "engine.start": 2.0,
    "server.attach": 0.5,
    "probe.health": 0.0,
    "probe.inspect": 0.0,
    "probe.warm_up": 0.25,
    "probe.request": 0.25,
    "watchdog.start": 0.0,
    "engine.is_sleeping": 0.0,
    "probe.canary": 0.25,
    "probe.token": 0.0,
    "engine.sleep": 0.5,
    "engine.wake_up": 0.5,
    "engine.reset_prefix_cache": 0.0,
    "engine.describe": 0.0,
    "evidence.save": 0.1,
    "server.drained": 0.0,
    "server.cut": 0.0,
    "watchdog.stop": 0.0,
    "server.detach": 0.0,
    "engine.release": 0.5,
    "engine.release_now": 0.1,
    "server.close": 0.0,
    "binder.release": 0.0,
    "heartbeat.stop": 0.0,
    "control.stop": 0.0,
}


@dataclass(frozen=True, slots=True)
class Event:
    """Something from outside, `at_s` seconds into the life.

    With a `turn`, that counts instead: before the so many-th turn of the event loop.
    """

    at_s: float
    do: Do
    argument: float | str | None = None
    turn: int | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """A whole life.

    `calls` names calls as "engine.start", "probe.canary" and so on; the outcomes are used up one
    call at a time, the last for ever. At `until_s` a stop is asked for, if none has been. What is
    not planned takes as long as CALLS says, but at least `least_s`.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    calls: Mapping[str, tuple[Outcome, ...]] = field(default_factory=dict)
    events: tuple[Event, ...] = ()
    until_s: float = 60.0
    least_s: float = 0.0

    def as_json(self) -> str:
        """One line for each event and each call, so that a person can read it."""
        parts = [f'  "settings": {json.dumps(dict(self.settings))}']
        calls = [
            f"    {json.dumps(name)}: [{', '.join(json.dumps(_brief(o)) for o in outcomes)}]"
            for name, outcomes in self.calls.items()
        ]
        parts.append('  "calls": {' + _lines(calls, "  }"))
        events = [f"    {json.dumps(_brief(event))}" for event in self.events]
        parts.append('  "events": [' + _lines(events, "  ]"))
        parts.append(f'  "until_s": {self.until_s:g},\n  "least_s": {self.least_s:g}')
        return "{\n" + ",\n".join(parts) + "\n}\n"


def _lines(items: list[str], end: str) -> str:
    return "\n" + ",\n".join(items) + "\n" + end if items else end.strip()


def _brief(value: Outcome | Event) -> dict[str, Any]:
    """Only what is not the default."""
    usual = asdict(USUAL) if isinstance(value, Outcome) else {"argument": None, "turn": None}
    return {k: v for k, v in asdict(value).items() if k not in usual or v != usual[k]}


for _class in (Outcome, Event, Plan):
    setattr(_class, "__pydantic_config__", _STRICT)  # noqa: B010  # only TypeAdapter knows it

_PLAN = TypeAdapter(Plan)


def load_plan(path: Path) -> Plan:
    """A plan from a file.

    Raises:
        InputMissingError: the file cannot be read.
        ArgumentsError: it is not a plan; says where.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputMissingError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    try:
        plan = _PLAN.validate_json(text)
        Settings.model_validate(plan.settings)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ArgumentsError(f"{path}: {where}: {first['msg']}") from None
    for name, outcomes in plan.calls.items():
        if name not in CALLS:
            near = difflib.get_close_matches(name, CALLS, n=1)
            meant = f" (did you mean {near[0]!r}?)" if near else ""
            raise ArgumentsError(f"{path}: calls.{name}: no such call{meant}")
        for outcome in outcomes:
            if isinstance(outcome.error, str) and outcome.error not in ERRORS:
                raise ArgumentsError(
                    f"{path}: calls.{name}: error {outcome.error!r}: one of {', '.join(ERRORS)}"
                )
    return plan
