"""HTTP to one server, whoever it is: each answer is bounded in bytes and in total time.

Whatever goes wrong is one line: what, where, and what to do.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from types import TracebackType
from typing import Any, Self

import httpx

from ichat_lifecycle.certificates import client_context
from ichat_lifecycle.client.address import UNIX
from ichat_lifecycle.client.answers import Answer, check_encoding, media_type, whole_body
from ichat_lifecycle.client.documents import MalformedError, as_text
from ichat_lifecycle.client.errors import ForeignError, GoneError, UnreachableError
from ichat_lifecycle.client.owners import peer_uid
from ichat_lifecycle.errors import LifecycleError
from ichat_lifecycle.short_heads import ShortHeads

TEXT_LIMIT = 200

TRUST = "name the file with the authority's own certificate in SSL_CERT_FILE"
# httpx would take compressed answers, of which a few bytes can be gigabytes.
HEADERS = {"Accept-Encoding": "identity"}
CONNECTED = ("connection.connect_tcp.complete", "connection.connect_unix_socket.complete")


class BoundedClient:
    """Asks one server. Use it as an async context manager. Redirections are not followed.

    Args:
        url: its base URL, or unix:PATH.
        timeout_s: for each answer as a whole, in seconds.
        what: what is expected there, for errors: "worker", "fleet".
        hint: what to do where it is something else.
        own_only: a connection that leads to another user's process ends before anything is sent.

    Raises:
        ArgumentsError: the certificates that the environment names cannot be loaded.
    """

    def __init__(
        self, url: str, timeout_s: float, *, what: str, hint: str, own_only: bool = False
    ) -> None:
        self.url = url
        self._timeout_s = timeout_s
        self._what = what
        self._hint = hint
        self._own_only = own_only
        uds = url.removeprefix(UNIX) if url.startswith(UNIX) else None
        self._base = "http://fleet" if uds is not None else url
        # Certificates are loaded where there are some to verify, and nowhere else.
        verify = client_context() if url.startswith("https:") else False
        # A proxy of the environment would be asked for this machine's own ports.
        self._http = httpx.AsyncClient(
            transport=ShortHeads(verify, uds),
            trust_env=False,
            timeout=timeout_s,
            headers=HEADERS,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._http.aclose()

    async def ask(self, method: str, path: str, limit: int | None = None, **request: Any) -> Answer:
        """A whole answer, whatever its status.

        Args:
            limit: of bytes in its body; default: answers.ANSWER_LIMIT.
            request: what httpx takes as well: headers, json, params.

        Raises:
            UnreachableError: nobody answers (GoneError: nothing listens there).
            ForeignError: something else answers, or another user.
        """
        with self.understanding(path):
            async with asyncio.timeout(self._timeout_s):
                async with self._opened(method, path, request, self._timeout_s) as response:
                    body = await whole_body(response.aiter_raw(), limit)
        return Answer(response.status_code, media_type(response), body)

    @contextlib.asynccontextmanager
    async def open(
        self, path: str, *, silence_s: float | None, **request: Any
    ) -> AsyncIterator[tuple[httpx.Response, AsyncGenerator[bytes, None]]]:
        """An answer that need not end: its head, and its body as it comes.

        Args:
            silence_s: how long no line may end; None: for ever.

        Raises:
            UnreachableError, ForeignError: as ask(), also from the body.
        """
        async with contextlib.AsyncExitStack() as stack:
            with self.understanding(path):
                async with asyncio.timeout(self._timeout_s):
                    opened = self._opened("GET", path, request, None)
                    response = await stack.enter_async_context(opened)
            body = self._body(response, path, silence_s)
            stack.push_async_callback(body.aclose)
            yield response, body

    async def _body(
        self, response: httpx.Response, path: str, silence_s: float | None
    ) -> AsyncGenerator[bytes, None]:
        loop, due_s = asyncio.get_running_loop(), None
        async with contextlib.aclosing(_chunks(response)) as coming:
            while True:
                if silence_s is not None and due_s is None:
                    due_s = loop.time() + silence_s
                with self.understanding(path):
                    async with asyncio.timeout_at(due_s):
                        chunk = await anext(coming, None)
                if chunk is None:
                    return
                if b"\n" in chunk:
                    due_s = None
                yield chunk

    @contextlib.asynccontextmanager
    async def _opened(
        self, method: str, path: str, request: Mapping[str, Any], read_s: float | None
    ) -> AsyncIterator[httpx.Response]:
        asked = self._http.build_request(
            method,
            self._base + path,
            timeout=httpx.Timeout(self._timeout_s, read=read_s),
            extensions={"trace": self._check_owner} if self._own_only else {},
            **request,
        )
        response = await self._http.send(asked, stream=True)
        try:
            check_encoding(response)
            yield response
        finally:
            await response.aclose()

    async def _check_owner(self, event: str, info: Mapping[str, Any]) -> None:
        """httpx calls it with all that happens to a connection; nothing was sent by then."""
        if event not in CONNECTED:
            return
        stream = info["return_value"]
        uid = await peer_uid(stream.get_extra_info("socket"))
        if uid != os.geteuid():
            await stream.aclose()
            whose = "not a process of this machine" if uid is None else f"a process of uid {uid}"
            raise ForeignError(
                f"{self.url} is answered by {whose}, not by this user's {self._what}",
                code="another_user",
                hint=self._hint,
            )

    def foreign(self, what: str) -> ForeignError:
        """The error that something else is there."""
        return ForeignError(f"{what}: this is no {self._what} of ichat-lifecycle", hint=self._hint)

    @contextlib.contextmanager
    def understanding(self, path: str) -> Iterator[None]:
        """Turns what the network does, and what cannot be read, into what it means."""
        try:
            with self._telling(path):
                yield
        except MalformedError as error:
            why = as_text(str(error))[:TEXT_LIMIT]
            message = f"the answer of {self.url}{path} is not understood: {why}"
            raise self.foreign(message) from None

    @contextlib.contextmanager
    def _telling(self, path: str) -> Iterator[None]:
        try:
            yield
        except (TimeoutError, httpx.TimeoutException):
            message = f"no answer from {self.url}{path}"
            hint = f"is the {self._what}, or the way to it, busy?"
            raise UnreachableError(message, hint=hint) from None
        except httpx.ConnectError as error:
            raise self._not_connected(error) from None
        except httpx.RemoteProtocolError as error:
            if "without sending" in str(error) or "incomplete" in str(error):
                raise UnreachableError(f"{self.url} has hung up", hint=self._hint) from None
            raise self.foreign(f"{self.url} does not speak HTTP ({_short(error)})") from None
        except httpx.HTTPError as error:
            text = _short(error) or type(error).__name__
            raise UnreachableError(f"{self.url} has hung up: {text}", hint=self._hint) from None
        except (httpx.InvalidURL, UnicodeError) as error:
            raise self.foreign(f"{self.url}: {_short(error)}") from None

    def _not_connected(self, error: httpx.ConnectError) -> LifecycleError:
        numbers = {leaf.errno for leaf in _leaves(error) if leaf.errno is not None}
        if numbers == {errno.ECONNREFUSED}:
            message = f"nothing listens at {self.url}: connection refused"
            return GoneError(message, hint=self._hint)
        text = _short(error) or "no connection"
        hint = TRUST if "CERTIFICATE_VERIFY_FAILED" in text else self._hint
        return UnreachableError(f"cannot reach {self.url}: {text}", hint=hint)


async def _chunks(response: httpx.Response) -> AsyncGenerator[bytes, None]:
    async for chunk in response.aiter_raw():
        yield chunk


def _short(error: Exception) -> str:
    return as_text(str(error))[:TEXT_LIMIT]


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
