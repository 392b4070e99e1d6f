"""A worker's answer on the fleet's port: its status, its body without secrets, and little else.

The worker is no part of the fleet's origin. Of its headers a few pass; the rest could set cookies,
redirect, or loosen the policy that keeps its pages from acting as the fleet's.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import httpx
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from ichat_lifecycle.control.clean_body import clean_body
from ichat_lifecycle.control.http import HttpError
from ichat_lifecycle.fleet.asking import UnaskableError
from ichat_lifecycle.redact import Secrets
from ichat_lifecycle.token_bucket import TokenBucket

BAD_GATEWAY = 502
PASSED = frozenset({b"content-type", b"retry-after", b"allow", b"x-accel-buffering"})
# It runs nothing, and is of no origin: a page's scripts could use what its reader has typed in.
POLICY = b"sandbox; default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"


async def passed_on(
    name: str,
    request: Request,
    sending: Coroutine[Any, Any, httpx.Response],
    hidden: Secrets,
    pace: TokenBucket,
) -> StreamingResponse:
    """The answer to a request that is sent on, as it comes.

    Args:
        name: the worker's.
        sending: sends it. It is given up when the client has gone.
        hidden: what does not pass; see clean_body.
        pace: of this worker.

    Raises:
        HttpError: 502, nobody answers.
    """
    try:
        answer = await _while_connected(request, sending)
    except UnaskableError as error:
        message = f"{name} does not answer: {hidden.scrub(str(error))}"  # it may have its words
        raise HttpError(BAD_GATEWAY, "worker_unreachable", message) from error
    return _Passed(answer, hidden, pace)


async def _while_connected(
    request: Request, sending: Coroutine[Any, Any, httpx.Response]
) -> httpx.Response:
    """A worker that never answers must not keep the requests of clients that have gone."""
    asked = asyncio.create_task(sending)
    gone = asyncio.create_task(_disconnect(request))
    try:
        await asyncio.wait({asked, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not asked.done():
            raise UnaskableError("the client has gone")
        return asked.result()
    except BaseException:
        if not asked.cancel() and not asked.cancelled() and asked.exception() is None:
            await asked.result().aclose()
        raise
    finally:
        gone.cancel()
        await asyncio.wait({gone})


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class _Passed(StreamingResponse):
    """Closes the worker's answer however its own ends."""

    def __init__(self, answer: httpx.Response, hidden: Secrets, pace: TokenBucket) -> None:
        kind = answer.headers.get("content-type", "").encode()
        super().__init__(clean_body(_body(answer), kind, hidden, pace), answer.status_code)
        given = [(name.lower(), value) for name, value in answer.headers.raw]
        kept = [(name, value) for name, value in given if name in PASSED]
        self.raw_headers = [*kept, (b"content-security-policy", POLICY)]
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            with contextlib.suppress(httpx.HTTPError):
                await self._answer.aclose()


async def _body(answer: httpx.Response) -> AsyncIterator[bytes]:
    """As it comes; a worker that ends in the middle ends it."""
    with contextlib.suppress(httpx.HTTPError):
        async for chunk in answer.aiter_raw():
            yield chunk
