"""vLLM's app as the worker itself asks it: within the process, below the middleware.

What a client meets on its way in does not show whether the engine works: TLS and client
certificates, API keys, `--middleware` that wants a header or refuses 127.0.0.1, limits on headers
and connections, proxies in the environment, names that resolve elsewhere. A question that took the
same way would fail with it, and a worker that serves its clients would never be READY.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
from collections.abc import AsyncIterator, Mapping, MutableMapping
from typing import Any

import httpx

from ichat_lifecycle.adapters.refusal import App, Message, Receive, Scope, Send

# vLLM's middleware that speaks of the engine: it refuses while the number of ranks changes.
KEPT_MIDDLEWARE = frozenset({"ScalingMiddleware"})

DISCONNECT = {"type": "http.disconnect"}
# A request that nobody waits for any more may end by itself, and is cancelled after that.
HANG_UP_S = 0.25


def below_middleware(app: App) -> App:
    """The app without its middleware, except KEPT_MIDDLEWARE; its routes and state are shared.

    An app that is not Starlette's has no middleware to be known, and is returned as it is.
    """
    middleware = getattr(app, "user_middleware", None)
    if middleware is None:
        return app
    inner: Any = copy.copy(app)
    inner.user_middleware = [m for m in middleware if _is_kept(m.cls)]
    inner.middleware_stack = None  # it is built again with what is left
    result: App = inner
    return result


def _is_kept(middleware: Any) -> bool:
    name, module = getattr(middleware, "__name__", ""), getattr(middleware, "__module__", "")
    return name in KEPT_MIDDLEWARE and module.partition(".")[0] == "vllm"


@contextlib.asynccontextmanager
async def inner_client(
    app: App, state: Mapping[str, Any], timeout_s: float | None
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an app in this process. What the app raises, its requests raise.

    Args:
        app: see `below_middleware`.
        state: what the app's start-up has left for its requests.
        timeout_s: seconds for a whole request; None for no limit.
    """
    transport = httpx.ASGITransport(_HangsUp(app, state))
    async with httpx.AsyncClient(
        transport=transport, base_url="http://localhost", timeout=None, trust_env=False
    ) as client:
        async with asyncio.timeout(timeout_s):
            yield client


class _HangsUp:
    """Lets the app see a caller that is cancelled as a client that hangs up.

    vLLM runs a request in a task of its own, which only a disconnect ends: without one the engine
    would go on with a request that nobody waits for.
    """

    def __init__(self, app: App, state: Mapping[str, Any]) -> None:
        self._app = app
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gone = asyncio.Event()

        async def receive_until_gone() -> Message:
            return await _first(receive, gone)

        scope["state"] = dict(self._state)
        work = asyncio.ensure_future(self._app(scope, receive_until_gone, send))
        work.add_done_callback(_forget_error)
        try:
            await asyncio.wait({work})
        finally:
            gone.set()
            await _end(work)
        await work


async def _first(receive: Receive, gone: asyncio.Event) -> Message:
    """The next message, or a disconnect if the client goes first."""
    message = asyncio.ensure_future(receive())
    leaving = asyncio.ensure_future(gone.wait())
    try:
        await asyncio.wait({message, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if message.done():
            return await message
        disconnect: MutableMapping[str, Any] = dict(DISCONNECT)
        return disconnect
    finally:
        message.cancel()
        leaving.cancel()


async def _end(work: asyncio.Future[None]) -> None:
    """Waits for a request that may be of no use any more, and cancels it after HANG_UP_S."""
    if work.done():
        return
    try:
        await asyncio.wait({work}, timeout=HANG_UP_S)
    finally:
        work.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait({work}, timeout=HANG_UP_S)


def _forget_error(work: asyncio.Future[None]) -> None:
    """Of a request that nobody waits for; else the loop logs it as never retrieved."""
    if not work.cancelled():
        work.exception()
