"""Refusals over ASGI: answers in OpenAI's form that their clients get to see."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

UNAUTHORIZED, INTERNAL, UNAVAILABLE = 401, 500, 503
_KINDS = {UNAUTHORIZED: "unauthorized", UNAVAILABLE: "service_unavailable"}
CLOSE = (b"connection", b"close")
# In scope["state"] of a connection that is one too many while all others have an answer under way.
CROWDED = "ichat_lifecycle.crowded"


def error_document(message: str, status: int, state: str | None) -> dict[str, Any]:
    """An error in OpenAI's form, with the state of who refuses."""
    kind = _KINDS.get(status, "invalid_request_error" if status < INTERNAL else "server_error")
    error: dict[str, Any] = {"message": message, "type": kind, "param": None, "code": status}
    if state is not None:
        error["state"] = state
    return {"error": error}


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
                (b"x-content-type-options", b"nosniff"),
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
