"""What README.md and states.md promise of a worker's life, worked out without its code.

Knows neither the table nor the machine. A `Story` is one course of events that the documents allow.
Where timing leaves it open there are several; each look at the worker rules out those that differ.
All times are in seconds.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ichat_lifecycle.config import Settings
from ichat_lifecycle.states import State

Window = tuple[float, float]  # the earliest and the latest time of something

EPSILON_S = 1e-6  # times are sums of floats
ABOUT_A_SECOND_S = 1.0  # "With nothing in flight and the defaults, it takes about a second."
COMMAND_TIMEOUT_S = 60.0  # "504 no outcome in time"

IN_SERVICE = (State.READY, State.DEGRADED)
OVER = (State.STOPPING, State.STOPPED)
RETURNED, CANCELLED = "returned", "cancelled"

# What only an engine that answers can bring about; and what the watchdog's verdicts can.
_ANSWERS = frozenset({"warmed_up", "canary_answered", "command_answered", "nap_seen", "well_again"})
_VERDICTS = frozenset({"missed", "lost", "nap_seen", "well_again"})


@dataclass(frozen=True, slots=True)
class World:
    """What a worker lives in. `takes_s` is how long calls take, by their names in a plan."""

    settings: Settings
    takes_s: Mapping[str, float]
    engines_that_start: int = 1000
    canaries_that_fail: int = 0


@dataclass(frozen=True, slots=True, order=True)
class End:
    """How run() ended: RETURNED, CANCELLED, or an error's code; with the exit code of that."""

    how: str
    exit_code: int = 0

    def __str__(self) -> str:
        return f"{self.how} ({self.exit_code})" if self.exit_code else self.how


@dataclass(frozen=True, slots=True)
class Seen:
    """One look at a worker. `asleep` and `passes` (a request) are None where nobody looked."""

    state: State
    ready: bool
    restarts: int
    ever_ready: bool
    asleep: bool | None
    passes: bool | None
    end: End | None

    def __str__(self) -> str:
        passes = {None: "", True: ", a request passes", False: ", a request gets 503"}[self.passes]
        return (
            f"{self.state}, ready event {self.ready}, ever ready {self.ever_ready}, "
            f"{self.restarts} restarts, engine asleep {self.asleep}{passes}, "
            f"run() {self.end or 'goes on'}"
        )


def _after(at: Window, seconds: float) -> Window:
    return at[0] + seconds, at[1] + seconds


def _not_before(window: Window, at: Window) -> Window:
    return max(window[0], at[0]), max(window[1], at[1])


@dataclass
class Story:
    """One course of events. `due` holds what will happen by itself, and when.

    What comes from outside is a method, at the time `now`; what happens by itself is a method
    `_on_NAME`, at a time that is known only as a window.
    """

    world: World
    now: float = 0.0
    state: State = State.PARSED
    due: dict[str, Window] = field(default_factory=dict)
    ends: frozenset[End] = frozenset()
    ever_ready: bool = False
    restarts: int = 0
    budget_spent: int = 0
    # The engine.
    engines: int = 0
    alive: bool = False
    frozen: bool = False
    asleep: bool = False
    silent_since: Window = (0.0, 0.0)
    # What is under way: a command, "canary" or "release"; what waits behind it.
    doing: str | None = None
    commands: list[str] = field(default_factory=list)
    canary_void: bool = False  # a probe has shown otherwise since it was asked for
    warm_ups_left: int = 0
    canaries: int = 0
    in_flight: list[float] = field(default_factory=list)  # when each request is to end
    drain_from: Window = (0.0, 0.0)
    # Moments at which something more is open: what came at once with something else.
    begun_s: float | None = None
    died_s: float | None = None
    cut_s: float | None = None
    in_flight_before_cut: tuple[float, ...] = ()
    frozen_before_cut: bool = False
    thawed_s: float | None = None
    in_flight_before_thaw: tuple[float, ...] = ()
    cancelled_s: float | None = None

    def __post_init__(self) -> None:
        if not self.due:
            self.due = {"bound": _after((0.0, 0.0), self.world.takes_s["arguments.validate"])}

    def another(self) -> Story:
        """A copy that goes its own way."""
        other = copy.copy(self)
        other.due, other.commands = dict(self.due), list(self.commands)
        other.in_flight = list(self.in_flight)
        return other

    def allows(self, seen: Seen) -> bool:
        """Whether this look fits this story."""
        return (
            seen.state is self.state
            and seen.ready is (self.state is State.READY)
            and seen.restarts == self.restarts
            and seen.ever_ready is self.ever_ready
            and seen.asleep in (None, self.asleep)
            and seen.passes in (None, self.state is State.READY)
            and (seen.end in self.ends if self.state is State.STOPPED else seen.end is None)
        )

    def __str__(self) -> str:
        ends = " or ".join(str(end) for end in sorted(self.ends))
        return (
            f"{self.state}, ever ready {self.ever_ready}, {self.restarts} restarts, "
            f"engine asleep {self.asleep}" + (f", run() then: {ends}" if ends else "")
        )

    # --- time

    def _open(self, name: str) -> Window | None:
        """When this can happen; None while something holds it back."""
        lo, hi = self.due[name]
        if self.frozen and name in _ANSWERS:
            return None
        if self.doing and name in ("well_again", "next_command"):
            return None
        return lo, hi

    def until(self, to_s: float) -> list[Story]:
        """All that this can have become by then."""
        windows = {name: w for name in self.due if (w := self._open(name)) is not None}
        latest = min([hi for _, hi in windows.values()], default=float("inf"))
        stories = []
        if latest >= to_s - EPSILON_S:
            stories.append(self._idle_until(to_s))
        for name, (lo, hi) in windows.items():
            if lo <= min(latest, to_s) + EPSILON_S:
                other = self.another()
                del other.due[name]
                getattr(other, f"_on_{name}")((lo, max(lo, min(hi, latest, to_s))))
                stories += other.until(to_s)
        return stories

    def _idle_until(self, to_s: float) -> Story:
        other = self.another()
        other.now = to_s
        other.due = {name: (max(lo, to_s), max(hi, to_s)) for name, (lo, hi) in self.due.items()}
        for name in self.due.keys() & (_ANSWERS | _VERDICTS):
            other.due[name] = self.due[name]  # what is held back keeps its own times
        return other

    # --- the way up

    def _on_bound(self, at: Window) -> None:
        self._load(at)

    def _load(self, at: Window) -> None:
        """A worker in BOUND gets a new engine."""
        self.state, self.doing = State.BOUND, None
        self.frozen = self.asleep = False
        self.engines += 1
        starts = self.engines <= self.world.engines_that_start
        loaded = _after(at, self.world.takes_s["engine.start"])
        self.due = {"loaded": loaded} if starts else {"not_started": loaded}

    def _on_not_started(self, at: Window) -> None:
        self._fail("engine_start_failed", at)

    def _on_loaded(self, at: Window) -> None:
        self.state, self.alive = State.ENGINE_UP, True
        self.due = {"attached": _after(at, self.world.takes_s["server.attach"])}

    def _on_attached(self, at: Window) -> None:
        self.state = State.SERVING
        self.warm_ups_left = self.world.settings.warm_up.requests
        self.due = {"not_ready_in_time": _after(at, self.world.settings.start.ready_timeout)}
        self._warm_up(at)

    def _warm_up(self, at: Window) -> None:
        if self.warm_ups_left:
            self.due["warmed_up"] = _after(at, self.world.takes_s["probe.warm_up"])
            return
        self.silent_since = at  # of an engine that was frozen before anybody asked it
        self._become_ready(at)
        self._free(at)

    def _on_warmed_up(self, at: Window) -> None:
        self.warm_ups_left -= 1
        self._warm_up(at)

    def _on_not_ready_in_time(self, at: Window) -> None:
        self._fail("deadline_exceeded", at)

    def _become_ready(self, at: Window) -> None:
        self.state, self.ever_ready = State.READY, True
        for name in ("not_ready_in_time", "canary_late"):
            self.due.pop(name, None)
        self._watch(at)

    # --- the watchdog

    def _watch(self, at: Window) -> None:
        """What its verdicts will lead to, with the engine as it is."""
        if self.ends:
            return
        health = self.world.settings.health
        for name in _VERDICTS & self.due.keys():
            del self.due[name]
        if self.frozen:
            # The first question that is not answered comes within an interval.
            first, last = self.silent_since
            silent = first, last + max(health.interval, health.recovery_interval)
            self.due["missed"] = _after(silent, health.degrade_after * health.timeout)
            self.due["lost"] = _after(silent, health.give_up_after * health.timeout)
        elif self.asleep and (self.state is State.READY or self.doing == "canary"):
            self.due["nap_seen"] = at[0], at[1] + health.interval
        elif self.state is State.DEGRADED and not self.asleep:
            answers_s = health.recover_after * health.recovery_interval
            self.due["well_again"] = at[0], at[1] + answers_s

    def _degrade(self, at: Window) -> None:
        if self.state is State.READY:
            self.state = State.DEGRADED
            self._watch(at)

    def _on_missed(self, at: Window) -> None:
        self.canary_void = True
        self._degrade(at)

    def _on_nap_seen(self, at: Window) -> None:
        self.canary_void = True
        self._degrade(at)

    def _on_lost(self, at: Window) -> None:
        self._lose("engine_hung", at)

    def _on_well_again(self, at: Window) -> None:
        if not self.world.settings.warm_up.requests:
            self._become_ready(at)
            return
        self.doing, self.canary_void = "canary", False
        self.canaries += 1
        fails = self.canaries <= self.world.canaries_that_fail
        name = "canary_failed" if fails else "canary_answered"
        self.due[name] = _after(at, self.world.takes_s["probe.canary"])
        self.due["canary_late"] = _after(at, self.world.settings.health.canary_timeout)

    def _on_canary_answered(self, at: Window) -> None:
        if self.canary_void:
            self._on_canary_failed(at)
        else:
            self._become_ready(at)
            self._free(at)

    def _on_canary_failed(self, at: Window) -> None:
        for name in ("canary_answered", "canary_failed", "canary_late"):
            self.due.pop(name, None)
        self._watch(at)
        self._free(at)

    _on_canary_late = _on_canary_failed

    def _free(self, at: Window) -> None:
        """Nothing is under way any more: what waited is taken up, in an order of its own."""
        self.doing = None
        for name in _VERDICTS & self.due.keys():
            self.due[name] = _not_before(self.due[name], at)
        if self.commands:
            self.due["next_command"] = at

    def _lose(self, code: str, at: Window) -> None:
        """The engine is gone for good."""
        self.state = State.DEGRADED
        restart = self.world.settings.restart
        if self.budget_spent < restart.max:
            wait_s = restart.backoff * 2 ** (self.budget_spent - 1) if self.budget_spent else 0.0
            self.budget_spent += 1
            self._give_up_on_engine()
            loss = _after(at, min(wait_s, restart.backoff_max))
            self.due = {"to_be_replaced": _after(loss, self.world.takes_s["evidence.save"])}
        else:
            self._fail(code, at)
            self._give_up_on_engine()

    def _give_up_on_engine(self) -> None:
        """Nobody waits for it any more: what still ran is cut."""
        self.cut_s, self.frozen_before_cut = self.now, self.frozen
        self.in_flight_before_cut = tuple(self.in_flight)
        self.doing, self.alive, self.frozen = "release", False, False
        self.in_flight.clear()

    def _on_to_be_replaced(self, at: Window) -> None:
        self._release(at)

    def _release(self, at: Window) -> None:
        """The old engine goes."""
        self._give_up_on_engine()
        self.due = {"released": _after(at, self.world.takes_s["engine.release"])}

    def _on_released(self, at: Window) -> None:
        self.restarts += 1
        self._load(at)

    # --- commands

    def command(self, name: str) -> list[Story]:
        """Has an effect in READY and DEGRADED only; one after the other."""
        if self.state not in IN_SERVICE:
            return [self]
        stories = [self]
        if self.died_s == self.now:  # asked of the old engine or of the next one?
            stories.append(self.another())
        self.commands.append(name)
        if not self.doing and "next_command" not in self.due:
            self.begun_s = self.now
            self._begin(self.commands.pop(0), (self.now, self.now))
        return stories

    def _on_next_command(self, at: Window) -> None:
        self._begin(self.commands.pop(0), at)

    def _begin(self, name: str, at: Window) -> None:
        self.doing = name
        drains = name in ("sleep", "restart")
        stop = self.world.settings.stop
        limit_s = COMMAND_TIMEOUT_S + (stop.drain + stop.cut if drains else 0.0)
        self.due["command_late"] = _after(at, limit_s)
        if drains:
            self._degrade(at)
            self._drain(at)
        else:
            self._ask(at)

    def _ask(self, at: Window) -> None:
        call = {"sleep": "sleep", "wake": "wake_up"}.get(str(self.doing), str(self.doing))
        self.due["command_answered"] = _after(at, self.world.takes_s[f"engine.{call}"])

    def _on_command_answered(self, at: Window) -> None:
        del self.due["command_late"]
        was_asleep = self.asleep
        if self.doing == "sleep":
            self.asleep = True
        elif self.doing == "wake":
            self.asleep = False
        if self.doing == "sleep" or was_asleep is not self.asleep:
            self._watch(at)
        self._free(at)

    def _on_command_late(self, at: Window) -> None:
        """It failed, which does no harm."""
        for name in ("drained", "command_answered"):
            self.due.pop(name, None)
        self._free(at)

    # --- requests

    def request(self, work_s: float, passes: bool) -> list[Story]:
        """Was let in, or was not; that is for `allows` to judge."""
        if passes:
            self.in_flight.append(self.now + work_s)
        return [self]

    def _drain(self, at: Window) -> None:
        self.drain_from = at
        self.in_flight = [end_s for end_s in self.in_flight if self.frozen or end_s > at[0]]
        last_s = max(self.in_flight, default=0.0) if not self.frozen else float("inf")
        limit = _after(at, self.world.settings.stop.drain)
        done = _not_before((last_s, last_s), at) if self.in_flight else at
        self.due["drained"] = min(done[0], limit[0]), min(done[1], limit[1])

    def _drain_again(self) -> None:
        """The engine has changed its pace, and requests go on or hang."""
        if "drained" in self.due:
            began = self.drain_from
            self._drain(began)
            self.due["drained"] = _not_before(self.due["drained"], (self.now, self.now))

    def _on_drained(self, at: Window) -> None:
        self.in_flight.clear()
        if self.state is State.STOPPING:
            self.due = {"ended": (at[0], at[1] + ABOUT_A_SECOND_S)}
        elif self.doing == "restart":
            self._release(at)
        else:
            self._ask(at)

    # --- the engine, by itself

    def engine_freezes(self) -> list[Story]:
        if self.frozen or not (self.alive or self.state is State.BOUND):
            return [self]
        stories = [self]
        if self.thawed_s == self.now:  # for no time at all: it may have answered nothing
            stories.append(self.another())
            stories[-1].in_flight = list(self.in_flight_before_thaw)
        self.in_flight = [end_s for end_s in self.in_flight if end_s > self.now]
        for story in stories:
            story._freeze()
        return stories

    def _freeze(self) -> None:
        self.frozen = True
        first = self.silent_since[0] if self.thawed_s == self.now else self.now
        self.silent_since = first, self.now
        if self.state in IN_SERVICE:
            self._watch(self.silent_since)
        self._drain_again()

    def engine_thaws(self) -> list[Story]:
        if not self.frozen:
            return [self]
        self.in_flight_before_thaw = tuple(self.in_flight)
        self._go_on()
        self.thawed_s = self.now
        for name in _ANSWERS & self.due.keys():
            self.due[name] = _not_before(self.due[name], (self.now, self.now))
        if self.state in IN_SERVICE:
            self._watch((self.now, self.now))
        return [self]

    def _go_on(self) -> None:
        self.frozen = False
        self._drain_again()

    def engine_falls_asleep(self) -> list[Story]:
        self.asleep = True  # until there is another one
        if self.alive and self.state in IN_SERVICE and not self.frozen:
            self._watch((self.now, self.now))
        return [self]

    def engine_dies(self) -> list[Story]:
        if not self.alive:
            return [self]
        stories = [self]
        if self.doing and self.begun_s == self.now:  # or had it not begun, and waits for the next?
            stories.append(self.another())
            stories[-1].commands.insert(0, self.doing)
        for story in stories:
            story._die()
        return stories

    def _die(self) -> None:
        self.alive, self.died_s = False, self.now
        self._go_on()
        if self.ends:
            return
        if self.state in IN_SERVICE:
            self._lose("engine_died", (self.now, self.now))
        elif self.state is not State.STOPPING:
            self._fail("engine_died", (self.now, self.now))

    def stale_fault(self) -> list[Story]:
        """An engine that has been replaced ends: that is no news."""
        return [self]

    # --- the end

    def _fail(self, code: str, at: Window) -> None:
        """Ends it, once what can be seen of the engine has been saved: there may be none to see."""
        self.ends = self.ends or frozenset({End(code, 75 if self.ever_ready else 70)})
        self.due = {"failed": (at[0], at[1] + self.world.takes_s["evidence.save"])}

    def _on_failed(self, at: Window) -> None:
        self._end(None, at)

    def _end(self, end: End | None, at: Window) -> None:
        """The first cause survives: it is asked for once."""
        self.state, self.doing = State.STOPPING, None
        self.ends = self.ends or frozenset({end} if end else ())
        self.commands.clear()
        self.due = {}
        self._drain(at)

    def _on_ended(self, at: Window) -> None:
        self.state = State.STOPPED

    def _hurry(self) -> None:
        """No drain, and an engine that is killed."""
        self.in_flight.clear()
        latest = self.due.get("ended", (0.0, float("inf")))[1]
        self.due = {"ended": (self.now, min(latest, self.now + ABOUT_A_SECOND_S))}

    def _or_died(self) -> None:
        """A death of the same moment that a restart would have mended may count as the cause."""
        if self.died_s == self.now:
            self.ends |= {End("engine_died", 75)}

    def _end_at_once(self, end: End) -> None:
        """Whether a loss of the same moment had already led to a cut is open."""
        self._end(end, (self.now, self.now))
        if self.cut_s == self.now:
            self.in_flight, self.frozen = list(self.in_flight_before_cut), self.frozen_before_cut
            self._drain((self.now, self.now))
            self.due["drained"] = self.now, self.due["drained"][1]

    def server_exits(self) -> list[Story]:
        if self.state in (State.PARSED, *OVER):
            return [self]
        serving = self.state in IN_SERVICE
        self._degrade((self.now, self.now))
        self._fail("server_exited", (self.now, self.now))
        if serving:
            self._give_up_on_engine()
        self._or_died()
        return [self]

    def gateway_refuses(self) -> list[Story]:
        if self.state not in OVER:
            self._end_at_once(End("model_name_taken", 69))
            self._or_died()
        return [self]

    def stop(self) -> list[Story]:
        if self.state not in OVER:
            self._end_at_once(End(RETURNED))
            self._or_died()
        return [self]

    def stop_now(self) -> list[Story]:
        self.stop()
        if self.state is State.STOPPING:
            self._hurry()
        return [self]

    def cancel(self) -> list[Story]:
        if self.state is State.STOPPED:
            return [self]
        stories, stopping = [self], self.state is State.STOPPING
        again = self.cancelled_s is not None and self.cancelled_s != self.now
        if not stopping:
            self._end_at_once(End(CANCELLED))
        elif not again:  # whether the first one hurries a stop is not said
            stories.append(self.another())
        self.ends, self.cancelled_s = frozenset({End(CANCELLED)}), self.now
        if stopping:
            self._hurry()
        for story in stories:
            story.ends, story.cancelled_s = self.ends, self.cancelled_s
        return stories


class Model:
    """All stories that may be true. Told what happens, it judges what is seen."""

    def __init__(self, world: World) -> None:
        self.stories = [Story(world)]

    def tell(self, what: Callable[[Story], list[Story]]) -> None:
        """Something came from outside."""
        self.stories = [after for story in self.stories for after in what(story)]

    def pass_time(self, to_s: float) -> None:
        """It is so late now."""
        after: list[Story] = []
        for story in self.stories:
            after += [other for other in story.until(to_s) if other not in after]
        self.stories = after

    def allows(self, seen: Seen) -> bool:
        """Whether any story fits this look; the others are forgotten, if so."""
        fitting = [story for story in self.stories if story.allows(seen)]
        self.stories = fitting or self.stories
        return bool(fitting)

    @property
    def frozen(self) -> bool:
        """Whether a request might hang."""
        return any(story.frozen for story in self.stories)

    def __str__(self) -> str:
        return "\n  or ".join(dict.fromkeys(str(story) for story in self.stories))
