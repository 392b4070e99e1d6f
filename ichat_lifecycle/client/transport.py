"""Asks one worker: its documents, its history, and its events as they come."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

import httpx

from ichat_lifecycle.client.answers import Answer, media_type, parse_json
from ichat_lifecycle.client.bounded import BoundedClient
from ichat_lifecycle.client.documents import (
    Entry,
    Gap,
    MalformedError,
    Status,
    parse_entry,
    parse_gap,
    parse_history,
    parse_status,
)
from ichat_lifecycle.client.errors import ForeignError, UnreachableError
from ichat_lifecycle.client.sse import EventParser, ServerEvent

ASK_TIMEOUT_S = 5.0
# A stream says something at least every 15 s (control/events.py).
SILENCE_S = 40.0

# A proxy's way to say that there is nobody behind it, perhaps not for long.
NOBODY_BEHIND = (502, 503, 504)
UNAUTHORIZED = (401, 403)

WHICH = "`ichat-lifecycle status` lists this machine's workers; the log names the control plane"


@dataclass(frozen=True, slots=True)
class Opened:
    """The stream of events is there."""


class ControlClient(BoundedClient):
    """Asks one worker. Use it as an async context manager.

    Args:
        url: the base URL of its control plane, or of its main port.
        timeout_s: for each answer as a whole, in seconds; default: ASK_TIMEOUT_S.
        own_only: another user's process is not asked; default: whoever answers is.

    Raises:
        ArgumentsError: the certificates that the environment names cannot be loaded.
    """

    def __init__(
        self, url: str, timeout_s: float = ASK_TIMEOUT_S, *, own_only: bool = False
    ) -> None:
        super().__init__(url, timeout_s, what="worker", hint=WHICH, own_only=own_only)
        self.retry_s = 1.0  # the server's wish, in seconds

    async def status(self) -> Status:
        """What `GET /lifecycle` says.

        Raises:
            UnreachableError: nobody answers (GoneError: nothing listens there).
            ForeignError: something else answers.
        """
        path = "/lifecycle"
        answer = await self._get(path)
        with self.understanding(path):
            return parse_status(answer.document())

    async def history(self) -> tuple[dict[str, Any], tuple[Entry, ...]]:
        """`GET /lifecycle/history` as it is, and its entries in the order of their times.

        Raises:
            UnreachableError, ForeignError: as status().
        """
        path = "/lifecycle/history"
        answer = await self._get(path)
        with self.understanding(path):
            document = answer.document()
            return document, parse_history(document)

    async def events(
        self, last_id: str | None = None
    ) -> AsyncGenerator[Opened | Entry | Gap, None]:
        """The journal from after `last_id` on (None: all), and then live; ends with the stream.

        The first is an Opened.

        Raises:
            UnreachableError, ForeignError: as status(); also in the middle of it.
        """
        path, parser = "/lifecycle/events", EventParser()
        headers = {"Last-Event-ID": last_id} if last_id else {}
        async with self.open(path, silence_s=SILENCE_S, headers=headers) as (head, body):
            with self.understanding(path):
                self._check(head.status_code, path)
                if media_type(head) != "text/event-stream":
                    raise MalformedError("it is no text/event-stream")
            yield Opened()
            async for chunk in body:
                with self.understanding(path):
                    items = [_entry(event) for event in parser.feed(chunk)]
                for item in items:
                    yield item
                self.retry_s = parser.retry_s or self.retry_s

    async def _get(self, path: str) -> Answer:
        answer = await self.ask("GET", path)
        self._check(answer.status, path)
        return answer

    def _check(self, status: int, path: str) -> None:
        what = f"{self.url}{path} answers {status}"
        if status in NOBODY_BEHIND:
            raise UnreachableError(what, hint=WHICH)
        if status in UNAUTHORIZED:
            hint = "the main port asks for the API key; the control plane's URL does not"
            raise ForeignError(what, hint=hint)
        if status != httpx.codes.OK:
            raise self.foreign(what)


def _entry(event: ServerEvent) -> Entry | Gap:
    item = parse_json(event.data)
    if event.event == "gap":
        return parse_gap(item)
    return parse_entry(event.event, item, event.id.rpartition("-")[0], len(event.data))
