"""What a watcher knows of a life: the newest document, and the journal as far as it has come."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta, tzinfo
from heapq import merge

from ichat_lifecycle.client.documents import KINDS, TRANSITION, VERDICT, Entry, Status
from ichat_lifecycle.errors import LifecycleError
from ichat_lifecycle.states import State

# As many as the worker's own journal keeps of what is most; of what is many, the newest.
ENTRIES_KEPT = 10_000
VERDICTS_KEPT = 200
PROBES_KEPT = 1000
CHARACTERS_KEPT = 16 << 20  # of each kind, as they came

DOCUMENTS, EVENTS = "documents", "events"

ENDING = (State.STOPPING, State.STOPPED)


@dataclass(frozen=True, slots=True)
class NoContact:
    """Since when, and for how long, the worker has not been heard, by our own clock, and why.

    `what` is missing: DOCUMENTS, which are asked for, or only EVENTS, which it sends.
    """

    what: str
    since: datetime
    error: LifecycleError
    for_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Scene:
    """All that a screen shows, at one moment.

    Attributes:
        now: the time of day by the worker's clock; while there is no contact, of the last one.
        entries: oldest first.
        probes: how long the engine took to answer, in seconds; None: it did not.
        zone: for times of day; None (default): the local one.
    """

    url: str
    status: Status
    now: datetime
    entries: tuple[Entry, ...] = ()
    probes: tuple[float | None, ...] = ()
    no_contact: NoContact | None = None
    zone: tzinfo | None = None

    @property
    def _last(self) -> Entry | None:
        """The newest transition, where the document does not know it yet."""
        newest = next((e for e in reversed(self.entries) if e.kind == TRANSITION), None)
        if newest is None:
            return None
        another = newest.start_id != self.status.start_id  # the worker's next life
        return newest if another or newest.count("seq") > self.status.seq else None

    @property
    def state(self) -> State:
        last = self._last
        return (last.dest if last else None) or self.status.state

    @property
    def since(self) -> datetime:
        last = self._last
        return last.at if last else self.status.since

    @property
    def for_s(self) -> float:
        return max(0.0, (self.now - self.since).total_seconds())

    @property
    def ready(self) -> bool:
        """Whether it is READY, and not blocked."""
        return self.state is State.READY and (self.status.ready or self._last is not None)

    @property
    def transitions(self) -> tuple[Entry, ...]:
        return tuple(entry for entry in self.entries if entry.kind == TRANSITION)


class Logbook:
    """Takes documents and events as they come.

    Args:
        url: where the worker is asked.
        clock: of our own, in seconds, that only goes forward.
    """

    def __init__(self, url: str, status: Status, clock: Callable[[], float]) -> None:
        self.url = url
        self.status = status
        self._clock = clock
        self._taken_at_s = clock()
        self._start_id = status.start_id
        self._forget()
        self._unheard: dict[str, tuple[NoContact, float]] = {}

    def _forget(self) -> None:
        self._entries: dict[str, deque[Entry]] = {}
        self._sizes: Counter[str] = Counter()
        self._probes: deque[float | None] = deque(maxlen=PROBES_KEPT)

    def take_status(self, status: Status) -> None:
        self.status, self._taken_at_s = status, self._clock()
        self._begin(status.start_id)

    def _begin(self, start_id: str) -> None:
        """What is of another life is its first sign: what was before is forgotten."""
        if start_id != self._start_id:
            self._start_id = start_id
            self._forget()

    def take(self, entry: Entry) -> None:
        self._begin(entry.start_id)
        kept = VERDICTS_KEPT if entry.kind == VERDICT else ENTRIES_KEPT
        kind = entry.kind if entry.kind in KINDS else "other"
        entries = self._entries.setdefault(kind, deque())
        if entry.kind == VERDICT:
            self._take_probe(entry)
            if entries and entries[-1].at == entry.at:
                self._sizes[kind] -= entries.pop().size  # the same verdict again, one more time
        entries.append(entry)
        self._sizes[kind] += entry.size
        while len(entries) > kept or (len(entries) > 1 and self._sizes[kind] > CHARACTERS_KEPT):
            self._sizes[kind] -= entries.popleft().size

    def _take_probe(self, entry: Entry) -> None:
        answered_s = entry.number("answered_s")
        if answered_s is not None or entry.text("kind") == "hung":
            self._probes.append(answered_s)

    def lose(self, what: str, error: LifecycleError, at: datetime | None = None) -> None:
        """No contact by `what`: since the first time in a row, for the newest cause."""
        first = (NoContact(what, at or datetime.now(UTC), error), self._clock())
        lost, since_s = self._unheard.get(what, first)
        self._unheard[what] = (replace(lost, error=error), since_s)

    def regain(self, what: str) -> None:
        self._unheard.pop(what, None)

    @property
    def ending(self) -> bool:
        """Whether the worker was about to end when it was last heard."""
        return self.scene().state in ENDING

    def scene(self) -> Scene:
        """All of it now."""
        passed_s = 0.0 if DOCUMENTS in self._unheard else self._clock() - self._taken_at_s
        return Scene(
            self.url,
            self.status,
            self.status.now + timedelta(seconds=passed_s),
            tuple(merge(*self._entries.values(), key=lambda entry: entry.id)),
            tuple(self._probes),
            self._no_contact(),
        )

    def _no_contact(self) -> NoContact | None:
        """Without documents nothing is known; without events only what happens between two."""
        found = self._unheard.get(DOCUMENTS) or self._unheard.get(EVENTS)
        if found is None:
            return None
        lost, since_s = found
        return replace(lost, for_s=self._clock() - since_s)
