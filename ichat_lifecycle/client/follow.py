"""The events of a worker for as long as one likes: comes again where the contact was lost."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from ichat_lifecycle.client.documents import Entry, Gap
from ichat_lifecycle.client.errors import UnreachableError
from ichat_lifecycle.client.transport import ControlClient, Opened
from ichat_lifecycle.errors import LifecycleError

LONGEST_PAUSE_S = 10.0


@dataclass(frozen=True, slots=True)
class Lost:
    """The stream has ended; it is asked for again in `retry_s` seconds."""

    error: LifecycleError
    retry_s: float


Happening = Opened | Entry | Gap | Lost


async def follow(client: ControlClient) -> AsyncGenerator[Happening, None]:
    """Everything from the beginning of the life, then live, each event once; has no end.

    The first pause is the server's wish, each further one in a row twice as long, at most 10 s.

    Raises:
        ForeignError: something else answers there by now.
    """
    last_id: str | None = None
    failures = 0
    while True:
        error = UnreachableError("the stream of events has ended")
        try:
            async with contextlib.aclosing(client.events(last_id)) as events:
                async for item in events:
                    failures = 0
                    if isinstance(item, Entry):
                        last_id = f"{item.start_id}-{item.id}"
                    yield item
        except UnreachableError as unreachable:
            error = unreachable
        pause_s = min(LONGEST_PAUSE_S, client.retry_s * 2**failures)
        failures += 1
        yield Lost(error, pause_s)
        await asyncio.sleep(pause_s)
