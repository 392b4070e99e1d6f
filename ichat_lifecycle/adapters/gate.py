"""The outermost layer of the main port: who may pass, by the state of the worker.

Pure ASGI, in front of vLLM's own app. Until that is attached, and whenever the state is not READY,
inference gets 503 with `Retry-After` and an error in OpenAI's form that names the state.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from ichat_lifecycle.adapters import vllm_routes
from ichat_lifecycle.adapters.answer_headers import AnswerHeaders
from ichat_lifecycle.adapters.main_port_names import MainPortNames, is_own_path, misdirect
from ichat_lifecycle.adapters.paths import is_one_of, route_path
from ichat_lifecycle.adapters.refusal import (
    CLOSE,
    CROWDED,
    UNAUTHORIZED,
    UNAVAILABLE,
    App,
    Message,
    Receive,
    Scope,
    Send,
    error_document,
    send_empty,
    send_json,
)
from ichat_lifecycle.config import Http
from ichat_lifecycle.journal import Snapshot
from ichat_lifecycle.states import State

# By default the health of the whole: 200 only in READY, whatever vLLM thinks of itself.
PING_PATH = "/ping"
HEALTH_PATHS = frozenset({"/health", PING_PATH})
MODELS_PATH = "/v1/models"
RESPONSES_PATH = "/v1/responses"
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
SUCCESS = range(200, 300)
READING_METHODS = frozenset({"GET", "HEAD"})

CROWDED_MESSAGE = "The worker has more connections than it can take, each with a request under way."
ADMIN_NAME_MAX = 100  # characters; the adapter's name in a path is the client's

TRY_AGAIN_LATER = 1013  # the same, to a WebSocket


@dataclass(slots=True, eq=False)  # two requests are never the same one
class _Request:
    """One request in flight, and what has been sent of its answer."""

    task: asyncio.Task[Any]
    kind: str
    admin: str = ""  # what it asks of the engine, where that may keep the engine silent
    began_s: float = 0.0
    started: bool = False
    streaming: bool = False  # an event stream that has not ended
    cut: bool = False


class Gate:
    """Lets a request pass, answers it itself, or refuses it.

    Args:
        snapshot: gives the worker's snapshot.
        own_app: answers the lifecycle's read-only routes on the main port.
        retry_after: seconds to name in `Retry-After`.
        http: what /health and GET /v1/models mean outside READY.
        background: gives the tasks of requests that were answered at once and are not done.

    Attributes:
        root_path: the prefix that vLLM's app strips from paths (`--root-path`). All decisions are
            made on the path that is left.
        on_admin: gets the path and the query of each administrative request that has succeeded.
    """

    def __init__(
        self,
        snapshot: Callable[[], Snapshot],
        own_app: App,
        retry_after: Callable[[], int],
        http: Http | None = None,
        background: Callable[[], Collection[asyncio.Task[Any]]] = tuple,
    ) -> None:
        self._snapshot = snapshot
        self._own_app = own_app
        self._retry_after = retry_after
        self._settings = http or Http()
        self._headers: AnswerHeaders | None = None
        self._background = background
        self._requests: set[_Request] = set()
        self._empty = asyncio.Event()
        self._empty.set()
        self._key_hashes: tuple[bytes, ...] = ()
        self._names = MainPortNames(None)
        self.root_path = ""
        self.on_admin: Callable[[str, str], None] = lambda path, query: None
        self.app: App | None = None
        self.app_state: dict[str, Any] = {}

    @property
    def in_flight(self) -> int:
        """Requests that passed and are not answered in full; the worker's own never come here.

        Those that were answered at once and go on in the background count until they are done.
        """
        return len(self._requests) + len(self._background())

    def require_keys(self, keys: tuple[str, ...]) -> None:
        """The API keys that the read-only routes on the main port ask for, if any."""
        self._key_hashes = tuple(hashlib.sha256(key.encode()).digest() for key in keys)

    def require_hosts(self, bound: str | None, origins: Collection[str] = ()) -> None:
        """Answer to the names of the bound address alone, from now on.

        By default that is for our own routes, unless they ask for a key: they show the worker's
        arguments. vLLM's are for whoever reaches them, whom a 503 does not tell its reason.
        `http.hosts` or `--api-key` keeps web pages from these, too.

        Args:
            bound: the address of the main port; None for a Unix socket.
            origins: those whose pages may read all that is here; see MainPortNames.
        """
        self._names = MainPortNames(bound, self._settings.hosts, origins)

    def add_headers(self, headers: AnswerHeaders) -> None:
        """Add these to every answer that is not vLLM's own, from now on."""
        self._headers = headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = scope["type"]
        if kind == "http":
            await self._http(scope, receive, send)
        elif kind == "websocket":
            await self._websocket(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, app = route_path(scope["path"], self.root_path), self.app
        ours = is_own_path(path) or self._answers_health(scope)
        if self._is_refused(scope, path):
            await self._with_headers(self._misdirect, scope, receive, send)
        elif app is not None and not ours and self._may_pass(scope, path):
            await self._pass(app, scope, receive, send)
        else:
            await self._with_headers(self._answer, scope, receive, send)

    def _is_refused(self, scope: Scope, path: str) -> bool:
        return self._names.refuse(scope, path, keyed=bool(self._key_hashes))

    async def _misdirect(self, scope: Scope, receive: Receive, send: Send) -> None:
        await misdirect(send)

    async def _with_headers(self, app: App, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer by this app of ours, with the headers that vLLM's own answers have."""
        if self._headers is not None:
            app = self._headers.around(app)
        await app(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """What the gate answers itself."""
        path = route_path(scope["path"], self.root_path)
        if self._answers_health(scope):
            await send_empty(send)
        elif not is_own_path(path):
            await self._refuse(scope, send)
        elif self._has_key(scope):
            await self._own_app({**scope, "path": path}, receive, send)
        else:
            refusal = error_document("Unauthorized", UNAUTHORIZED, None)
            await send_json(send, UNAUTHORIZED, refusal)

    def _answers_health(self, scope: Scope) -> bool:
        """Whether it asks for /health or /ping, and these only show that the process is alive."""
        path, method = route_path(scope["path"], self.root_path), scope["method"]
        asks = method in READING_METHODS or (path == PING_PATH and method == "POST")
        return self._settings.health == "live" and path in HEALTH_PATHS and asks

    async def _websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        ready = self._snapshot().state is State.READY
        path = route_path(scope["path"], self.root_path)
        refused = _is_crowded(scope) or self._is_refused(scope, path)
        if self.app is not None and ready and not refused:
            await self._pass(self.app, scope, receive, send)
        else:
            await receive()
            await self._close_websocket(scope, send)

    def _may_pass(self, scope: Scope, path: str) -> bool:
        method, state = scope["method"], self._snapshot().state
        if state is State.READY:
            return method in SAFE_METHODS or not _is_crowded(scope)
        if state is State.STOPPING:
            return _is_stored_response(path) and method in READING_METHODS and self._draining()
        if is_one_of(scope["path"], self.root_path, HEALTH_PATHS):
            return False
        gated = self._settings.models == "gated" and _is_models_path(path)
        if gated and method != "OPTIONS":
            return False
        if method in SAFE_METHODS or path in vllm_routes.WAKING:
            return True
        return state is State.DEGRADED and vllm_routes.passes_while_degraded(path)

    def _draining(self) -> bool:
        """Whether a request goes on in the background: its answer is there for who asks for it."""
        return bool(self._background())

    def _has_key(self, scope: Scope) -> bool:
        if not self._key_hashes:
            return True
        given: bytes = next((v for k, v in scope["headers"] if k == b"authorization"), b"")
        scheme, _, key = given.partition(b" ")
        if scheme.lower() != b"bearer":
            return False
        digest = hashlib.sha256(key).digest()
        return any(hmac.compare_digest(digest, known) for known in self._key_hashes)

    # --- passing

    def _admin_name(self, scope: Scope) -> str:
        method, path = scope.get("method", ""), route_path(scope["path"], self.root_path)
        silences = method not in {*SAFE_METHODS, ""} and vllm_routes.may_silence(path)
        return f"{method} {path}" if silences else ""

    def admin_request(self, before_s: float) -> str:
        """The oldest administrative request under way that began before this; "" for none.

        Args:
            before_s: a time on the event loop's clock, in seconds.
        """
        found = [r for r in self._requests if r.admin and r.began_s <= before_s]
        return min(found, key=lambda r: r.began_s).admin[:ADMIN_NAME_MAX] if found else ""

    async def _pass(self, app: App, scope: Scope, receive: Receive, send: Send) -> None:
        task = asyncio.current_task()
        assert task is not None
        began_s = asyncio.get_running_loop().time()
        request = _Request(task, scope["type"], self._admin_name(scope), began_s)
        query = scope.get("query_string", b"").decode("ascii", "replace")
        asked = route_path(scope["path"], self.root_path), query

        async def watching_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                request.started = True
                request.streaming = _is_event_stream(message)
                if request.admin and message["status"] in SUCCESS:
                    self.on_admin(*asked)
            elif not message.get("more_body", False):
                request.streaming = False
            await send(message)

        self._requests.add(request)
        self._empty.clear()
        try:
            scope["state"] = {**self.app_state, **scope.get("state", {})}
            await app(scope, receive, watching_send)
        except asyncio.CancelledError:
            if not request.cut:
                raise
            task.uncancel()
            await self._end_cut(request, scope, receive, send)
        finally:
            self._requests.discard(request)
            if not self._requests:
                self._empty.set()

    async def drained(self) -> None:
        """Returns once nothing is in flight."""
        while not self._empty.is_set() or self._background():
            await self._empty.wait()
            if tasks := self._background():
                await asyncio.wait(tasks)

    async def cut(self) -> None:
        """Ends everything in flight, each with an explicit error, and waits for that."""
        for request in tuple(self._requests):
            request.cut = True
            request.task.cancel()
        tasks = self._background()
        for task in tasks:
            task.cancel()
        await self._empty.wait()
        if tasks:
            await asyncio.wait(tasks)

    async def _end_cut(self, request: _Request, scope: Scope, receive: Receive, send: Send) -> None:
        error = self._unavailable(f"The request was cut: {self._why(scope)}")
        if request.kind == "websocket":
            await self._close_websocket(scope, send)
        elif not request.started:

            async def answer(scope: Scope, receive: Receive, send: Send) -> None:
                await self._send_unavailable(send, error)

            await self._with_headers(answer, scope, receive, send)
        elif request.streaming:
            # An event stream's only explicit end is an event: its status was sent long ago.
            body = b"data: " + json.dumps(error).encode() + b"\n\n"
            await send({"type": "http.response.body", "body": body, "more_body": False})
        # Anything else: the server closes the connection, which no client takes for a full answer.

    # --- refusing

    async def _refuse(self, scope: Scope, send: Send) -> None:
        """The body is not read: the server discards it, and the client has the answer at once."""
        if self._snapshot().state is State.READY and _is_crowded(scope):
            error = self._unavailable(CROWDED_MESSAGE)
            await self._send_unavailable(send, error, [CLOSE])
        else:
            await self._send_unavailable(send, self._unavailable(self._why(scope)))

    def _unavailable(self, message: str) -> dict[str, Any]:
        return error_document(message, UNAVAILABLE, self._snapshot().state)

    async def _send_unavailable(
        self, send: Send, error: dict[str, Any], more: Sequence[tuple[bytes, bytes]] = ()
    ) -> None:
        headers = [(b"retry-after", str(self._retry_after()).encode()), *more]
        if self._snapshot().state is State.STOPPING:
            headers.append(CLOSE)
        await send_json(send, UNAVAILABLE, error, headers)

    async def _close_websocket(self, scope: Scope, send: Send) -> None:
        reason = self._why(scope)
        await send({"type": "websocket.close", "code": TRY_AGAIN_LATER, "reason": reason})

    def _why(self, scope: Scope) -> str:
        """The state, which any client has to know, and its reason, if that is the client's."""
        snapshot = self._snapshot()
        told = snapshot.reason if self._names.trust(scope) else None
        reason = f" ({told.message})" if told else ""
        return f"The worker is not ready: its state is {snapshot.state.value}{reason}."


def _is_crowded(scope: Scope) -> bool:
    return bool(scope.get("state", {}).get(CROWDED))


def _is_stored_response(path: str) -> bool:
    return path.startswith(f"{RESPONSES_PATH}/")


def _is_models_path(path: str) -> bool:
    return path == MODELS_PATH or path.startswith(f"{MODELS_PATH}/")


def _is_event_stream(start: Message) -> bool:
    return any(
        name.lower() == b"content-type" and value.startswith(b"text/event-stream")
        for name, value in start.get("headers", ())
    )
