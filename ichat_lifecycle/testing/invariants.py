"""The eleven invariants, each a function that says what it saw when a life breaks it.

They judge a life from outside: by the calls that the world got, by what could be observed at each
moment, by the journal, by what clients were answered, and by what run() raised.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterator

from ichat_lifecycle.errors import EngineDiedError, LifecycleError
from ichat_lifecycle.states import State, Trigger, row_for
from ichat_lifecycle.testing.fakes import Call
from ichat_lifecycle.testing.life import Life
from ichat_lifecycle.testing.timeline import timeline

# Times are sums of floats.
EPSILON_S = 1e-6

UNAVAILABLE = 503
_END = (State.STOPPING, State.STOPPED)
# What from outside ends a life, or may.
_ENDINGS = ("engine_dies", "server_exits", "gateway_refuses")

# Calls that belong to the way up: a failure of one, while it is wanted, ends the life.
UPWARD = frozenset(
    {
        "control.start",
        "heartbeat.start",
        "arguments.validate",
        "binder.bind",
        "server.open",
        "engine.start",
        "server.attach",
        "probe.health",
        "probe.warm_up",
        "probe.request",
        "watchdog.start",
    }
)
RELEASES = frozenset(
    {
        "watchdog.stop",
        "server.detach",
        "engine.release",
        "engine.release_now",
        "server.close",
        "binder.release",
        "heartbeat.stop",
        "control.stop",
    }
)
# What may still be called once STOPPING has begun.
DOWNWARD = RELEASES | {"server.drained", "server.cut", "engine.kill", "engine.is_sleeping"}
IN_TRANSITIONS = RELEASES | {
    "binder.bind",
    "server.open",
    "engine.start",
    "server.attach",
    "watchdog.start",
}


class Broken(AssertionError):
    """A life broke an invariant. The message holds the plan and the timeline."""

    def __init__(self, invariant: str, saw: str, life: Life) -> None:
        self.invariant = invariant
        self.saw = saw
        self.life = life
        story = "\n".join(timeline(life))
        super().__init__(f"{invariant}: {saw}\n\n{story}\n\nthe plan:\n{life.plan.as_json()}")


def released_once_in_reverse(life: Life) -> Iterator[str]:
    """1. Every acquired resource is released exactly once, in reverse order of acquisition."""
    held: list[str] = []
    for touch in life.world.touched:
        name = touch[1:]
        if touch[0] == "+":
            held.append(name)
        elif held and held[-1] == name:
            held.pop()
        else:
            yield f"{name} was released while the newest held was {held[-1] if held else 'none'}"
            return
    if held:
        yield f"never released: {', '.join(held)}"


def ready_exactly_when_ready(life: Life) -> Iterator[str]:
    """2. The ready event is set exactly while the state is READY, and never before warm-up."""
    for moment in life.moments:
        if moment.ready is not (moment.state is State.READY):
            yield f"at {moment.at_s:g} s: {moment.state}, ready event {moment.ready}"
    for before, moment in itertools.pairwise(life.moments):
        if moment.state is State.READY and before.state is not State.READY:
            yield from _unproved(life, moment.calls, before.state, moment.at_s)


def _unproved(life: Life, calls: int, source: State, at_s: float) -> Iterator[str]:
    wanted = life.settings.warm_up.requests
    since: list[Call] = []
    for call in life.world.history[:calls]:
        if call.name == "engine.start":
            since = []
        since.append(call)
    done = [c.name for c in since if c.ended_s is not None and not c.error and not c.cancelled]
    if done.count("probe.warm_up") < wanted or "probe.health" not in done:
        yield f"READY at {at_s:g} s after {done.count('probe.warm_up')} of {wanted} warm-ups"
    if source is State.DEGRADED and wanted and done[-1:] != ["probe.canary"]:
        asked = [name for name in done if name != "engine.is_sleeping"]
        if asked[-1:] != ["probe.canary"]:
            yield f"READY again at {at_s:g} s without a canary"


def nothing_leaves_stopping(life: Life) -> Iterator[str]:
    """3. Nothing leaves STOPPING but to STOPPED; a second stop runs no action; all see one end."""
    stopping = _stopping_s(life)
    records = life.lifecycle.journal.transitions
    for record in records:
        if record.source is State.STOPPING and record.dest is not State.STOPPED:
            yield f"STOPPING was left to {record.dest} by {record.trigger}"
    if sum(record.trigger is Trigger.STOP for record in records) != 1:
        yield "stop was fired more or less than once"
    states = [moment.state for moment in life.moments]
    for before, after in itertools.pairwise(states):
        if before is State.STOPPED or (before is State.STOPPING and after not in _END):
            yield f"{after} was seen after {before}"
    if stopping is not None:
        for call in life.world.history:
            if call.began_s > stopping + EPSILON_S and call.name not in DOWNWARD:
                yield f"{call.name} was called at {call.began_s:g} s, after STOPPING had begun"
        drains = [c for c in life.world.history if c.name == "server.drained"]
        if sum(call.began_s > stopping + EPSILON_S for call in drains) > 0:
            yield "it drained again, later"
    if any(end is not life.lifecycle.snapshot for end in life.ends):
        yield "those who waited for the end were told different ones"


def _stopping_s(life: Life) -> float | None:
    """When STOPPING began; None if it never did."""
    return next(
        (r.mono_s for r in life.lifecycle.journal.transitions if r.dest is State.STOPPING), None
    )


def ends_within_the_bound(life: Life) -> Iterator[str]:
    """4. run() ends within the bound that is computed from the configured deadlines."""
    if life.ended_s is None:
        yield "run() has not ended"
        return
    bound = life.settings.stop_bound + life.blocked_s + EPSILON_S
    asked = [at for at, _ in life.stops[:1]]
    stopping = _stopping_s(life)
    began = min([*asked, *([stopping] if stopping is not None else [])], default=None)
    if began is not None and life.ended_s - began > bound:
        yield f"the stop of {began:g} s ended after {life.ended_s - began:g} s, bound {bound:g} s"
    start, cancel = life.settings.start, life.settings.stop.cancel
    evidence = life.settings.health.evidence_timeout + cancel  # where the way up fails
    limits = {
        State.BOUND: start.engine_timeout + evidence,
        State.ENGINE_UP: start.serve_timeout + evidence,
        State.SERVING: start.ready_timeout + start.bind_timeout + cancel + evidence,
        State.PARSED: start.arguments_timeout + 3 * start.bind_timeout + 3 * cancel,
    }
    entries = [
        (State.PARSED, 0.0),
        *((r.dest, r.mono_s) for r in life.lifecycle.journal.transitions),
    ]
    for (state, since), (_, until) in itertools.pairwise(entries):
        limit = limits.get(state, float("inf"))
        if until - since > limit + cancel + life.blocked_s + EPSILON_S:
            yield f"{state} lasted {until - since:g} s, its deadline is {limit:g} s"


def first_cause_survives(life: Life) -> Iterator[str]:
    """5. The first cause survives; later errors are attached, never put in its place."""
    if life.ended_s is None or life.cancelled:
        return
    first = _first_failure(life)
    error = life.error
    if first is not None and error is not first and not _among(first, error):
        yield f"{first!r} came first, run() raised {error!r}"
    if error is None:
        return
    if not isinstance(error, LifecycleError | OSError | ValueError):
        yield f"run() raised {error!r}, which is no error of ours nor of the world's"
    reason = life.lifecycle.snapshot.reason
    if reason is None or reason.message not in str(error):
        yield f"run() raised {error!r}, the snapshot's reason is {reason}"
    if first is None and not _explained(life, error):
        yield f"run() raised {error!r}, which nothing in the plan explains"


def _first_failure(life: Life) -> BaseException | None:
    """What has to be the cause: the first failed call of the way up, if that came before a stop."""
    limit = min([at for at, _ in life.stops], default=float("inf"))
    others = [at for at, what in life.happened if what in _ENDINGS]
    for call in life.world.history:
        if call.error is None or call.cancelled or call.name not in UPWARD or call.ended_s is None:
            continue
        if isinstance(call.error, asyncio.CancelledError):
            return None  # cancelled by us, or from within: either has an error of its own
        earlier = [at for at in others if at <= call.ended_s + EPSILON_S]
        blocked = life.blocked_s > 0  # then what came first cannot be told from times
        if call.ended_s >= limit - EPSILON_S or earlier or blocked:
            return None
        return call.error
    return None


def _among(first: BaseException, error: BaseException | None) -> bool:
    """Whether `error` is `first`, said of a restart."""
    while error is not None:
        if error is first:
            return True
        error = error.__cause__
    return False


def _explained(life: Life, error: BaseException) -> bool:
    """Whether something in the plan can have led to this error."""
    while isinstance(error, EngineDiedError) and isinstance(error.__cause__, LifecycleError):
        error = error.__cause__  # said of a restart
    code = getattr(error, "code", type(error).__name__)
    if any(call.error is error for call in life.world.history):
        return True
    happened = {what for _, what in life.happened}
    planned = [outcome for outcomes in life.plan.calls.values() for outcome in outcomes]
    slow = any(o.hang or o.delay_s or o.ignore_cancel_s for o in planned) or life.blocked_s > 0
    frozen = "engine_freezes" in happened
    return {
        "engine_died": "engine_dies" in happened,
        "server_exited": "server_exits" in happened,
        "model_name_taken": "gateway_refuses" in happened,
        "cancelled_from_within": any(o.error == "CancelledError" for o in planned),
        "engine_hung": slow
        or frozen
        or "probe_misses" in happened
        or any(call.error is not None for call in life.world.history),
        "deadline_exceeded": slow
        or frozen
        or "engine_dies" in happened
        or any(o.says_no for o in planned),
        "engine_not_released": slow or any(o.error for o in planned),
        "stop_outran_deadline": slow or any(o.error for o in planned),
    }.get(code, False)


def cancellation_reaches_the_caller(life: Life) -> Iterator[str]:
    """6. Cancelling run() at any await ends in the same clean state, and reaches the caller."""
    if life.ended_s is None:
        return
    got = isinstance(life.error, asyncio.CancelledError)
    if got is not life.cancelled:
        yield f"run() was{'' if life.cancelled else ' not'} cancelled and ended with {life.error!r}"
    if life.lifecycle.snapshot.state not in _END:
        yield f"run() has ended in {life.lifecycle.snapshot.state}"


def nothing_is_left(life: Life) -> Iterator[str]:
    """7. After run() nothing of ours is left; where something is, STOPPED is not claimed."""
    stopped = life.lifecycle.snapshot.state is State.STOPPED
    if life.left and stopped:
        yield f"left behind in STOPPED: {', '.join(life.left)}"
    if life.left and not any(o.ignore_cancel_s for os in life.plan.calls.values() for o in os):
        yield f"left behind, and nothing in the plan holds it: {', '.join(life.left)}"
    if life.unheard:
        yield f"errors that nobody heard of: {'; '.join(life.unheard)}"


def no_request_is_lost(life: Life) -> Iterator[str]:
    """8. Nothing is accepted once STOPPING begins; what was accepted before gets an end."""
    if life.clients is None or life.ended_s is None:
        return
    stopping = _stopping_s(life)
    stop = life.settings.stop
    for exchange in life.clients.exchanges:
        at = f"the request of {exchange.asked_s:g} s"
        if exchange.accepted_in not in (None, State.READY):
            yield f"{at} was accepted in {exchange.accepted_in}"
        refused = exchange.accepted_s is None and exchange.ended_s is not None
        if refused and (exchange.status != UNAVAILABLE or not exchange.retry_after):
            yield f"{at} was refused with {exchange.status}"
        if {"server.drained", "server.cut"} & set(life.world.plan):
            continue  # a server that does not do as it is told may leave it without a word
        if exchange.ended_s is None:
            yield f"{at} has had no end"
        elif not exchange.answered or exchange.broke:
            yield f"{at} ended without a word"
        elif exchange.accepted_s is not None and stopping is not None:
            late = exchange.ended_s - stopping - life.blocked_s
            if late > stop.drain + stop.cut + EPSILON_S:
                yield f"{at} ended {late:g} s after STOPPING began"


def history_is_a_path(life: Life) -> Iterator[str]:
    """9. The history is a path of the table, numbered without gaps, in monotonic time."""
    records = life.lifecycle.journal.transitions
    if [record.seq for record in records] != list(range(1, len(records) + 1)):
        yield f"sequence numbers {[record.seq for record in records]}"
    if records and records[0].source is not State.PARSED:
        yield f"it begins in {records[0].source}"
    for a, b in itertools.pairwise(records):
        if a.dest is not b.source:
            yield f"{a.trigger} led to {a.dest}, {b.trigger} began in {b.source}"
        if a.mono_s > b.mono_s:
            yield f"{b.trigger} at {b.mono_s} s came before {a.trigger} at {a.mono_s} s"
    for record in records:
        row = row_for(record.source, record.trigger)
        if row is None or row.dest is not record.dest:
            yield f"no row {record.trigger} from {record.source} to {record.dest}"
        if record.took_s < 0:
            yield f"{record.trigger} took {record.took_s} s"


def refusals_change_nothing(life: Life) -> Iterator[str]:
    """10. A refused trigger changes nothing."""
    for attempt in life.attempts:
        if not attempt.refused:
            yield f"{attempt.what} at {attempt.at_s:g} s was not refused"
        elif attempt.before != attempt.after:
            yield f"{attempt.what} at {attempt.at_s:g} s changed something"


def one_transition_at_a_time(life: Life) -> Iterator[str]:
    """11. At most one transition is in flight."""
    calls = [call for call in life.world.history if call.name in IN_TRANSITIONS]
    for a, b in itertools.pairwise(calls):
        ended = float("inf") if a.ended_s is None else a.ended_s
        overlap = ended - b.began_s
        if overlap > EPSILON_S and not a.cancelled:
            yield f"{b.name} began at {b.began_s:g} s, during {a.name}"


INVARIANTS: tuple[Callable[[Life], Iterator[str]], ...] = (
    released_once_in_reverse,
    ready_exactly_when_ready,
    nothing_leaves_stopping,
    ends_within_the_bound,
    first_cause_survives,
    cancellation_reaches_the_caller,
    nothing_is_left,
    no_request_is_lost,
    history_is_a_path,
    refusals_change_nothing,
    one_transition_at_a_time,
)


def check(life: Life) -> None:
    """Raises Broken for the first invariant that this life breaks."""
    for invariant in INVARIANTS:
        for saw in invariant(life):
            raise Broken(invariant.__name__, saw, life)
