"""`ichat-lifecycle wait`: returns when a worker reaches a state, told by its own events.

A state that was left before the waiting began does not count; one that is passed meanwhile counts,
however quickly: the journal has it. "Before" is told by the worker's own clock.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta

from ichat_lifecycle.client.address import base_url
from ichat_lifecycle.client.choose import the_only
from ichat_lifecycle.client.documents import PHASE, Entry, Status
from ichat_lifecycle.client.errors import GoneError, UnreachableError
from ichat_lifecycle.client.find import find_workers
from ichat_lifecycle.client.transport import ControlClient
from ichat_lifecycle.client.words import phase_name, reason_in_short, span
from ichat_lifecycle.errors import LifecycleError
from ichat_lifecycle.slept import overslept
from ichat_lifecycle.states import STARTING_STATES, TABLE, State

REACHED = 0
ENDED = 75  # as the worker itself ends when it gives up
TIMED_OUT = 124  # as timeout(1)

LAST_LOOK_S = 2.0  # after a sleep of our own
RETRY_S = 0.25
FIND_AGAIN_S = 0.5


@dataclass(frozen=True, slots=True)
class Outcome:
    """How the waiting has ended: the exit code, and what has happened as one line."""

    code: int
    line: str


def reachable(state: State) -> frozenset[State]:
    """Where the table's rows lead from `state`, in any number of steps."""
    found: set[State] = set()
    new = {state}
    while new:
        steps = {row.dest for row in TABLE if set(row.sources) & new}
        new = steps - found
        found |= steps
    return frozenset(found)


class Judge:
    """Knows from what is seen of a worker whether the waiting is over.

    Args:
        target: the state that is waited for.
        clock: of our own, in seconds, that only goes forward.
    """

    def __init__(self, target: State, clock: Callable[[], float] = time.monotonic) -> None:
        self._target = target
        self._clock = clock
        self._began_s = clock()
        self._began_there: datetime | None = None
        self._seq = 0
        self._phase = ""
        self._cause = ""
        self.status: Status | None = None
        self.state: State | None = None

    @property
    def waited_s(self) -> float:
        return self._clock() - self._began_s

    @property
    def name(self) -> str:
        """What the worker is called, where it has been seen."""
        return (self.status.model if self.status else "") or "the worker"

    def see(self, status: Status) -> Outcome | None:
        """What a document means; None: wait on."""
        if self.status and self.status.start_id != status.start_id:
            return self.gone()  # another process in its place
        self.status, self._seq = status, status.seq
        self._phase = status.progress.phase
        self._cause = reason_in_short(status.reason) if status.reason else ""
        self._began_there = status.now - timedelta(seconds=self.waited_s)
        return self._enter(status.state)

    def hear(self, entry: Entry) -> Outcome | None:
        """What an event means; None: wait on."""
        dest = entry.dest
        if dest is None:
            if entry.kind == PHASE:
                self._phase = entry.text("phase")
            return None
        if dest is self._target and self._began_there and entry.at >= self._began_there:
            return self._reached()
        if entry.count("seq") <= self._seq:
            return None
        self._seq, self._cause = entry.count("seq"), entry.text("cause")
        return self._enter(dest)

    def _enter(self, state: State) -> Outcome | None:
        self.state = state
        if state is self._target:
            return self._reached()
        return None if self._target in reachable(state) else self._in_vain()

    def gone(self) -> Outcome:
        """Nothing listens where the worker was."""
        if self._target is State.STOPPED and self.state is State.STOPPING:
            return self._reached()
        return Outcome(ENDED, f"{self.name} is gone without {self._target}; {self._last_seen()}")

    def late(self, trouble: LifecycleError | None) -> Outcome:
        """The time is over; `trouble` is why the worker could not be asked."""
        line = f"not {self._target} within {span(self.waited_s)}: "
        if self.status is None:
            return Outcome(TIMED_OUT, line + (trouble.line() if trouble else "no worker was found"))
        if self.state in STARTING_STATES:
            return Outcome(
                TIMED_OUT, f"{line}{self.name} is {self.state} ({phase_name(self._phase)})"
            )
        why = f": {self._cause}" if self._cause else ""
        return Outcome(TIMED_OUT, f"{line}{self.name} is {self.state}{why}")

    def _reached(self) -> Outcome:
        after = f" after {span(self.waited_s)}" if self.waited_s >= 1 else ""
        return Outcome(REACHED, f"{self.name} is {self._target}{after}")

    def _in_vain(self) -> Outcome:
        reason = self.status.reason if self.status else None
        why = f"; {reason_in_short(reason)}" if reason else ""
        line = f"{self.name} is {self.state}, from where it cannot become {self._target}{why}"
        return Outcome(ENDED, line)

    def _last_seen(self) -> str:
        return f"it was {self.state} when it was last seen"


async def wait_command(
    url: str | None,
    target: State,
    timeout_s: float,
    clock: Callable[[], float] = time.monotonic,
) -> Outcome:
    """Waits until the worker at `url` is `target`; without a URL, for one of this machine.

    Raises:
        ArgumentsError: `url` is none, or there are several workers.
        ForeignError: something else answers there.
    """
    waiting = _Waiting(Judge(target, clock))
    base = base_url(url) if url is not None else None
    try:
        async with asyncio.timeout(timeout_s):
            return await waiting.run(base)
    except TimeoutError:
        # A machine that was suspended has missed the events: the document of now decides.
        if overslept(timeout_s, waiting.judge.waited_s):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LAST_LOOK_S):
                    if outcome := await waiting.look_again():
                        return outcome
        return waiting.judge.late(waiting.trouble)


class _Waiting:
    """One run of the command. `trouble` is why the last question got no answer."""

    def __init__(self, judge: Judge) -> None:
        self.judge = judge
        self.trouble: LifecycleError | None = None
        self._url: str | None = None

    async def run(self, url: str | None) -> Outcome:
        self._url = url or await self._appearing()
        async with ControlClient(self._url) as client:
            while True:
                outcome = await self._ask(client) or await self._listen(client)
                if outcome is not None:
                    return outcome
                await asyncio.sleep(RETRY_S)

    async def look_again(self) -> Outcome | None:
        """Ask the worker once more, where there was one; None where that decides nothing."""
        if self._url is None:
            return None
        async with ControlClient(self._url) as client:
            return await self._ask(client)

    async def _appearing(self) -> str:
        while True:
            found = await find_workers()
            if found.workers:
                return the_only(found).url
            self.trouble = found.nothing()
            await asyncio.sleep(FIND_AGAIN_S)

    async def _ask(self, client: ControlClient) -> Outcome | None:
        """One document, however long it takes to get it."""
        while True:
            try:
                return self.judge.see(await client.status())
            except UnreachableError as error:
                self.trouble = error
                if isinstance(error, GoneError) and self.judge.status is not None:
                    return self.judge.gone()
            await asyncio.sleep(RETRY_S)

    async def _listen(self, client: ControlClient) -> Outcome | None:
        """Events until one of them decides; None when the stream has ended before."""
        try:
            async with contextlib.aclosing(client.events()) as events:
                async for entry in events:
                    if isinstance(entry, Entry) and (outcome := self.judge.hear(entry)):
                        return await self._explained(client, outcome)
        except UnreachableError as error:
            self.trouble = error
        return None

    async def _explained(self, client: ControlClient, outcome: Outcome) -> Outcome:
        """The document has the reason, which no event has."""
        if outcome.code == ENDED:
            with contextlib.suppress(LifecycleError):
                return self.judge.see(await client.status()) or outcome
        return outcome
