"""Asks one worker over HTTP. Whatever goes wrong is one line: what, where, and what to do."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import httpx

from ichat_lifecycle.certificates import client_context
from ichat_lifecycle.client.documents import (
    Entry,
    Gap,
    MalformedError,
    Status,
    as_text,
    parse_entry,
    parse_gap,
    parse_history,
    parse_status,
)
from ichat_lifecycle.client.errors import ForeignError, GoneError, UnreachableError
from ichat_lifecycle.client.sse import EventParser, ServerEvent, TooLongError
from ichat_lifecycle.errors import LifecycleError

ASK_TIMEOUT_S = 5.0
# A stream says something at least every 15 s (control/events.py).
SILENCE_S = 40.0
ANSWER_LIMIT = 64 << 20  # bytes; a history of 10 000 transitions has 3 MB
TEXT_LIMIT = 200

# A proxy's way to say that there is nobody behind it, perhaps not for long.
NOBODY_BEHIND = (502, 503, 504)
UNAUTHORIZED = (401, 403)

WHICH = "`ichat-lifecycle status` lists this machine's workers; the log names the control plane"
TRUST = "name the file with the authority's own certificate in SSL_CERT_FILE"


@dataclass(frozen=True, slots=True)
class Opened:
    """The stream of events is there."""


class ControlClient:
    """Asks one worker. Use it as an async context manager.

    Args:
        url: the base URL of its control plane, or of its main port.
        timeout_s: for each answer as a whole, in seconds; default: ASK_TIMEOUT_S.

    Raises:
        ArgumentsError: the certificates that the environment names cannot be loaded.
    """

    def __init__(self, url: str, timeout_s: float = ASK_TIMEOUT_S) -> None:
        self.url = url
        self.retry_s = 1.0  # the server's wish, in seconds
        self._timeout_s = timeout_s
        # A proxy of the environment would be asked for this machine's own ports.
        verify = client_context() if url.startswith("https:") else False
        self._http = httpx.AsyncClient(trust_env=False, verify=verify, timeout=timeout_s)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._http.aclose()

    async def status(self) -> Status:
        """What `GET /lifecycle` says.

        Raises:
            UnreachableError: nobody answers (GoneError: nothing listens there).
            ForeignError: something else answers.
        """
        document = await self._get("/lifecycle")
        with self._understanding("/lifecycle"):
            return parse_status(document)

    async def history(self) -> tuple[dict[str, Any], tuple[Entry, ...]]:
        """`GET /lifecycle/history` as it is, and its entries in the order of their times.

        Raises:
            UnreachableError, ForeignError: as status().
        """
        document = await self._get("/lifecycle/history")
        with self._understanding("/lifecycle/history"):
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
        timeout = httpx.Timeout(self._timeout_s, read=SILENCE_S)
        with self._telling(path), self._understanding(path):
            request = self._http.build_request("GET", self.url + path, headers=headers)
            request.extensions["timeout"] = timeout.as_dict()
            async with self._answering(request) as response:
                self._check(response, path, "text/event-stream")
                yield Opened()
                async for chunk in response.aiter_bytes():
                    for event in parser.feed(chunk):
                        yield _entry(event)
                    self.retry_s = parser.retry_s or self.retry_s

    @contextlib.asynccontextmanager
    async def _answering(self, request: httpx.Request) -> AsyncIterator[httpx.Response]:
        response = await self._http.send(request, stream=True)
        try:
            yield response
        finally:
            await response.aclose()

    async def _get(self, path: str) -> Any:
        with self._telling(path), self._understanding(path):
            async with asyncio.timeout(self._timeout_s):
                async with self._http.stream("GET", self.url + path) as response:
                    self._check(response, path, "application/json")
                    body = bytearray()
                    async for chunk in response.aiter_bytes():
                        body += chunk
                        if len(body) > ANSWER_LIMIT:
                            raise MalformedError("it has no end")
            return json.loads(body)

    def _check(self, response: httpx.Response, path: str, media_type: str) -> None:
        status = response.status_code
        if status in NOBODY_BEHIND:
            raise UnreachableError(f"{self.url}{path} answers {status}", hint=WHICH)
        if status in UNAUTHORIZED:
            hint = "the main port asks for the API key; the control plane's URL does not"
            raise ForeignError(f"{self.url}{path} answers {status}", hint=hint)
        if status != httpx.codes.OK:
            raise self._foreign(f"{self.url}{path} answers {status}")
        if response.headers.get("content-type", "").partition(";")[0].strip() != media_type:
            raise MalformedError(f"it is no {media_type}")

    def _foreign(self, what: str) -> ForeignError:
        return ForeignError(f"{what}: this is no worker of ichat-lifecycle", hint=WHICH)

    @contextlib.contextmanager
    def _telling(self, path: str) -> Iterator[None]:
        """Turns what the network does into what it means."""
        try:
            yield
        except (TimeoutError, httpx.TimeoutException):
            message = f"no answer from {self.url}{path}"
            raise UnreachableError(message, hint="is the worker, or the way to it, busy?") from None
        except httpx.ConnectError as error:
            raise self._not_connected(error) from None
        except httpx.RemoteProtocolError as error:
            if "without sending" in str(error) or "incomplete" in str(error):
                raise UnreachableError(f"{self.url} has hung up", hint=WHICH) from None
            raise self._foreign(f"{self.url} does not speak HTTP ({as_text(str(error))})") from None
        except httpx.HTTPError as error:
            text = as_text(str(error)) or type(error).__name__
            raise UnreachableError(f"{self.url} has hung up: {text}", hint=WHICH) from None
        except (httpx.InvalidURL, UnicodeError) as error:
            raise self._foreign(f"{self.url}: {as_text(str(error))}") from None

    def _not_connected(self, error: httpx.ConnectError) -> LifecycleError:
        numbers = {leaf.errno for leaf in _leaves(error) if leaf.errno is not None}
        if numbers == {errno.ECONNREFUSED}:
            return GoneError(f"nothing listens at {self.url}: connection refused", hint=WHICH)
        text = as_text(str(error))[:TEXT_LIMIT] or "no connection"
        hint = TRUST if "CERTIFICATE_VERIFY_FAILED" in text else WHICH
        return UnreachableError(f"cannot reach {self.url}: {text}", hint=hint)

    @contextlib.contextmanager
    def _understanding(self, path: str) -> Iterator[None]:
        try:
            yield
        except (MalformedError, TooLongError) as error:
            why = as_text(str(error))[:TEXT_LIMIT]
        except (ValueError, RecursionError):
            why = "it is not JSON"
        else:
            return
        raise self._foreign(f"the answer of {self.url}{path} is not understood: {why}")


def _entry(event: ServerEvent) -> Entry | Gap:
    item = json.loads(event.data)
    if event.event == "gap":
        return parse_gap(item)
    return parse_entry(event.event, item, event.id.rpartition("-")[0])


def _leaves(error: BaseException) -> Iterator[OSError]:
    """The operating system's own errors below an error, and in groups of them."""
    below = error.__cause__ or error.__context__
    if isinstance(error, BaseExceptionGroup):
        for one in error.exceptions:
            yield from _leaves(one)
    elif below is not None:
        yield from _leaves(below)
    elif isinstance(error, OSError):
        yield error
