"""What every control plane over HTTP has in common: errors, limits, JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from ichat_lifecycle.control.view import error_document
from ichat_lifecycle.errors import (
    DeadlineError,
    EngineNotUp,
    LifecycleError,
    TransitionRefused,
)

BODY_LIMIT = 64 * 1024

BAD_REQUEST = 400
MISDIRECTED = 421
INTERNAL_ERROR = 500
MESSAGE_LIMIT = 300


class HttpError(Exception):
    """An answer that is an error: status, the document's three fields, and headers."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        hint: str | None = None,
        *,
        headers: Mapping[str, str] | None = None,
        more: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})
        self.document = {**error_document(code, message[:MESSAGE_LIMIT], hint), **(more or {})}


class BodyLimit:
    """Refuses a request that announces a body over the limit, before any of it is read."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and _announced_size(scope) > BODY_LIMIT:
            await answer_of(_too_large())(scope, receive, send)
        else:
            await self._app(scope, receive, send)


def _announced_size(scope: Scope) -> int:
    """The largest Content-Length; the server has refused one that is not a number by now."""
    sizes = [value for name, value in scope["headers"] if name == b"content-length"]
    return max((int(size) for size in sizes if size.isdigit()), default=0)


def _too_large() -> HttpError:
    return HttpError(
        413,
        "body_too_large",
        f"the request's body is larger than {BODY_LIMIT} bytes",
        headers={"Connection": "close"},  # else the server would read the rest to its end
    )


async def body_of(request: Request) -> bytes:
    """The whole body. Raises HttpError 413 as soon as it passes the limit, announced or not."""
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > BODY_LIMIT:
                raise _too_large()
    except ClientDisconnect:
        raise HttpError(BAD_REQUEST, "bad_request", "the request ended in its body") from None
    return bytes(body)


def now_of(body: bytes) -> bool:
    """`now` of a stop's optional JSON body; False by default. Raises HttpError 400."""
    if not body.strip():
        return False
    hint = 'send no body, or {"now": true}'
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        raise HttpError(BAD_REQUEST, "bad_request", "the body is not JSON", hint) from None
    # A misspelt key must not turn a stop at once into a graceful one.
    if not isinstance(document, dict) or not document.keys() <= {"now"}:
        raise HttpError(BAD_REQUEST, "bad_request", "the body holds more than `now`", hint)
    now = document.get("now", False)
    if not isinstance(now, bool):
        raise HttpError(BAD_REQUEST, "bad_request", "`now` is neither true nor false", hint)
    return now


def add_error_handlers(
    app: FastAPI, known: tuple[str, ...], scrub: Callable[[str], str] = str
) -> None:
    """Answer errors as documents.

    Args:
        known: the routes there are.
        scrub: takes secrets out of texts that come from elsewhere, such as an engine's errors.
    """

    async def answer(request: Request, error: Exception) -> Response:
        return answer_of(_as_http_error(request, error, known, scrub))

    handled = (HttpError, HTTPException, RequestValidationError, LifecycleError, TimeoutError)
    for kind in (*handled, Exception):
        app.add_exception_handler(kind, answer)


def _as_http_error(
    request: Request, error: Exception, known: tuple[str, ...], scrub: Callable[[str], str]
) -> HttpError:
    match error:
        case HttpError():
            return error
        case HTTPException():
            return _of_routing(request, error, known)
        case RequestValidationError():
            return HttpError(BAD_REQUEST, "bad_request", _complaint(error))
        case LifecycleError():
            hint = error.hint and scrub(error.hint)
            return HttpError(_status_of(error), error.code, scrub(error.message), hint)
        case TimeoutError():
            message = scrub(str(error)) or "the worker did not answer in time"
            return HttpError(504, "timeout", message, "its event loop or its engine is busy")
        case _:
            # The server logs the traceback; it is nobody else's.
            return HttpError(
                INTERNAL_ERROR, "internal_error", "the control plane failed", "see the log"
            )


def _status_of(error: LifecycleError) -> int:
    if isinstance(error, TransitionRefused):
        return 409
    if isinstance(error, EngineNotUp):
        return 503
    return 504 if isinstance(error, DeadlineError) else 502


def _of_routing(request: Request, error: HTTPException, known: tuple[str, ...]) -> HttpError:
    """404 and 405, with the routes there are."""
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
    return HttpError(
        error.status_code,
        code,
        f"no such route: {request.method} {request.url.path}",
        f"there are: {', '.join(known)}",
        headers=error.headers,
        more={"routes": list(known)},
    )


def _complaint(error: RequestValidationError) -> str:
    first = error.errors()[0]
    return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"


def answer_of(error: HttpError) -> Response:
    """The answer that an error is."""
    return json_response(error.document, error.status, error.headers)


def json_response(
    document: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    text = json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # A path may hold bytes that are no text (lone surrogates): shown as "?", not as a 500.
    return Response(
        text.encode("utf-8", "replace"),
        status,
        dict(headers or {}),
        "application/json",
    )
