"""The control plane's routes: a FastAPI app over the documents of view.py.

Reads are open; what changes the worker needs the control token. Every endpoint and handler is a
coroutine: a plain function would run in a thread pool, which outlives the control plane.
"""

from __future__ import annotations

import hmac
import json
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from typing import Annotated, Any, Literal, Protocol

import structlog
from fastapi import Depends, FastAPI, Header, Query, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from ichat_lifecycle import __version__
from ichat_lifecycle.control.events import EVENT_STREAM, Events
from ichat_lifecycle.control.loop_watch import LoopHealth
from ichat_lifecycle.control.metrics import CONTENT_TYPE as METRICS_TYPE
from ichat_lifecycle.control.page.probes import Samples
from ichat_lifecycle.control.page.render import Renderer
from ichat_lifecycle.control.page.routes import add_page
from ichat_lifecycle.control.view import (
    UNAVAILABLE,
    Identity,
    Life,
    Probe,
    error_document,
    history_document,
    lifecycle_document,
    plain,
    probe_document,
    retry_after_s,
    way_of,
)
from ichat_lifecycle.diagram import mermaid, svg
from ichat_lifecycle.errors import DeadlineError, LifecycleError, TransitionRefused
from ichat_lifecycle.states import State

log = structlog.get_logger("ichat_lifecycle")

BODY_LIMIT = 64 * 1024

# Guessing a token is slowed to one try per second; a log of it cannot grow faster either.
WRONG_TOKENS_AT_MOST = 10
WRONG_TOKENS_WINDOW_S = 10.0

DiagramFormat = Literal["svg", "mermaid"]

ENGINE_IS_UP = (State.ENGINE_UP, State.SERVING, State.READY, State.DEGRADED)

ACCEPTED = 202
BAD_REQUEST = 400
INTERNAL_ERROR = 500
MESSAGE_LIMIT = 300

# The routes that are on the main port too, for whoever has to tell them from vLLM's.
READ_ONLY_PATHS = (
    "/lifecycle",
    "/lifecycle/history",
    "/lifecycle/diagram",
    "/lifecycle/events",
    "/lifecycle/engine",
    "/livez",
    "/readyz",
    "/startupz",
)

Endpoint = Callable[..., Awaitable[Response]]


class EngineDesk(Protocol):
    """Where requests that need the worker's own loop are handed in; called on the app's loop.

    Each method raises TransitionRefused (409), TimeoutError or DeadlineError (504), or another
    LifecycleError (502).
    """

    async def describe(self) -> Mapping[str, Any]:
        """What the engine knows of itself."""
        ...

    async def command(self, name: str, argument: Any) -> None:
        """Runs `sleep` (argument: level), `wake`, `reset_prefix_cache` or `restart` to its end."""
        ...

    async def stop(self, now: bool) -> None:
        """Asks for a stop and returns; with `now`, for one without a drain."""
        ...


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


def build_control_app(  # noqa: PLR0913  # one for each part that may be left out
    life: Life,
    identity: Identity,
    *,
    token: str | None = None,
    engine: EngineDesk | None = None,
    read_only: bool = False,
    loop: Callable[[], LoopHealth] = LoopHealth,
    events: Events | None = None,
    metrics: Callable[[], bytes] | None = None,
    samples: Samples | None = None,
) -> FastAPI:
    """The app with all routes.

    Args:
        token: what POST routes ask for; None or empty (default): they answer 403.
        engine: None (default): no `/lifecycle/engine` and no POST routes.
        read_only: leaves out the POST routes, the page and the OpenAPI pages; for the main port.
        loop: how the worker's event loop is; by default it is well.
        events: None (default): no `/lifecycle/events`.
        metrics: gives them in Prometheus' form; None (default): no `/metrics`.
        samples: what the watchdog has found, for the page at `/`; None (default): no page.
    """
    app = FastAPI(
        title="ichat_lifecycle control plane",
        version=__version__,
        openapi_url=None if read_only else "/openapi.json",
        redoc_url=None,
        redirect_slashes=False,
    )
    app.add_middleware(_BodyLimit)
    known = _add_reads(app, _Reads(life, identity, engine, loop), with_engine=engine is not None)
    if events is not None:
        known += _add_events(app, events)
    if metrics is not None:
        known += _add_metrics(app, metrics)
    if engine is not None and not read_only:
        known += _add_commands(app, _Commands(life, identity, engine, loop), _TokenGuard(token))
    if samples is not None and not read_only:
        takes_commands = bool(token) and engine is not None
        last_event = events.last_id if events is not None else str
        renderer = Renderer(
            life, identity, loop, samples, takes_commands=takes_commands, last_event=last_event
        )
        known += add_page(app, renderer)
    _add_error_handlers(app, tuple(known))
    return app


def _add_reads(app: FastAPI, reads: _Reads, *, with_engine: bool) -> list[str]:
    routes: dict[str, Endpoint] = {
        "/lifecycle": reads.lifecycle,
        "/lifecycle/history": reads.history,
        "/lifecycle/diagram": reads.diagram,
        "/livez": reads.livez,
        "/readyz": reads.readyz,
        "/startupz": reads.startupz,
    }
    if with_engine:
        routes["/lifecycle/engine"] = reads.engine
    for path, endpoint in routes.items():
        app.add_api_route(path, endpoint, methods=["GET"], response_model=None)
        # A route of its own: two methods in one would share an operation id.
        app.add_api_route(
            path, endpoint, methods=["HEAD"], response_model=None, include_in_schema=False
        )
    return [f"GET {path}" for path in routes]


def _add_events(app: FastAPI, events: Events) -> list[str]:
    async def stream(
        last_event_id: Annotated[str | None, Header()] = None, after: str | None = None
    ) -> Response:
        """All that has happened and happens, as server-sent events; see control/events.py.

        `after` is for who cannot send the header, as a browser's first request: the header wins.
        """
        return events.response(last_event_id or after)

    async def head() -> Response:
        return Response(media_type=EVENT_STREAM)

    path = "/lifecycle/events"
    app.add_api_route(path, stream, methods=["GET"], response_model=None)
    app.add_api_route(path, head, methods=["HEAD"], response_model=None, include_in_schema=False)
    return ["GET /lifecycle/events"]


def _add_metrics(app: FastAPI, metrics: Callable[[], bytes]) -> list[str]:
    async def scrape() -> Response:
        """The worker's life in Prometheus' form; vLLM's own metrics are on the main port."""
        return Response(metrics(), media_type=METRICS_TYPE)

    app.add_api_route("/metrics", scrape, methods=["GET"], response_model=None)
    return ["GET /metrics"]


def _add_commands(app: FastAPI, commands: _Commands, guard: _TokenGuard) -> list[str]:
    routes: dict[str, Endpoint] = {
        "/lifecycle/stop": commands.stop,
        "/lifecycle/restart": commands.restart,
        "/lifecycle/engine/sleep": commands.sleep,
        "/lifecycle/engine/wake": commands.wake,
        "/lifecycle/engine/reset-prefix-cache": commands.reset_prefix_cache,
    }
    for path, endpoint in routes.items():
        app.add_api_route(
            path,
            endpoint,
            methods=["POST"],
            response_model=None,
            dependencies=[Depends(guard.check)],  # before anything else of a request is looked at
        )
    return [f"POST {path}" for path in routes]


class _Reads:
    """The routes that change nothing."""

    def __init__(
        self,
        life: Life,
        identity: Identity,
        engine: EngineDesk | None,
        loop: Callable[[], LoopHealth],
    ) -> None:
        self._life = life
        self._identity = identity
        self._engine = engine
        self._loop = loop

    async def lifecycle(self) -> Response:
        """Where the worker is in its life, since when, why, and what comes next."""
        return _json(lifecycle_document(self._life, self._identity, self._loop()))

    async def history(self, after: Annotated[int, Query(ge=0)] = 0) -> Response:
        """The transitions so far; with `after`, those with a greater `seq`."""
        return _json(history_document(self._life, after))

    async def diagram(self, format: DiagramFormat = "svg") -> Response:
        """The table as a picture, with where the worker is and the way it came."""
        way = way_of(self._life)
        if format == "svg":
            return Response(svg(way), media_type="image/svg+xml")
        return Response(mermaid(way), media_type="text/plain")

    async def livez(self) -> Response:
        """200 until the worker is STOPPED."""
        return self._probe("livez")

    async def readyz(self) -> Response:
        """200 exactly while the worker is READY."""
        return self._probe("readyz")

    async def startupz(self) -> Response:
        """200 from the first READY on."""
        return self._probe("startupz")

    def _probe(self, probe: Probe) -> Response:
        status, body = probe_document(self._life, probe, self._loop())
        return _json(body, status, _retry_after(self._life) if status == UNAVAILABLE else None)

    async def engine(self) -> Response:
        """What the engine knows of itself; 503 while there is none."""
        state = self._life.snapshot.state
        if self._engine is None or state not in ENGINE_IS_UP:
            raise HttpError(
                UNAVAILABLE,
                "engine_not_up",
                f"there is no engine to ask: the worker is {state.value}",
                "GET /lifecycle tells how far it is",
                headers=_retry_after(self._life),
                more={"state": state.value},
            )
        described = plain(dict(await self._engine.describe()))
        return _json({"state": self._life.snapshot.state.value, **described})


class _Commands:
    """The routes that change something. All answer with the lifecycle document.

    The body is read, and limited, also where nothing in it matters: an answer to a request that is
    still being sent would leave its rest to be read as the next one.
    """

    def __init__(
        self,
        life: Life,
        identity: Identity,
        engine: EngineDesk,
        loop: Callable[[], LoopHealth],
    ) -> None:
        self._life = life
        self._identity = identity
        self._engine = engine
        self._loop = loop

    async def stop(self, request: Request) -> Response:
        """Asks for a stop: graceful, or without a drain with the body `{"now": true}`.

        Answers at once; the document may still show the state before.
        """
        await self._engine.stop(_now_of(await _body_of(request)))
        return self._document(ACCEPTED)

    async def restart(self, request: Request) -> Response:
        """Ends the engine and starts it again within the process."""
        await _body_of(request)
        await self._engine.command("restart", None)
        return self._document(ACCEPTED)

    async def sleep(
        self, request: Request, level: Annotated[int, Query(ge=0, le=2)] = 1
    ) -> Response:
        """Puts the engine to sleep; asleep is not ready."""
        await _body_of(request)
        await self._engine.command("sleep", level)
        return self._document()

    async def wake(self, request: Request) -> Response:
        """Wakes the engine; READY follows once it has answered."""
        await _body_of(request)
        await self._engine.command("wake", None)
        return self._document()

    async def reset_prefix_cache(self, request: Request) -> Response:
        """Empties the engine's prefix cache."""
        await _body_of(request)
        await self._engine.command("reset_prefix_cache", None)
        return self._document()

    def _document(self, status: int = 200) -> Response:
        return _json(lifecycle_document(self._life, self._identity, self._loop()), status)


class _TokenGuard:
    """Lets through who knows the token.

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


class _BodyLimit:
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


async def _body_of(request: Request) -> bytes:
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


def _now_of(body: bytes) -> bool:
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


def _add_error_handlers(app: FastAPI, known: tuple[str, ...]) -> None:
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
    return _json(error.document, error.status, error.headers)


def _retry_after(life: Life) -> dict[str, str]:
    return {"Retry-After": str(retry_after_s(life))}


def _json(
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
