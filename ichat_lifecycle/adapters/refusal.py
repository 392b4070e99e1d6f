"""Refusals over ASGI: answers in OpenAI's form that their clients get to see."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

UNAUTHORIZED, UNAVAILABLE = 401, 503
BODY_LIMIT = 16 * 2**20  # bytes read of a refused request, so that its client sees the answer
BODY_TIMEOUT_S = 2.0


def error_document(message: str, status: int, state: str | None) -> dict[str, Any]:
    """An error in OpenAI's form, with the state of who refuses."""
    kind = "unauthorized" if status == UNAUTHORIZED else "service_unavailable"
    error: dict[str, Any] = {"message": message, "type": kind, "param": None, "code": status}
    if state is not None:
        error["state"] = state
    return {"error": error}


async def read_body(receive: Receive) -> None:
    """An answer to a body that nobody read is lost in the connection's reset."""
    size = 0
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            while size < BODY_LIMIT:
                message = await receive()
                size += len(message.get("body", b""))
                if not message.get("more_body", False):
                    return
    except TimeoutError:
        return


async def send_json(
    send: Send,
    status: int,
    document: dict[str, Any],
    headers: list[tuple[bytes, bytes]] | None = None,
) -> None:
    body = json.dumps(document).encode()
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
                *(headers or []),
            ],
        }
    )
    await send({"type": "http.response.body", "body": body})


async def send_empty(send: Send) -> None:
    """Answer 200 without a body, as vLLM's /health does."""
    headers = [(b"content-length", b"0")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b""})
