"""The routes of a fleet's supervisor: all workers with their snapshots, and each one's own routes.

Reads are open; what changes something needs the fleet's token. Every endpoint is a coroutine on the
supervisor's own loop.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Annotated, Any, Protocol

from fastapi import Depends, FastAPI, Header, Query, Request
from starlette.responses import Response, StreamingResponse

from ichat_lifecycle import __version__
from ichat_lifecycle.control.clean_body import new_pace
from ichat_lifecycle.control.events import EVENT_STREAM, Events
from ichat_lifecycle.control.http import (
    BodyLimit,
    HttpError,
    add_error_handlers,
    body_of,
    json_response,
    now_of,
)
from ichat_lifecycle.control.passing import passed_on
from ichat_lifecycle.control.token_guard import TokenGuard
from ichat_lifecycle.control.web_guard import WebGuard
from ichat_lifecycle.errors import LifecycleError
from ichat_lifecycle.fleet.asking import WorkerClients
from ichat_lifecycle.fleet.fleet import Fleet, NoSuchWorkerError, summary
from ichat_lifecycle.fleet.member import Member
from ichat_lifecycle.fleet.view import (
    fleet_document,
    member_document,
    worker_document,
)
from ichat_lifecycle.redact import Secrets
from ichat_lifecycle.token_bucket import TokenBucket

ACCEPTED, NOT_FOUND, CONFLICT, UNAVAILABLE = 202, 404, 409, 503
HEAD = "HEAD"

Endpoint = Callable[..., Awaitable[Response]]


class Output(Protocol):
    """What the workers have printed."""

    def read(self, name: str, count: int) -> AsyncIterator[str]:
        """The newest lines of a worker, some at a time."""
        ...

    def follow(self, name: str, count: int) -> AsyncIterator[str]:
        """The same, and each line that comes from then on."""
        ...


class FleetDesk(Protocol):
    """What the supervisor itself is asked for."""

    @property
    def file(self) -> str: ...

    async def reload(self) -> Mapping[str, Any]:
        """Raises LifecycleError: nothing was changed."""
        ...

    def stop(self, *, now: bool) -> None: ...


def build_fleet_app(
    fleet: Fleet,
    desk: FleetDesk,
    output: Output,
    events: Events,
    *,
    token: str | None,
    clients: WorkerClients,
    hidden: Secrets | None = None,
) -> FastAPI:
    """The app with all routes.

    Args:
        token: what POST routes ask for.
        clients: asks the workers.
        hidden: what is taken out of what workers answer, and of errors; default: nothing.
    """
    app = FastAPI(
        title="ichat_lifecycle fleet",
        version=__version__,
        docs_url=None,  # it would run another host's scripts as this origin's
        redoc_url=None,
        redirect_slashes=False,
    )
    app.add_middleware(BodyLimit)
    app.add_middleware(WebGuard)
    reads, commands = _Reads(fleet, desk, output, events, clients), _Commands(fleet, desk)
    hidden = hidden or Secrets()
    passing = _Passing(fleet, clients, hidden)
    guard = [Depends(TokenGuard(token).check)]
    gets: dict[str, Endpoint] = {
        "/fleet": reads.fleet,
        "/fleet/events": reads.events,
        "/fleet/{name}": reads.worker,
        "/fleet/{name}/logs": reads.logs,
        "/fleet/{name}/{path:path}": passing.get,
        "/livez": reads.livez,
        "/readyz": reads.readyz,
    }
    posts: dict[str, Endpoint] = {
        "/fleet/reload": commands.reload,
        "/fleet/stop": commands.stop_all,
        "/fleet/{name}/stop": commands.stop,
        "/fleet/{name}/restart": commands.restart,
        "/fleet/{name}/{path:path}": passing.post,
    }
    for path, endpoint in gets.items():
        app.add_api_route(path, endpoint, methods=["GET"], response_model=None)
        # A route of its own: two methods in one would share an operation id.
        app.add_api_route(
            path, endpoint, methods=["HEAD"], response_model=None, include_in_schema=False
        )
    for path, endpoint in posts.items():
        app.add_api_route(path, endpoint, methods=["POST"], response_model=None, dependencies=guard)
    known = [f"GET {path}" for path in gets] + [f"POST {path}" for path in posts]
    add_error_handlers(app, tuple(known), hidden.scrub)
    return app


def _member(fleet: Fleet, name: str) -> Member:
    try:
        return fleet.member(name)
    except NoSuchWorkerError as error:
        raise HttpError(NOT_FOUND, error.code, error.message, error.hint) from None


class _Reads:
    """The routes that change nothing."""

    def __init__(
        self,
        fleet: Fleet,
        desk: FleetDesk,
        output: Output,
        events: Events,
        clients: WorkerClients,
    ) -> None:
        self._fleet = fleet
        self._desk = desk
        self._output = output
        self._events = events
        self._clients = clients

    async def fleet(self) -> Response:
        """All workers, each with what it says of itself now."""
        return json_response(await fleet_document(self._fleet, self._desk.file, self._clients))

    async def worker(self, name: str) -> Response:
        """One worker."""
        member = _member(self._fleet, name)
        return json_response(await worker_document(member, self._clients))

    async def events(
        self,
        request: Request,
        last_event_id: Annotated[str | None, Header()] = None,
        after: str | None = None,
    ) -> Response:
        """All that has happened and happens to the workers, as server-sent events."""
        if request.method == HEAD:
            return Response(media_type=EVENT_STREAM)
        return self._events.response(last_event_id or after)

    async def logs(
        self,
        request: Request,
        name: str,
        lines: Annotated[int, Query(ge=0, le=10_000)] = 100,
        follow: bool = False,  # FastAPI passes parameters by name
    ) -> Response:
        """The newest lines that a worker has printed; with `follow`, those to come too."""
        _member(self._fleet, name)
        output = self._output
        read = output.follow if follow and request.method != HEAD else output.read
        stream = (f"{text}\n" async for text in read(name, lines))
        return StreamingResponse(stream, media_type="text/plain")

    async def livez(self) -> Response:
        """200 as long as the supervisor is there."""
        return json_response({"fleet": os.getpid(), "stopping": self._fleet.stopping})

    async def readyz(self) -> Response:
        """200 while every worker serves and is READY."""
        ready, stages = self._fleet.ready, dict(summary(self._fleet.members))
        return json_response({"ready": ready, "stages": stages}, 200 if ready else UNAVAILABLE)


class _Commands:
    """What changes something. All answer at once; what was asked for may take a while."""

    def __init__(self, fleet: Fleet, desk: FleetDesk) -> None:
        self._fleet = fleet
        self._desk = desk

    async def reload(self, request: Request) -> Response:
        """Reads the file again: what will be done, or why nothing is."""
        await body_of(request)
        try:
            return json_response(await self._desk.reload(), ACCEPTED)
        except LifecycleError as error:
            told = list(error.told)
            raise HttpError(
                CONFLICT, error.code, error.message, error.hint, more={"problems": told}
            ) from error

    async def stop_all(self, request: Request) -> Response:
        """Stops all workers and the supervisor: each with its drain, or with `{"now": true}`."""
        self._desk.stop(now=now_of(await body_of(request)))
        return json_response({"stopping": True}, ACCEPTED)

    async def stop(self, name: str, request: Request) -> Response:
        """Stops one worker, which stays stopped until it is restarted."""
        now = now_of(await body_of(request))
        member = _member(self._fleet, name)
        member.ask_to_stop("an operator", now=now)
        return json_response(member_document(member), ACCEPTED)

    async def restart(self, name: str, request: Request) -> Response:
        """Stops one worker, if it runs, and starts it again."""
        await body_of(request)
        _member(self._fleet, name)
        try:
            self._fleet.restart(name)
        except LifecycleError as error:
            raise HttpError(CONFLICT, error.code, error.message, error.hint) from error
        return json_response(member_document(_member(self._fleet, name)), ACCEPTED)


class _Passing:
    """`/fleet/NAME/…` is the worker's own `/…`."""

    def __init__(self, fleet: Fleet, clients: WorkerClients, hidden: Secrets) -> None:
        self._fleet = fleet
        self._clients = clients
        self._hidden = hidden
        self._paces: defaultdict[str, TokenBucket] = defaultdict(new_pace)

    async def get(self, name: str, path: str, request: Request) -> Response:
        """What the worker's control plane answers, also what does not end."""
        return await self._pass(request.method, name, path, request, b"")

    async def post(self, name: str, path: str, request: Request) -> Response:
        """A command to the worker itself."""
        return await self._pass("POST", name, path, request, await body_of(request))

    async def _pass(
        self, method: str, name: str, path: str, request: Request, body: bytes
    ) -> Response:
        member = _member(self._fleet, name)
        url, process = member.control_url, member.process
        if url is None or process is None:
            raise HttpError(
                UNAVAILABLE,
                "no_control_plane",
                f"{name} is {member.stage.value} and has no control plane",
                member.reason,
                headers={"Retry-After": "5"},
            )
        # This worker's own: wherever a worker sends us, no other one is commanded with it.
        headers = {"Authorization": f"Bearer {process.token}"} if method == "POST" else {}
        if last := request.headers.get("last-event-id"):
            headers["Last-Event-ID"] = last
        sending = self._clients.send(
            method,
            url,
            path,
            query=request.scope["query_string"],
            headers=headers,
            content=body or None,
        )
        return await passed_on(name, request, sending, self._hidden, self._paces[name])
