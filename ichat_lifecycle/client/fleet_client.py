"""Asks one fleet's supervisor: documents, commands, and what a worker has printed."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterable, Mapping
from typing import Any

import httpx

from ichat_lifecycle.client.answers import Answer
from ichat_lifecycle.client.bounded import BoundedClient
from ichat_lifecycle.client.documents import MalformedError, as_list, as_text
from ichat_lifecycle.errors import ArgumentsError

HINT = "`ichat-lifecycle up FILE` starts a fleet; --fleet URL names another one"
TEXT_LIMIT = 64 << 20  # bytes of lines; up to 1,000 are kept of each worker
LINE_LIMIT = 1 << 16  # bytes; what is longer is several lines
DONE = (httpx.codes.OK, httpx.codes.ACCEPTED)


class RefusedError(ArgumentsError):
    """The supervisor has said no (exit 2)."""


class FleetClient(BoundedClient):
    """Asks one supervisor. Use it as an async context manager.

    Args:
        url: its base URL, or unix:PATH.
        timeout_s: for each answer as a whole, in seconds.
        own_only: another user's process is not asked.

    Raises:
        ArgumentsError: the certificates that the environment names cannot be loaded.
    """

    def __init__(self, url: str, timeout_s: float, *, own_only: bool) -> None:
        super().__init__(url, timeout_s, what="fleet", hint=HINT, own_only=own_only)

    async def get(self, path: str) -> Mapping[str, Any]:
        """A document.

        Raises:
            UnreachableError: nobody answers.
            ForeignError: something else does.
            RefusedError: it says no.
        """
        return self._document(await self.ask("GET", path), path)

    async def post(self, path: str, body: Any, token: str | None) -> Mapping[str, Any]:
        """What a command has done. Raises as get()."""
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        answer = await self.ask("POST", path, json=body, headers=headers)
        return self._document(answer, path)

    async def lines(self, path: str, query: Mapping[str, Any]) -> list[str]:
        """The lines of a text. Raises as get()."""
        answer = await self.ask("GET", path, TEXT_LIMIT, params=query)
        self._check(answer, path)
        return answer.body.decode("utf-8", "replace").removesuffix("\n").split("\n")

    async def follow(self, path: str, query: Mapping[str, Any]) -> AsyncGenerator[str, None]:
        """The lines of a text that has no end, as they come. Raises as get()."""
        async with self.open(path, silence_s=None, params=query) as (head, body):
            if head.status_code not in DONE:
                self._check(await self.ask("GET", path, params=query), path)
            async with contextlib.aclosing(_lines(body)) as lines:
                async for line in lines:
                    yield line

    def _check(self, answer: Answer, path: str) -> None:
        """Raises RefusedError, ForeignError."""
        if answer.status >= httpx.codes.BAD_REQUEST:
            raise _refused(answer)
        if answer.status not in DONE:
            raise self.foreign(f"{self.url}{path} answers {answer.status}")

    def _document(self, answer: Answer, path: str) -> Mapping[str, Any]:
        self._check(answer, path)
        with self.understanding(path):
            document = answer.document()
            if not isinstance(document, Mapping):
                raise MalformedError("it is no document")
            return document


async def _lines(body: AsyncIterable[bytes]) -> AsyncGenerator[str, None]:
    rest = bytearray()
    async for chunk in body:
        rest += chunk
        if b"\n" not in chunk and len(rest) <= LINE_LIMIT:
            continue
        *whole, last = bytes(rest).split(b"\n")
        rest = bytearray(last)
        if len(rest) > LINE_LIMIT:
            whole.append(bytes(rest))
            rest.clear()
        for line in whole:
            yield line.decode("utf-8", "replace")
    if rest:
        yield rest.decode("utf-8", "replace")


def _refused(answer: Answer) -> RefusedError:
    try:
        document = answer.document()
        error = document["error"]
        refused = RefusedError(
            as_text(error["message"]),
            code=as_text(error["code"]),
            hint=as_text(error.get("hint")) or None,
        )
        refused.told = list(map(as_text, as_list(document.get("problems"))))
    except (MalformedError, KeyError, TypeError, AttributeError):
        return RefusedError(f"the supervisor answers {answer.status}")
    return refused
