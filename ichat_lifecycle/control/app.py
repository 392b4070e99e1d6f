"""The control plane's routes: a FastAPI app over the documents of view.py.

Reads are open; what changes the worker needs the control token. Every endpoint and handler is a
coroutine: a plain function would run in a thread pool, which outlives the control plane.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Annotated, Any, Literal, Protocol

import structlog
from fastapi import Depends, FastAPI, Header, Query, Request
from starlette.responses import Response

from ichat_lifecycle import __version__
from ichat_lifecycle.control.events import EVENT_STREAM, Events
from ichat_lifecycle.control.http import (
    BodyLimit,
    HttpError,
    add_error_handlers,
    body_of,
    json_response,
    now_of,
)
from ichat_lifecycle.control.loop_watch import LoopHealth
from ichat_lifecycle.control.metrics import CONTENT_TYPE as METRICS_TYPE
from ichat_lifecycle.control.page.probes import Samples
from ichat_lifecycle.control.page.render import Renderer
from ichat_lifecycle.control.page.routes import add_page
from ichat_lifecycle.control.token_guard import TokenGuard
from ichat_lifecycle.control.view import (
    UNAVAILABLE,
    Identity,
    Life,
    Probe,
    history_document,
    lifecycle_document,
    plain,
    probe_document,
    retry_after_s,
    way_of,
)
from ichat_lifecycle.control.web_guard import WebGuard
from ichat_lifecycle.diagram import mermaid, svg
from ichat_lifecycle.errors import EngineNotUp
from ichat_lifecycle.states import State

log = structlog.get_logger("ichat_lifecycle")

DiagramFormat = Literal["svg", "mermaid"]

ENGINE_IS_UP = (State.ENGINE_UP, State.SERVING, State.READY, State.DEGRADED)

ACCEPTED = 202

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

    Each method raises TransitionRefused (409), EngineNotUp (503), TimeoutError or DeadlineError
    (504), or another LifecycleError (502).
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
    scrub: Callable[[str], str] = str,
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
        scrub: takes secrets out of errors; default: nothing is.
    """
    app = FastAPI(
        title="ichat_lifecycle control plane",
        version=__version__,
        openapi_url=None if read_only else "/openapi.json",
        docs_url=None,  # it would run another host's scripts as this origin's
        redoc_url=None,
        redirect_slashes=False,
    )
    app.add_middleware(BodyLimit)
    app.add_middleware(WebGuard)
    known = _add_reads(app, _Reads(life, identity, engine, loop), with_engine=engine is not None)
    if events is not None:
        known += _add_events(app, events)
    if metrics is not None:
        known += _add_metrics(app, metrics)
    if engine is not None and not read_only:
        known += _add_commands(app, _Commands(life, identity, engine, loop), TokenGuard(token))
    if samples is not None and not read_only:
        takes_commands = bool(token) and engine is not None
        last_event = events.last_id if events is not None else str
        renderer = Renderer(
            life, identity, loop, samples, takes_commands=takes_commands, last_event=last_event
        )
        known += add_page(app, renderer)
    add_error_handlers(app, tuple(known), scrub)
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


def _add_commands(app: FastAPI, commands: _Commands, guard: TokenGuard) -> list[str]:
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
        return json_response(lifecycle_document(self._life, self._identity, self._loop()))

    async def history(self, after: Annotated[int, Query(ge=0)] = 0) -> Response:
        """The transitions so far; with `after`, those with a greater `seq`."""
        return json_response(history_document(self._life, after))

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
        headers = _retry_after(self._life) if status == UNAVAILABLE else None
        return json_response(body, status, headers)

    async def engine(self) -> Response:
        """What the engine knows of itself; 503 while there is none."""
        if self._engine is None or self._life.snapshot.state not in ENGINE_IS_UP:
            raise self._no_engine()
        try:
            described = plain(dict(await self._engine.describe()))
        except EngineNotUp:
            raise self._no_engine() from None
        except Exception:
            if self._life.snapshot.state not in ENGINE_IS_UP:  # it ended during the question
                raise self._no_engine() from None
            raise
        return json_response({"state": self._life.snapshot.state.value, **described})

    def _no_engine(self) -> HttpError:
        state = self._life.snapshot.state
        return HttpError(
            UNAVAILABLE,
            "engine_not_up",
            f"there is no engine to ask: the worker is {state.value}",
            "GET /lifecycle tells how far it is",
            headers=_retry_after(self._life),
            more={"state": state.value},
        )


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
        await self._engine.stop(now_of(await body_of(request)))
        return self._document(ACCEPTED)

    async def restart(self, request: Request) -> Response:
        """Ends the engine and starts it again within the process."""
        await body_of(request)
        await self._engine.command("restart", None)
        return self._document(ACCEPTED)

    async def sleep(
        self, request: Request, level: Annotated[int, Query(ge=0, le=2)] = 1
    ) -> Response:
        """Puts the engine to sleep; asleep is not ready."""
        await body_of(request)
        await self._engine.command("sleep", level)
        return self._document()

    async def wake(self, request: Request) -> Response:
        """Wakes the engine; READY follows once it has answered."""
        await body_of(request)
        await self._engine.command("wake", None)
        return self._document()

    async def reset_prefix_cache(self, request: Request) -> Response:
        """Empties the engine's prefix cache."""
        await body_of(request)
        await self._engine.command("reset_prefix_cache", None)
        return self._document()

    def _document(self, status: int = 200) -> Response:
        return json_response(lifecycle_document(self._life, self._identity, self._loop()), status)


def _retry_after(life: Life) -> dict[str, str]:
    return {"Retry-After": str(retry_after_s(life))}
