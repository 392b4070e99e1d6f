"""The gate by raw ASGI calls: who passes, who is refused and how, who is counted, who is cut."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import pytest

from ichat_lifecycle.adapters.answer_headers import AnswerHeaders
from ichat_lifecycle.adapters.gate import Gate
from ichat_lifecycle.adapters.paths import route_path
from ichat_lifecycle.adapters.refusal import (
    CROWDED,
    App,
    Message,
    Receive,
    Scope,
    Send,
)
from ichat_lifecycle.adapters.vllm_routes import FOR_A_PAUSED_ENGINE, WAKING
from ichat_lifecycle.config import Http
from ichat_lifecycle.journal import Reason, Snapshot
from ichat_lifecycle.states import State
from ichat_lifecycle.testing.virtual_time import run_virtual

NOW = datetime(2026, 1, 2, tzinfo=UTC)
EMPTY: Message = {"type": "http.request", "body": b"", "more_body": False}
DISCONNECT: Message = {"type": "http.disconnect"}
START: Message = {"type": "http.response.start", "status": 200, "headers": []}
STREAM: Message = {
    **START,
    "headers": [(b"Content-Type", b"text/event-stream; charset=utf-8")],
}
OWN = ["/livez", "/readyz", "/startupz", "/lifecycle", "/lifecycle/history", "/lifecycle/events"]


async def answer(send: Send, text: bytes) -> None:
    await send(START)
    await send({"type": "http.response.body", "body": text})


async def engine_app(scope: Scope, receive: Receive, send: Send) -> None:
    await answer(send, b"app")


async def own_app(scope: Scope, receive: Receive, send: Send) -> None:
    await answer(send, b"own")


@dataclass
class Call:
    """One call of the gate: what its client sends, and what it has been sent."""

    gate: Gate
    scope: Scope
    incoming: list[Message]
    sent: list[Message] = field(default_factory=list)
    received: int = 0

    async def receive(self) -> Message:
        if not self.incoming:
            await asyncio.Event().wait()  # a client that stays connected and says nothing
        self.received += 1
        return self.incoming.pop(0)

    async def send(self, message: Message) -> None:
        self.sent.append(message)

    async def run(self) -> Call:
        await self.gate(self.scope, self.receive, self.send)
        return self

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    @property
    def headers(self) -> dict[str, str]:
        return {k.decode(): v.decode() for k, v in self.sent[0]["headers"]}

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)

    @property
    def error(self) -> dict[str, Any]:
        error: dict[str, Any] = json.loads(self.body)["error"]
        return error


class Bench:
    """A gate in a state, with an app behind it or none."""

    def __init__(self, state: State, app: App | None = engine_app, **http: Any) -> None:
        self.snapshot = Snapshot(state, NOW, 0.0)
        self.background: list[asyncio.Task[Any]] = []
        self.gate = Gate(
            lambda: self.snapshot,
            own_app,
            lambda: 7,
            Http(**http),
            lambda: [task for task in self.background if not task.done()],
        )
        self.gate.app = app

    def call(
        self,
        path: str,
        method: str = "GET",
        *,
        headers: Sequence[tuple[bytes, bytes]] = (),
        incoming: Sequence[Message] = (EMPTY,),
        kind: str = "http",
    ) -> Call:
        path, _, query = path.partition("?")
        scope: Scope = {
            "type": kind,
            "path": path,
            "query_string": query.encode(),
            "method": method,
            "headers": list(headers),
        }
        return Call(self.gate, scope, list(incoming))

    async def ask(self, path: str, method: str = "GET", **more: Any) -> Call:
        return await self.call(path, method, **more).run()


async def started(call: Call) -> asyncio.Task[Call]:
    """The call in a task of its own, up to where it waits."""
    task = asyncio.create_task(call.run())
    for _ in range(5):
        await asyncio.sleep(0)
    return task


def passed(call: Call) -> bool:
    return (call.status, call.body) == (200, b"app")


def assert_refused(call: Call, state: State) -> None:
    """503 with Retry-After and one complete error in OpenAI's form that names the state."""
    assert (call.status, call.headers["retry-after"]) == (503, "7")
    assert call.headers["content-type"] == "application/json"
    assert int(call.headers["content-length"]) == len(call.body)
    assert call.error["state"] == state.value
    assert state.value in call.error["message"]
    assert (call.error["type"], call.error["code"]) == ("service_unavailable", 503)
    assert call.error["param"] is None
    assert (call.headers.get("connection") == "close") is (state is State.STOPPING)


def test_administrative_requests_that_have_succeeded_are_told() -> None:
    """The engine has to know whether vLLM's own routes took its weights."""
    told: list[tuple[str, str]] = []
    status = 200

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b"app"})

    bench = Bench(State.READY, app)
    bench.gate.on_admin = lambda path, query: told.append((path, query))
    bench.gate.root_path = "/api"
    for line in (("/api/sleep?level=2", "POST"), ("/v1/completions", "POST"), ("/sleep", "GET")):
        asyncio.run(bench.ask(*line))
    status = 500
    asyncio.run(bench.ask("/sleep?level=2", "POST"))
    assert told == [("/sleep", "level=2")]


# --- who may pass

BEFORE_READY = (State.PARSED, State.BOUND, State.ENGINE_UP, State.SERVING)
CHAT, MODELS = ("POST", "/v1/chat/completions"), ("GET", "/v1/models")
# What a trainer does with an engine that it has paused or put to sleep, by vLLM's routes; without
# what wakes it, which passes in SERVING, too.
PAUSED = [
    *[("POST", path) for path in sorted(FOR_A_PAUSED_ENGINE - WAKING)],
    ("POST", "/adapters"),
    ("DELETE", "/adapters/mine"),
]
NOT_FOR_PAUSED = [
    *[("POST", f"/{name}") for name in ("scale_elastic_ep", "tokenize", "v1/responses", "pooling")],
    *[("POST", path) for path in ("/adaptersx", "//pause", "/pause/", "/v1/pause")],
]
HEALTH, PING, WAKE = ("GET", "/health"), ("GET", "/ping"), ("POST", "/wake_up")
RESUME = ("POST", "/resume")


@pytest.mark.parametrize("state", [*BEFORE_READY, State.READY, State.DEGRADED, State.STOPPING])
@pytest.mark.parametrize(("method", "path"), [CHAT, MODELS, HEALTH, WAKE])
def test_nothing_passes_before_the_app_is_attached(state: State, method: str, path: str) -> None:
    assert_refused(asyncio.run(Bench(state, app=None).ask(path, method)), state)


@pytest.mark.parametrize(
    ("state", "request_line", "passes"),
    [
        *[(State.READY, line, True) for line in (CHAT, MODELS, HEALTH, PING, WAKE)],
        *[(State.DEGRADED, line, False) for line in (CHAT, HEALTH, PING, ("DELETE", "/v1/x"))],
        *[(State.DEGRADED, line, True) for line in (MODELS, WAKE, RESUME, *PAUSED)],
        *[(State.SERVING, line, False) for line in PAUSED],
        *[(State.STOPPING, line, False) for line in PAUSED],
        *[(State.READY, line, True) for line in PAUSED],
        *[(State.DEGRADED, line, False) for line in NOT_FOR_PAUSED],
        *[(State.DEGRADED, (method, "/v1/models"), True) for method in ("HEAD", "OPTIONS")],
        *[(State.SERVING, line, False) for line in (CHAT, HEALTH, PING)],
        *[(State.SERVING, line, True) for line in (MODELS, WAKE, RESUME)],
        *[(State.STOPPING, line, False) for line in (CHAT, MODELS, HEALTH, PING, WAKE)],
    ],
)
def test_who_passes_in_which_state(
    state: State, request_line: tuple[str, str], passes: bool
) -> None:
    method, path = request_line
    bench = Bench(state)
    call = asyncio.run(bench.ask(path, method))
    if passes:
        assert passed(call)
    else:
        assert_refused(call, state)
    assert bench.gate.in_flight == 0


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("app", [engine_app, None])
@pytest.mark.parametrize(("method", "path"), [HEALTH, PING, ("POST", "/ping"), ("HEAD", "/health")])
def test_health_as_liveness_is_200_in_every_state(
    state: State, app: App | None, method: str, path: str
) -> None:
    """Also in READY with an engine that vLLM's own route calls dead."""
    call = asyncio.run(Bench(state, app, health="live").ask(path, method))
    assert (call.status, call.body, call.headers) == (200, b"", {"content-length": "0"})


def test_health_as_liveness_leaves_other_requests_as_they_are() -> None:
    bench = Bench(State.DEGRADED, health="live")
    for method, path in (CHAT, ("DELETE", "/health"), ("POST", "/health")):
        assert_refused(asyncio.run(bench.ask(path, method)), State.DEGRADED)
    assert passed(asyncio.run(bench.ask(MODELS[1])))


def test_both_settings_hold_behind_a_root_path() -> None:
    bench = Bench(State.DEGRADED, health="live", models="gated")
    bench.gate.root_path = "/api"
    assert asyncio.run(bench.ask("/api/health")).status == 200
    assert_refused(asyncio.run(bench.ask("/api/v1/models")), State.DEGRADED)


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/", "/v1/models/a/b"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_models_can_be_gated(path: str, method: str) -> None:
    for state in (State.SERVING, State.DEGRADED):
        assert_refused(asyncio.run(Bench(state, models="gated").ask(path, method)), state)
        assert passed(asyncio.run(Bench(state, models="gated").ask("/v1/modelsx", method)))
    assert passed(asyncio.run(Bench(State.READY, models="gated").ask(path, method)))


def test_a_refusal_gives_the_reason() -> None:
    bench = Bench(State.DEGRADED)
    bench.snapshot = Snapshot(State.DEGRADED, NOW, 0.0, reason=Reason("asleep", "it sleeps"))
    said = asyncio.run(bench.ask("/v1/completions", "POST")).error["message"]
    assert said == "The worker is not ready: its state is DEGRADED (it sleeps)."


def test_the_state_counts_when_the_request_comes() -> None:
    """The same gate, from state to state."""
    bench = Bench(State.SERVING)

    async def main() -> list[int]:
        statuses = []
        for state in (State.SERVING, State.READY, State.DEGRADED, State.READY, State.STOPPING):
            bench.snapshot = Snapshot(state, NOW, 0.0)
            statuses.append((await bench.ask("/v1/completions", "POST")).status)
        return statuses

    assert asyncio.run(main()) == [503, 200, 503, 200, 503]


def test_the_app_sees_its_lifespans_state() -> None:
    """As under Uvicorn: each request has a copy of its own."""
    seen: list[Any] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(dict(scope["state"]))
        scope["state"]["mine"] = True
        await answer(send, b"")

    bench = Bench(State.READY, app)
    bench.gate.app_state = {"shared": 1}
    for _ in range(2):
        asyncio.run(bench.ask("/"))
    assert seen == [{"shared": 1}] * 2


# --- our own routes and requests


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("path", OWN)
def test_our_own_routes_answer_in_every_state(state: State, path: str) -> None:
    for app in (engine_app, None):
        assert asyncio.run(Bench(state, app).ask(path)).body == b"own"


@pytest.mark.parametrize("path", ["/lifecycles", "/v1/lifecycle", "/livez/", "/"])
def test_similar_paths_are_the_apps(path: str) -> None:
    assert passed(asyncio.run(Bench(State.READY).ask(path)))


# --- --root-path: both ways to write a path are the same request

ROOT = "/api"


def under_root(state: State, app: App | None = engine_app) -> Bench:
    bench = Bench(state, app)
    bench.gate.root_path = ROOT
    return bench


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("path", OWN)
def test_our_own_routes_answer_with_and_without_the_root_path(state: State, path: str) -> None:
    seen: list[str] = []

    async def own(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["path"])
        await answer(send, b"own")

    bench = under_root(state)
    bench.gate._own_app = own
    for written in (path, ROOT + path):
        assert asyncio.run(bench.ask(written)).body == b"own"
    assert seen == [path, path], "our app has no prefix of its own"


@pytest.mark.parametrize("path", ["/lifecycle", ROOT + "/lifecycle"])
def test_the_root_path_is_no_way_around_the_key(path: str) -> None:
    bench = under_root(State.READY)
    bench.gate.require_keys(("one",))
    assert asyncio.run(bench.ask(path)).status == 401


SPELLINGS = ["{}", "/api{}", "{}/", "/{}", "/api/{}", "/v1/..{}", "/api/v1/..{}", "//api{}"]


@pytest.mark.parametrize("state", [State.SERVING, State.DEGRADED, State.STOPPING])
@pytest.mark.parametrize("path", ["/health", "/ping"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_health_is_refused_however_it_is_written(state: State, path: str, spelling: str) -> None:
    assert_refused(asyncio.run(under_root(state).ask(spelling.format(path))), state)


def test_what_wakes_passes_only_as_the_app_knows_it() -> None:
    bench = under_root(State.DEGRADED)
    for path in ("/wake_up", "/api/wake_up"):
        assert passed(asyncio.run(bench.ask(path, "POST")))
    for path in ("//wake_up", "/wake_up/", "/v1/../wake_up", "/apiwake_up"):
        assert_refused(asyncio.run(bench.ask(path, "POST")), State.DEGRADED)


@pytest.mark.parametrize("root", ["", "/", "/api", "/api/", "api"])
@pytest.mark.parametrize(
    "path", ["/health", "/api/health", "/api//health", "//health", "/api", "/apihealth"]
)
def test_the_gate_and_the_app_agree_on_a_path(root: str, path: str) -> None:
    """The router of vLLM's app is Starlette's."""
    from starlette._utils import get_route_path

    assert route_path(path, root) == get_route_path({"path": path, "root_path": root})


@pytest.mark.parametrize(
    ("keys", "header", "status"),
    [
        ((), None, 200),
        (("one", "two"), None, 401),
        (("one", "two"), b"Bearer one", 200),
        (("one", "two"), b"bearer two", 200),
        (("one", "two"), b"Bearer three", 401),
        (("one",), b"Bearer on", 401),
        (("one",), b"Basic one", 401),
        (("one",), b"one", 401),
        (("one",), b"Bearer ", 401),
        (("sch\u00fcssel",), "Bearer sch\u00fcssel".encode(), 200),
    ],
)
def test_api_keys_guard_our_own_routes(
    keys: tuple[str, ...], header: bytes | None, status: int
) -> None:
    bench = Bench(State.READY)
    bench.gate.require_keys(keys)
    headers = [(b"authorization", header)] if header is not None else []
    call = asyncio.run(bench.ask("/lifecycle", headers=headers))
    assert call.status == status
    if status == 401:
        assert (call.error["type"], call.error["code"]) == ("unauthorized", 401)
        assert "state" not in call.error, "who may not see the state is not told it"


# --- the headers of vLLM's own middleware

ORIGIN = "https://page.example"
BROWSER = [(b"origin", ORIGIN.encode())]
PREFLIGHT = [
    *BROWSER,
    (b"access-control-request-method", b"POST"),
    (b"access-control-request-headers", b"authorization,content-type"),
]
ALLOWING = AnswerHeaders(allowed_origins=(ORIGIN,), request_ids=True)


def dressed(state: State, app: App | None, headers: AnswerHeaders = ALLOWING) -> Bench:
    bench = Bench(state, app)
    bench.gate.add_headers(headers)
    return bench


@pytest.mark.parametrize(
    ("state", "app"), [(State.BOUND, None), (State.DEGRADED, engine_app), (State.STOPPING, None)]
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/health", "/livez", "/lifecycle"])
def test_a_page_of_another_origin_may_read_our_answers(
    state: State, app: App | None, path: str
) -> None:
    bench = dressed(state, app)
    bench.gate.require_keys(("a key",))  # 401 has to be readable as well
    call = asyncio.run(bench.ask(path, "POST", headers=BROWSER))
    assert call.status in (401, 503)
    assert call.headers["access-control-allow-origin"] == ORIGIN
    assert len(call.headers["x-request-id"]) == 32
    preflight = asyncio.run(bench.ask(path, "OPTIONS", headers=PREFLIGHT))
    if app is None or path != "/v1/chat/completions":  # that one is vLLM's, once it can
        assert preflight.status == 200, "else the browser does not send the request"
        assert preflight.headers["access-control-allow-origin"] == ORIGIN
        assert "POST" in preflight.headers["access-control-allow-methods"]
        assert "authorization" in preflight.headers["access-control-allow-headers"]


def test_an_origin_that_vllm_would_not_allow_is_not_allowed() -> None:
    bench = dressed(State.BOUND, None, AnswerHeaders())
    call = asyncio.run(bench.ask("/v1/x", "POST", headers=BROWSER))
    assert call.status == 503
    assert "access-control-allow-origin" not in call.headers
    assert "x-request-id" not in call.headers
    assert asyncio.run(bench.ask("/v1/x", "OPTIONS", headers=PREFLIGHT)).status == 400


def test_a_request_id_comes_back() -> None:
    headers = [(b"x-request-id", b"mine")]
    call = asyncio.run(dressed(State.BOUND, None).ask("/v1/x", "POST", headers=headers))
    assert call.headers["x-request-id"] == "mine"


def test_vllms_answers_get_no_header_twice() -> None:
    call = asyncio.run(dressed(State.READY, engine_app).ask("/v1/x", headers=BROWSER))
    assert (call.body, call.headers) == (b"app", {})


def test_a_request_that_is_cut_gets_them_too() -> None:
    async def main() -> Call:
        bench = dressed(State.READY, SlowApp(start=None))
        call = bench.call("/v1/completions", "POST", headers=BROWSER)
        task = await started(call)
        await bench.gate.cut()
        return await task

    call = run_virtual(main())
    assert (call.status, call.headers["access-control-allow-origin"]) == (503, ORIGIN)
    assert call.headers["x-request-id"]


def test_the_headers_follow_vllms_arguments() -> None:
    """Also of a version that lacks a flag, and of `*` with credentials, which CORS forbids."""
    given = {
        "allowed_origins": ["*"],
        "allowed_methods": ["GET"],
        "allow_credentials": True,
        "enable_request_id_headers": True,
    }
    assert AnswerHeaders.of(given) == AnswerHeaders(("*",), ("GET",), ("*",), True, True)
    bench = dressed(State.BOUND, None, AnswerHeaders.of(given))
    call = asyncio.run(bench.ask("/v1/x", headers=[*BROWSER, (b"cookie", b"a=b")]))
    assert call.headers["access-control-allow-origin"] == ORIGIN
    assert call.headers["access-control-allow-credentials"] == "true"


# --- counting


class SlowApp:
    """Waits in the middle of each answer until it is let go, then ends as it is told."""

    def __init__(self, start: Message | None = START, error: BaseException | None = None) -> None:
        self.go = asyncio.Event()
        self.start = start
        self.error = error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.start is not None:
            await send(self.start)
            await send({"type": "http.response.body", "body": b"part", "more_body": True})
        await self.go.wait()
        if self.error is not None:
            raise self.error
        await send({"type": "http.response.body", "body": b"rest"})


@pytest.mark.parametrize("error", [None, RuntimeError("app"), ConnectionResetError("client")])
def test_requests_are_counted_until_they_end(error: BaseException | None) -> None:
    """However they end: drained() returns only then, and the app's errors reach the server."""

    async def main() -> None:
        app = SlowApp(error=error)
        bench = Bench(State.READY, app)
        await asyncio.wait_for(bench.gate.drained(), 1)
        tasks = [await started(bench.call("/v1/completions", "POST")) for _ in range(3)]
        assert bench.gate.in_flight == 3
        drained = asyncio.create_task(bench.gate.drained())
        await asyncio.sleep(0)
        assert not drained.done()
        app.go.set()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(end is error for end in ends) if error else all(map(passed_rest, ends))
        assert bench.gate.in_flight == 0
        await drained

    run_virtual(main())


def passed_rest(call: Any) -> bool:
    return isinstance(call, Call) and call.body == b"partrest"


def test_a_client_that_goes_away_is_not_counted_for_ever() -> None:
    """The app sees the disconnect, ends, and the request is no longer in flight."""
    seen: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(START)
        while (await receive())["type"] != "http.disconnect":
            pass
        seen.append("disconnect")

    bench = Bench(State.READY, app)
    asyncio.run(bench.ask("/v1/completions", "POST", incoming=[EMPTY, DISCONNECT]))
    assert (seen, bench.gate.in_flight) == (["disconnect"], 0)


def test_only_requests_to_the_app_are_counted() -> None:
    """Not our own routes, not refusals: neither may hold up a drain."""

    async def main() -> None:
        app = SlowApp()
        bench = Bench(State.SERVING, app)
        tasks = [await started(bench.call("/v1/completions", "POST", incoming=[]))]
        bench.gate._own_app = app
        tasks.append(await started(bench.call("/lifecycle/events")))
        assert bench.gate.in_flight == 0
        await asyncio.wait_for(bench.gate.drained(), 1)
        app.go.set()
        await asyncio.gather(*tasks)

    run_virtual(main())


# --- cutting


def cut_while(state: State, *apps: App, kind: str = "http") -> list[Call]:
    """One request to each app is under way; the state changes; all are cut."""

    async def main() -> list[Call]:
        bench = Bench(State.READY)
        calls, tasks = [], []
        for app in apps:
            bench.gate.app = app
            calls.append(bench.call("/v1/completions", "POST", kind=kind))
            tasks.append(await started(calls[-1]))
        assert bench.gate.in_flight == len(apps)
        bench.snapshot = Snapshot(state, NOW, 0.0)
        await asyncio.wait_for(bench.gate.cut(), 1)
        assert bench.gate.in_flight == 0
        await asyncio.wait(tasks)
        assert [task.cancelled() for task in tasks] == [False] * len(tasks)
        assert [task.cancelling() for task in tasks] == [0] * len(tasks)
        assert [task.result() for task in tasks] == calls, "to the server each has ended well"
        return calls

    return run_virtual(main())


@pytest.mark.parametrize("state", [State.DEGRADED, State.STOPPING])
def test_a_request_without_an_answer_is_cut_by_503(state: State) -> None:
    (call,) = cut_while(state, SlowApp(start=None))
    assert_refused(call, state)
    assert call.error["message"].startswith("The request was cut: ")


def test_an_event_stream_is_cut_by_an_error_event() -> None:
    """Its status was sent long ago; the last event is the error, and the body is complete."""
    (call,) = cut_while(State.STOPPING, SlowApp(start=STREAM))
    assert [message["type"] for message in call.sent].count("http.response.start") == 1
    last = call.sent[-1]
    assert last["more_body"] is False
    assert last["body"].startswith(b"data: ") and last["body"].endswith(b"\n\n")
    error = json.loads(last["body"].removeprefix(b"data: "))["error"]
    assert (error["code"], error["state"]) == (503, "STOPPING")


def test_any_other_answer_is_cut_without_an_end() -> None:
    """Nothing more is sent: the server then closes the connection, which no client takes for a
    complete answer."""
    (call,) = cut_while(State.STOPPING, SlowApp())
    assert call.sent[-1] == {"type": "http.response.body", "body": b"part", "more_body": True}


def test_what_runs_on_after_its_stream_has_ended_is_cut_in_silence() -> None:
    """Such as an app's background task: a second end would be an error of the protocol."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(STREAM)
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})
        await asyncio.Event().wait()

    (call,) = cut_while(State.STOPPING, app)
    assert len(call.sent) == 2


def test_a_websocket_is_cut_by_a_close_of_its_own_protocol() -> None:
    (call,) = cut_while(State.STOPPING, SlowApp(start=None), kind="websocket")
    assert [(message["type"], message["code"]) for message in call.sent] == [
        ("websocket.close", 1013)
    ]


def test_a_cut_ends_all_kinds_at_once() -> None:
    calls = cut_while(State.STOPPING, SlowApp(start=None), SlowApp(start=STREAM), SlowApp())
    assert [len(call.sent) for call in calls] == [2, 3, 2]


def test_a_cut_with_nothing_in_flight_returns_at_once() -> None:
    async def main() -> None:
        await asyncio.wait_for(Bench(State.STOPPING).gate.cut(), 1)

    run_virtual(main())


def test_a_cut_waits_for_an_app_that_cleans_up() -> None:
    """It returns when the last request has ended, not when it has been told to."""
    ended_at: list[float] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(3)
            ended_at.append(asyncio.get_running_loop().time())

    async def main() -> float:
        bench = Bench(State.READY, app)
        task = await started(bench.call("/v1/completions", "POST"))
        await bench.gate.cut()
        done_at = asyncio.get_running_loop().time()
        await task
        return done_at

    assert run_virtual(main()) == ended_at[0] == 3


def test_a_cancellation_that_is_no_cut_propagates() -> None:
    """The server's own: it is neither answered nor swallowed, and the request is not counted."""

    async def main() -> None:
        bench = Bench(State.READY, SlowApp(start=None))
        call = bench.call("/v1/completions", "POST")
        task = await started(call)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (call.sent, bench.gate.in_flight) == ([], 0)

    run_virtual(main())


# --- refusing


@pytest.mark.parametrize("incoming", [[{**EMPTY, "more_body": True}], [EMPTY], []])
def test_a_refusal_does_not_wait_for_the_body(incoming: list[Message]) -> None:
    """The server discards what comes of it, however much or slowly (test_http_connection)."""
    call = asyncio.run(Bench(State.BOUND, None).ask("/v1/completions", "POST", incoming=incoming))
    assert_refused(call, State.BOUND)
    assert call.received == 0


@pytest.mark.parametrize(("method", "path"), [CHAT, MODELS, HEALTH])
def test_one_connection_too_many_gets_only_what_is_cheap(method: str, path: str) -> None:
    """While each of the others has an answer under way; probes get in."""
    bench = Bench(State.READY)
    call = bench.call(path, method)
    call.scope["state"] = {CROWDED: True}
    asyncio.run(call.run())
    if method == "GET":
        assert passed(call)
    else:
        assert (call.status, call.headers["retry-after"]) == (503, "7")
        assert call.headers["connection"] == "close"
        assert "more connections" in call.error["message"]


# --- other protocols


@pytest.mark.parametrize(
    ("state", "app"),
    [(State.READY, None), *[(s, engine_app) for s in State if s is not State.READY]],
)
def test_a_websocket_is_refused_with_try_again_later(state: State, app: App | None) -> None:
    connect: Message = {"type": "websocket.connect"}
    call = asyncio.run(Bench(state, app).ask("/v1/realtime", incoming=[connect], kind="websocket"))
    (close,) = call.sent
    assert (close["type"], close["code"]) == ("websocket.close", 1013)
    assert state.value in close["reason"]
    assert call.received == 1, "the handshake comes first"


def test_a_websocket_passes_when_ready_and_is_counted() -> None:
    async def main() -> None:
        app = SlowApp(start=None)
        bench = Bench(State.READY, app)
        task = await started(bench.call("/v1/realtime", kind="websocket"))
        assert bench.gate.in_flight == 1
        app.go.set()
        await task
        assert bench.gate.in_flight == 0

    asyncio.run(main())


def test_a_lifespan_is_not_passed_on() -> None:
    """The app's start-up and shut-down are the lifecycle's to run (uvicorn_server)."""
    call = asyncio.run(Bench(State.READY).ask("", kind="lifespan"))
    assert call.sent == []


# --- what administers the engine


def held(bench: Bench, release: asyncio.Event) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await release.wait()
        await answer(send, b"app")

    bench.gate.app = app


@pytest.mark.parametrize("state", [State.READY, State.DEGRADED])
@pytest.mark.parametrize("root", ["", "/api"])
def test_an_administrators_request_is_known_while_it_is_under_way(state: State, root: str) -> None:
    async def scenario() -> None:
        bench, release = Bench(state), asyncio.Event()
        bench.gate.root_path = root
        held(bench, release)
        began_s = asyncio.get_running_loop().time()
        assert bench.gate.admin_request(began_s + 1) == ""
        first = await started(bench.call(f"{root}/stop_profile", "POST"))
        second = await started(bench.call("/collective_rpc", "POST"))
        assert bench.gate.admin_request(began_s + 60) == "POST /stop_profile"
        assert bench.gate.admin_request(began_s - 1) == "", "it began after that"
        release.set()
        await asyncio.gather(first, second)
        assert bench.gate.admin_request(began_s + 60) == ""

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("method", "path"),
    [
        *[CHAT, MODELS, ("POST", "/pooling"), ("GET", "/stop_profile")],
        *[("POST", path) for path in ("/v1/stop_profile", "/x/../stop_profile")],
    ],
)
def test_no_other_request_passes_for_one(method: str, path: str) -> None:
    async def scenario() -> None:
        bench, release = Bench(State.READY), asyncio.Event()
        held(bench, release)
        task = await started(bench.call(path, method))
        assert bench.gate.in_flight == 1
        assert bench.gate.admin_request(asyncio.get_running_loop().time() + 60) == ""
        release.set()
        await task

    asyncio.run(scenario())


# --- what goes on in the background


def test_a_drain_waits_for_what_goes_on_in_the_background() -> None:
    """And for what that leaves behind; meanwhile its answer can be asked for, and nothing else."""

    async def scenario() -> None:
        bench, release = Bench(State.READY), asyncio.Event()
        bench.background = [asyncio.create_task(release.wait()) for _ in range(2)]
        assert bench.gate.in_flight == 2
        bench.snapshot = replace(bench.snapshot, state=State.STOPPING)
        drained = asyncio.create_task(bench.gate.drained())
        done, _ = await asyncio.wait({drained}, timeout=0.05)
        assert not done
        assert passed(await bench.ask("/v1/responses/resp_1"))
        for path, method in (("/v1/responses", "POST"), ("/v1/models", "GET")):
            assert_refused(await bench.ask(path, method), State.STOPPING)
        assert_refused(await bench.ask("/v1/responses/resp_1", "POST"), State.STOPPING)
        release.set()
        await drained
        assert bench.gate.in_flight == 0
        assert_refused(await bench.ask("/v1/responses/resp_1"), State.STOPPING)

    asyncio.run(scenario())


def test_a_cut_ends_what_goes_on_in_the_background() -> None:
    async def scenario() -> None:
        bench = Bench(State.READY)
        bench.background = [asyncio.create_task(asyncio.Event().wait())]
        await bench.gate.cut()
        assert bench.background[0].cancelled()
        await bench.gate.drained()

    asyncio.run(scenario())
