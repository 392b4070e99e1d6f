"""Every ordering of a few events, at every await of a life: systematically, not by sampling.

A life is a sequence of turns of the event loop, and before each of them something may come from
outside. `bursts` has every ordering of up to so many events begin at every await, one event a turn.
`spread` lets them come at any awaits, however far apart: it branches at each await whose state it
has not met before, which it recognises by a fingerprint of everything that the rest of the life
depends on: where each task stands, what is scheduled, and what the objects hold.
"""

from __future__ import annotations

import asyncio
import collections
import datetime
import enum
import functools
import itertools
import types
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ichat_lifecycle.config import Settings
from ichat_lifecycle.journal import Journal
from ichat_lifecycle.testing.invariants import check
from ichat_lifecycle.testing.life import Implementation, Life, Stage
from ichat_lifecycle.testing.plan import Do, Event, Plan

EVENTS: tuple[Do, ...] = (
    "stop",
    "cancel",
    "stop_now",
    "engine_dies",
    "server_exits",
    "restart",
    "probe_misses",
    "sleep",
)
PLAIN = Plan(until_s=6.0)
# Every call takes its time, so that each is an await at which something can come.
SLOW = replace(PLAIN, least_s=0.05)

# What the rest of a life does not depend on: where it came from, and when.
_PAST = frozenset({"seq", "listeners", "stop_hooks", "history", "touched", "paces"})
_TIMELESS = (
    float,
    datetime.datetime,
    asyncio.AbstractEventLoop,
    asyncio.Handle,
    Settings,
    Journal,
    Life,
)


def bursts(implementation: Implementation, events: Sequence[Do] = EVENTS[:6], most: int = 4) -> int:
    """Every ordering of up to `most` different events, beginning at every await.

    Returns:
        how many lives were lived.

    Raises:
        Broken: one broke an invariant.
    """
    lives = 0
    with Stage() as stage:
        for turn in _awaits(stage, implementation):
            for count in range(1, most + 1):
                for ordering in itertools.permutations(events, count):
                    course = tuple(Event(0, do, turn=turn + i) for i, do in enumerate(ordering))
                    check(stage.live(replace(SLOW, events=course), implementation))
                    lives += 1
    return lives


def _awaits(stage: Stage, implementation: Implementation) -> list[int]:
    """The turns of the plain life at which everything waits."""
    turns: list[int] = []
    life = stage.prepare(SLOW, implementation)

    def look() -> None:
        if not stage.loop.busy:
            turns.append(life.turn)

    life.at_turn = look
    stage.finish(life)
    return turns


def spread(
    implementation: Implementation,
    events: Sequence[Do] = EVENTS,
    *,
    most: int = 2,
    every_turn: bool = False,
) -> int:
    """Up to `most` events, any of `events` each, at any awaits; or, with `every_turn`, any turns.

    Returns:
        how many lives were lived.

    Raises:
        Broken: one broke an invariant.
    """
    plan = PLAIN if every_turn else SLOW
    met: set[int] = set()
    # Shortest first: a state is then met first by the course that leaves most to come.
    courses: collections.deque[tuple[Event, ...]] = collections.deque([()])
    lives = 0
    with Stage() as stage:
        while courses:
            course = courses.popleft()
            life = stage.prepare(replace(plan, events=course), implementation)
            if len(course) < most:
                look = _Look(life, stage, course, every_turn, met)
                life.at_turn = look
            stage.finish(life)
            check(life)
            lives += 1
            if len(course) < most:
                courses.extend((*course, Event(0, do, turn=t)) for t in look.new for do in events)
    return lives


class _Look:
    """Finds the turns of a life whose state is new, until one is met that is known."""

    def __init__(
        self, life: Life, stage: Stage, course: tuple[Event, ...], every_turn: bool, met: set[int]
    ) -> None:
        self.new: list[int] = []
        self._life = life
        self._stage = stage
        self._from = course[-1].turn or 0 if course else 0
        self._every_turn = every_turn
        self._met = met

    def __call__(self) -> None:
        life = self._life
        if life.turn < self._from or (self._stage.loop.busy and not self._every_turn):
            return
        state = hash(fingerprint(life, self._stage))
        if state in self._met:
            life.at_turn = None
            return
        self._met.add(state)
        self.new.append(life.turn)


def fingerprint(life: Life, stage: Stage) -> Hashable:
    """All that the rest of this life depends on, times of day and of the loop aside."""
    loop = stage.loop
    now = loop.time()
    seen: dict[int, int] = {}
    tasks = tuple(_position(task, seen) for task in loop.tasks if not task.done())
    ready = tuple(_callback(h) for h in loop._ready if not h.cancelled())
    waiting = tuple((round(t.when() - now, 3), _callback(t)) for t in loop.timers)
    return tasks, ready, waiting, _frozen(life.subject, seen), _frozen(life.world, seen)


def _position(task: asyncio.Task[Any], seen: dict[int, int]) -> Hashable:
    """Where a task stands: its stack of coroutines, and what they hold."""
    places = []
    inner: Any = task.get_coro()
    while (frame := getattr(inner, "cr_frame", None)) is not None:
        held = _frozen({k: v for k, v in frame.f_locals.items() if k != "self"}, seen)
        places.append((frame.f_code.co_qualname, frame.f_lasti, held))
        inner = inner.cr_await
    name = task.get_name()
    return "" if name.startswith("Task-") else name, task.cancelling(), tuple(places)


def _callback(handle: asyncio.Handle) -> str:
    callback = getattr(handle, "_callback", None)  # asyncio's own name
    owner = getattr(callback, "__self__", None)
    name = getattr(callback, "__qualname__", type(callback).__name__)
    return f"{name}:{owner.get_name() if isinstance(owner, asyncio.Task) else type(owner).__name__}"


def _frozen(value: Any, seen: dict[int, int]) -> Hashable:
    """`value` without identities and times, so that two lives can be compared."""
    if value is None or isinstance(value, bool | int | str | bytes | enum.Enum):
        return value
    if isinstance(value, _TIMELESS):
        return type(value).__name__
    known = seen.get(id(value))
    if known is not None:
        return known
    seen[id(value)] = len(seen)
    return _freeze(value, seen)


def _freeze(value: Any, seen: dict[int, int]) -> Hashable:
    if isinstance(value, Mapping):
        return tuple((str(key), _frozen(item, seen)) for key, item in value.items())
    if isinstance(value, asyncio.Queue):
        value = value._queue  # type: ignore[attr-defined]  # asyncio's own name
    if isinstance(value, list | tuple | collections.deque):
        return tuple(_frozen(item, seen) for item in value)
    return type(value).__name__, _essence(value) or tuple(_fields(value, seen))


def _essence(value: Any) -> Hashable:
    """What there is to know of things that are not ours; None where their fields tell."""
    if isinstance(value, set | frozenset):
        return len(value)
    if isinstance(value, asyncio.Future):
        return f"done {value.done()}"
    if isinstance(value, asyncio.Event):
        return f"set {value.is_set()}"
    if isinstance(value, BaseException):
        return str(value)
    if isinstance(value, types.FunctionType | types.MethodType | functools.partial):
        return getattr(value, "__qualname__", "partial")
    return None


def _fields(value: Any, seen: dict[int, int]) -> Iterator[Hashable]:
    held = getattr(value, "__dict__", None)
    names = list(held) if held is not None else getattr(type(value), "__slots__", ())
    for name in names:
        if name not in _PAST:
            yield name, _frozen(getattr(value, name, None), seen)
