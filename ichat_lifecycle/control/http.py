"""What every control plane over HTTP has in common: errors, the token, limits, JSON."""

from __future__ import annotations

import hmac
import json
import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import structlog
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

log = structlog.get_logger("ichat_lifecycle")

BODY_LIMIT = 64 * 1024

# Guessing a token is slowed to one try per second; a log of it cannot grow faster either.
WRONG_TOKENS_AT_MOST = 10
WRONG_TOKENS_WINDOW_S = 10.0

BAD_REQUEST = 400
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


class TokenGuard:
    """Lets through who knows the token; without a token, nobody.

    After 10 wrong tokens in 10 s, all together, every token gets 429 until the oldest of them is
    10 s old. The right one too: if it passed, guessing would not be slowed. Signals always work.
    """

    def __init__(self, token: str | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._token = token.encode() if token else None
        self._clock = clock
        self._wrong_at: deque[float] = deque(maxlen=WRONG_TOKENS_AT_MOST)

    async def check(self, request: Request) -> None:
        """Raises HttpError: 403 without a configured token, 401 without the right one, 429."""
        if self._token is None:
            raise HttpError(
                403,
                "control_token_not_set",
                "this worker takes no commands: it was started without a control token",
                "start it with --control-token",
            )
        given = _bearer_token(request)
        if given is None:
            raise _unauthorized("this route needs the control token")
        self._refuse_if_locked()
        if not hmac.compare_digest(given, self._token):
            self._wrong_at.append(self._clock())
            client = request.client.host if request.client else None
            log.warning("control_token_wrong", client=client, path=request.url.path)
            raise _unauthorized("the control token is wrong")

    def _refuse_if_locked(self) -> None:
        if len(self._wrong_at) < WRONG_TOKENS_AT_MOST:
            return
        left_s = self._wrong_at[0] + WRONG_TOKENS_WINDOW_S - self._clock()
        if left_s > 0:
            raise HttpError(
                429,
                "too_many_wrong_tokens",
                "too many wrong control tokens: no token is looked at for a moment",
                "try again later; SIGTERM stops the worker at any time",
                headers={"Retry-After": str(max(1, math.ceil(left_s)))},
            )


def _bearer_token(request: Request) -> bytes | None:
    scheme, _, value = request.headers.get("authorization", "").partition(" ")
    # Starlette decodes headers as latin-1; the same way back gives the bytes that were sent.
    return value.strip().encode("latin-1") if scheme.lower() == "bearer" and value else None


def _unauthorized(message: str) -> HttpError:
    return HttpError(
        401,
        "unauthorized",
        message,
        "send it as Authorization: Bearer TOKEN",
        headers={"WWW-Authenticate": "Bearer"},
    )


class BodyLimit:
    """Refuses a request that announces a body over the limit, before any of it is read."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and _announced_size(scope) > BODY_LIMIT:
            await _answer(_too_large())(scope, receive, send)
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


def add_error_handlers(app: FastAPI, known: tuple[str, ...]) -> None:
    async def answer(request: Request, error: Exception) -> Response:
        return _answer(_as_http_error(request, error, known))

    handled = (HttpError, HTTPException, RequestValidationError, LifecycleError, TimeoutError)
    for kind in (*handled, Exception):
        app.add_exception_handler(kind, answer)


def _as_http_error(request: Request, error: Exception, known: tuple[str, ...]) -> HttpError:
    match error:
        case HttpError():
            return error
        case HTTPException():
            return _of_routing(request, error, known)
        case RequestValidationError():
            return HttpError(BAD_REQUEST, "bad_request", _complaint(error))
        case LifecycleError():
            return HttpError(_status_of(error), error.code, error.message, error.hint)
        case TimeoutError():
            message = str(error) or "the worker did not answer in time"
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


def _answer(error: HttpError) -> Response:
    return json_response(error.document, error.status, error.headers)


def json_response(
    document: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    text = json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # A path may hold bytes that are no text (lone surrogates): shown as "?", not as a 500.
    return Response(
        text.encode("utf-8", "replace"),
        status,
        {"Cache-Control": "no-store", **(headers or {})},
        "application/json",
    )
