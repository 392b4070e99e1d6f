"""`GET /lifecycle/events`: the journal as server-sent events, from any entry on.

Readers pull: each has a number, its last entry's, and asks the journal for what is newer whenever
something has come. Nothing is queued for anybody, so that a reader that is slow or dead costs the
worker nothing; one that stays away for so long that the journal has dropped what it lacks is told.

An event's id is `START-NUMBER`. The start tells one life from the next: a reader that reconnects
to a worker that has been restarted gets the new life from its beginning.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterable, Iterator

from starlette.responses import StreamingResponse

from ichat_lifecycle.journal import Journal

EVENT_STREAM = "text/event-stream"
KEEP_ALIVE_S = 15.0
# Each write costs more than what is in it; a reader that is slow has so many waiting at most.
AT_ONCE = 100
BYTES_AT_ONCE = 64 * 1024
NUMBER_DIGITS = 18  # of an event's; Python refuses to read some thousand
# So long a browser waits before it asks again.
RETRY_MS = 1000

HEADERS = {
    "Cache-Control": "no-store",
    "X-Accel-Buffering": "no",  # nginx would collect events
}


class Bell:
    """Rings on a reader's loop when something has happened on the worker's.

    However often it is rung before anybody looks, it wakes each reader once. One for each loop.
    """

    def __init__(self) -> None:
        self.closed = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._rung = asyncio.Event()
        self._pending = False

    def ring(self, *_: object) -> None:
        """From any thread; a listener of the lifecycle's."""
        loop = self._loop
        if loop is None or self._pending:
            return
        self._pending = True
        with contextlib.suppress(RuntimeError):  # it has closed
            loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        self._pending = False  # before anybody looks: what comes after that rings again
        self._rung.set()
        self._rung = asyncio.Event()

    def close(self) -> None:
        """Ends all streams, each after what has happened by now; on the readers' loop."""
        self.closed = True
        self._wake()

    def listen(self) -> None:
        """Before the journal is read for the first time; on the readers' loop."""
        self._loop = asyncio.get_running_loop()

    async def wait(self, timeout_s: float) -> bool:
        """Whether it rings within so many seconds."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._rung.wait()
        except TimeoutError:
            return False
        return True


class Events:
    """The stream of one life, for any number of readers of one loop.

    Args:
        start_id: tells this life from others of the same worker.
    """

    def __init__(self, journal: Journal, start_id: str, bell: Bell) -> None:
        self._journal = journal
        self._start_id = start_id
        self._bell = bell

    def last_id(self) -> str:
        """The id of the newest event; one that nothing comes before where there is none yet."""
        return f"{self._start_id}-{self._journal.last_id}"

    def response(self, last_event_id: str | None) -> StreamingResponse:
        """What is newer than `last_event_id`, and then whatever happens; without one, all."""
        stream = self._stream(self._number_in(last_event_id))
        return StreamingResponse(stream, media_type=EVENT_STREAM, headers=HEADERS)

    def _number_in(self, last_event_id: str | None) -> int:
        start_id, _, number = (last_event_id or "").rpartition("-")
        is_number = number.isascii() and number.isdigit() and len(number) <= NUMBER_DIGITS
        if start_id != self._start_id or not is_number:
            return 0
        return min(int(number), self._journal.last_id)

    async def _stream(self, after: int) -> AsyncIterator[str]:
        yield f"retry: {RETRY_MS}\n\n"
        self._bell.listen()
        if 0 < after < self._journal.dropped_id:
            gap = json.dumps({"after": after, "to": self._journal.dropped_id})
            yield self._event(after, "gap", gap)
        while True:
            closed = self._bell.closed  # before the journal is read: nothing is left out
            newer = self._journal.since(after)
            for piece in _pieces(self._event(e.id, e.kind.value, e.as_json) for e in newer):
                yield piece
            after = newer[-1].id if newer else after
            if closed:
                return
            if self._journal.last_id == after and not await self._bell.wait(KEEP_ALIVE_S):
                yield ": keep-alive\n\n"

    def _event(self, number: int, name: str, data: str) -> str:
        return f"id: {self._start_id}-{number}\nevent: {name}\ndata: {data}\n\n"


def _pieces(events: Iterable[str]) -> Iterator[str]:
    """Some at a time, each made when it is sent: few or one where they are large."""
    some: list[str] = []
    size = 0
    for event in events:
        some.append(event)
        size += len(event)
        if len(some) == AT_ONCE or size >= BYTES_AT_ONCE:
            yield "".join(some)
            some, size = [], 0
    if some:
        yield "".join(some)
