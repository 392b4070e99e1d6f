"""Refusals over ASGI: answers in OpenAI's form that their clients get to see."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from http import HTTPStatus
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


# Of an error that no page, proxy or browser has a use for.
_HEADERS = (
    (b"content-type", b"application/json"),
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
)


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
            "headers": [*_HEADERS, (b"content-length", b"%d" % len(body)), *(headers or [])],
        }
    )
    await send({"type": "http.response.body", "body": body})


def refusal_bytes(status: int, message: str) -> bytes:
    """A refusal as it goes over a connection that is closed then, where there is no ASGI."""
    body = json.dumps(error_document(message, status, None)).encode()
    headers = (*_HEADERS, (b"content-length", b"%d" % len(body)), CLOSE)
    lines = [b"HTTP/1.1 %d %b" % (status, HTTPStatus(status).phrase.encode())]
    lines += [b"%b: %b" % header for header in headers]
    return b"\r\n".join([*lines, b"", body])


async def send_empty(send: Send) -> None:
    """Answer 200 without a body, as vLLM's /health does."""
    headers = [(b"content-length", b"0")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b""})
