"""What is refused before any app sees it: a head that two servers may read in two ways.

The parsers let more through than HTTP/1.1 allows: a second `Host`, versions that do not exist. A
proxy in front may have decided by the other one.
"""

from __future__ import annotations

from ichat_lifecycle.adapters.refusal import (
    CLOSE,
    App,
    Message,
    Receive,
    Scope,
    Send,
    error_document,
    send_json,
)

BAD_REQUEST, TOO_LARGE, VERSION_NOT_SUPPORTED = 400, 431, 505
VERSIONS = frozenset({"1.0", "1.1"})


def checked(app: App, head_count: int | None) -> App:
    """The app behind the rules that every request has to keep, whatever the app does.

    Args:
        head_count: header lines at most; None for any number.
    """

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        headers = scope["headers"]
        if refusal := _refusal_of(scope, head_count):
            receive, send = _close_unless_read(receive, send)
            await _refuse(scope, receive, send, *refusal)
            return
        if any(name == b"expect" for name, _ in headers):
            receive, send = _close_unless_read(receive, send)
        await app(scope, receive, send)

    return call


def _refusal_of(scope: Scope, head_count: int | None) -> tuple[int, str] | None:
    """The status and the reason, where no app gets to see the request."""
    headers = scope["headers"]
    if head_count is not None and len(headers) > head_count:
        return TOO_LARGE, headers_too_large(f"more than {head_count} lines")
    if scope["http_version"] not in VERSIONS:  # as the parsers take them: 0.9, 9.9
        return VERSION_NOT_SUPPORTED, "This server speaks HTTP/1.0 and HTTP/1.1."
    if scope.get("method") == "CONNECT":  # h11 takes any other answer than a refusal for a tunnel
        return BAD_REQUEST, "This server is no proxy."
    if sum(name == b"host" for name, _ in headers) > 1:
        return BAD_REQUEST, "The request has more than one Host header."
    return None


async def _refuse(scope: Scope, receive: Receive, send: Send, status: int, message: str) -> None:
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.close", "code": 1008})
    else:
        await send_json(send, status, error_document(message, status, None))


def _close_unless_read(receive: Receive, send: Send) -> tuple[Receive, Send]:
    """Close the connection after an answer that comes before the body was asked for.

    A client that waits for `100 Continue` sends its body after such an answer, or does not: nobody
    knows which bytes come next.
    """
    asked = False

    async def asking() -> Message:
        nonlocal asked
        asked = True
        return await receive()

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start" and not asked:
            message = {**message, "headers": [*message.get("headers", ()), CLOSE]}
        await send(message)

    return asking, sending


def headers_too_large(what: str) -> str:
    """The message of a refusal."""
    return f"The request's headers are too large: {what}."
