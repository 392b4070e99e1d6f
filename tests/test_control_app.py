"""The control plane's routes: who may do what, what each answers, and that none answers worse."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import httpx
import pytest
from stand_ins import NOON, FakeIdentity, FakeLife

from ichat_lifecycle.control.app import READ_ONLY_PATHS, EngineDesk, build_control_app
from ichat_lifecycle.control.desk import LoopDesk
from ichat_lifecycle.control.events import Bell, Events
from ichat_lifecycle.control.http import BODY_LIMIT
from ichat_lifecycle.errors import (
    CommandFailed,
    DeadlineError,
    EngineNotUp,
    LifecycleError,
    TransitionRefused,
)
from ichat_lifecycle.journal import Kind, Reason, Snapshot, TransitionRecord
from ichat_lifecycle.states import State, Trigger

TOKEN = "right-token"
RIGHT = {"Authorization": f"Bearer {TOKEN}"}
WRONG = {"Authorization": "Bearer wrong-token"}

COMMANDS = {
    "/lifecycle/restart": ("restart", None, 202),
    "/lifecycle/engine/sleep": ("sleep", 1, 200),
    "/lifecycle/engine/wake": ("wake", None, 200),
    "/lifecycle/engine/reset-prefix-cache": ("reset_prefix_cache", None, 200),
}
POSTS = ("/lifecycle/stop", *COMMANDS)


@dataclass
class FakeDesk:
    """Remembers what was asked of it; `error` is raised by the next call."""

    asked: list[Any] = field(default_factory=list)
    error: Exception | None = None
    report: dict[str, Any] = field(default_factory=lambda: {"max_model_len": 512})

    async def describe(self) -> Mapping[str, Any]:
        self._take("describe")
        return self.report

    async def command(self, name: str, argument: Any) -> None:
        self._take((name, argument))

    async def stop(self, now: bool) -> None:
        self._take(("stop", now))

    def _take(self, what: Any) -> None:
        self.asked.append(what)
        if self.error is not None:
            raise self.error


class Bench:
    """An app over fakes, and requests to it without a network."""

    def __init__(self, state: State = State.READY, **options: Any) -> None:
        self.life = FakeLife(Snapshot(state, NOON, 1.0))
        self.identity = FakeIdentity("演示")
        self.raising = True
        self.desk = FakeDesk()
        bell = Bell()
        bell.close()  # so that a stream ends at once
        self.options: dict[str, Any] = {
            "token": TOKEN,
            "engine": self.desk,
            "events": Events(self.life.journal, "5eed", bell),
            **options,
        }
        self.app = build_control_app(self.life, self.identity, **self.options)

    def ask(self, method: str, path: str, **request: Any) -> httpx.Response:
        return asyncio.run(self._ask(method, path, **request))

    async def _ask(self, method: str, path: str, **request: Any) -> httpx.Response:
        # Raising: what gets past the handlers is answered too, but logged with a traceback.
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=self.raising)
        async with httpx.AsyncClient(transport=transport, base_url="http://control") as client:
            return await client.request(method, path, **request)


def error_of(response: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"code", "message", "hint"}
    assert "Traceback" not in response.text
    return error


# --- reads


def test_the_lifecycle_is_shown_to_anybody_and_never_cached() -> None:
    response = Bench().ask("GET", "/lifecycle")
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    assert response.headers["cache-control"] == "no-store"
    assert (response.json()["state"], response.json()["model"]) == ("READY", "演示")
    assert "演示" in response.text, "names are readable with curl"


def test_the_history_takes_up_where_a_client_left() -> None:
    bench = Bench()
    for seq in (1, 2):
        bench.life.journal.add(
            Kind.TRANSITION,
            TransitionRecord(seq, Trigger.BIND, State.PARSED, State.BOUND, NOON, 1.0, 0.1, None),
        )
    assert [t["seq"] for t in bench.ask("GET", "/lifecycle/history").json()["transitions"]] == [
        1,
        2,
    ]
    after = bench.ask("GET", "/lifecycle/history?after=1").json()["transitions"]
    assert [t["seq"] for t in after] == [2]


def test_the_diagram_shows_the_way() -> None:
    bench = Bench(State.BOUND)
    record = TransitionRecord(1, Trigger.BIND, State.PARSED, State.BOUND, NOON, 1.0, 0.1, None)
    bench.life.journal.add(Kind.TRANSITION, record)
    image = bench.ask("GET", "/lifecycle/diagram")
    assert image.headers["content-type"] == "image/svg+xml"
    assert "The worker is BOUND" in image.text
    text = bench.ask("GET", "/lifecycle/diagram?format=mermaid")
    assert text.headers["content-type"].startswith("text/plain")
    assert "PARSED --> BOUND: bind (1)" in text.text
    wrong = bench.ask("GET", "/lifecycle/diagram?format=png")
    assert wrong.status_code == 400
    assert "format" in error_of(wrong)["message"]


@pytest.mark.parametrize("after", ["-1", "x", "1.5", ""])
def test_a_wrong_after_is_a_clear_error(after: str) -> None:
    response = Bench().ask("GET", f"/lifecycle/history?after={after}")
    assert response.status_code == 400
    assert "after" in error_of(response)["message"]


@pytest.mark.parametrize(
    ("state", "statuses"),
    [
        (State.PARSED, (200, 503, 503)),
        (State.READY, (200, 200, 503)),
        (State.DEGRADED, (200, 503, 503)),
        (State.STOPPED, (503, 503, 503)),
    ],
)
def test_the_probes_answer_with_the_state(state: State, statuses: tuple[int, ...]) -> None:
    bench = Bench(state)
    for path, status in zip(("/livez", "/readyz", "/startupz"), statuses, strict=True):
        response = bench.ask("GET", path)
        assert (path, response.status_code) == (path, status)
        assert response.json()["state"] == state.value
        assert ("retry-after" in response.headers) is (status == 503)
        if status == 503:
            assert int(response.headers["retry-after"]) >= 1


def test_the_reason_of_a_worker_is_in_its_probes() -> None:
    bench = Bench(State.DEGRADED)
    bench.life.snapshot = Snapshot(State.DEGRADED, NOON, 1.0, reason=Reason("asleep", "it sleeps"))
    assert bench.ask("GET", "/readyz").json()["reason"]["code"] == "asleep"


@pytest.mark.parametrize("path", READ_ONLY_PATHS)
def test_every_read_answers_head_like_get(path: str) -> None:
    bench = Bench()
    assert bench.ask("HEAD", path).status_code == bench.ask("GET", path).status_code


def test_the_engine_describes_itself() -> None:
    bench = Bench()
    bench.desk.report = {"max_model_len": 512, "kv": {"bytes": float("inf")}}
    response = bench.ask("GET", "/lifecycle/engine")
    assert response.status_code == 200
    assert response.json() == {"state": "READY", "max_model_len": 512, "kv": {"bytes": "inf"}}


@pytest.mark.parametrize("state", State)
def test_the_engine_is_asked_only_while_there_is_one(state: State) -> None:
    bench = Bench(state)
    response = bench.ask("GET", "/lifecycle/engine")
    if state in (State.ENGINE_UP, State.SERVING, State.READY, State.DEGRADED):
        assert response.status_code == 200
    else:
        assert response.status_code == 503
        assert response.json()["state"] == state.value
        assert int(response.headers["retry-after"]) >= 1
        assert error_of(response)["code"] == "engine_not_up"
        assert bench.desk.asked == []


@pytest.mark.parametrize("error", [EngineNotUp("gone"), CommandFailed("NoneType"), TimeoutError()])
def test_an_engine_that_ends_during_the_question_is_not_up(error: Exception) -> None:
    bench = Bench(State.READY)

    class Ending:
        async def describe(self) -> Mapping[str, Any]:
            bench.life.snapshot = Snapshot(State.BOUND, NOON, 1.0)
            raise error

    bench.app = build_control_app(bench.life, bench.identity, engine=cast(EngineDesk, Ending()))
    response = bench.ask("GET", "/lifecycle/engine")
    assert response.status_code == 503
    assert response.json()["state"] == "BOUND"
    assert int(response.headers["retry-after"]) >= 1
    assert error_of(response)["code"] == "engine_not_up"


def test_a_path_with_bytes_that_are_no_text_is_still_shown() -> None:
    bench = Bench()
    bench.identity.arguments = {"model": "/models/\udcff"}
    response = bench.ask("GET", "/lifecycle")
    assert response.json()["arguments"] == {"model": "/models/?"}


# --- commands, and who may give them


@pytest.mark.parametrize("path", COMMANDS)
def test_a_command_reaches_the_desk_and_answers_with_the_lifecycle(path: str) -> None:
    bench = Bench()
    name, argument, status = COMMANDS[path]
    response = bench.ask("POST", path, headers=RIGHT)
    assert response.status_code == status
    assert response.json()["state"] == "READY"
    assert bench.desk.asked == [(name, argument)]


@pytest.mark.parametrize(
    ("body", "now"),
    [(b"", False), (b"{}", False), (b'{"now": false}', False), (b' {"now": true} ', True)],
)
def test_a_stop_is_graceful_unless_asked_otherwise(body: bytes, now: bool) -> None:
    bench = Bench()
    response = bench.ask("POST", "/lifecycle/stop", headers=RIGHT, content=body)
    assert response.status_code == 202
    assert bench.desk.asked == [("stop", now)]


@pytest.mark.parametrize(
    "body",
    [b"now", b"[]", b'{"now": "yes"}', b'{"now": 1}', b'{"Now": true}', b"[" * 60000, b"\xff"],
)
def test_a_stop_that_is_not_understood_stops_nothing(body: bytes) -> None:
    bench = Bench()
    response = bench.ask("POST", "/lifecycle/stop", headers=RIGHT, content=body)
    assert response.status_code == 400
    assert error_of(response)["code"] == "bad_request"
    assert bench.desk.asked == []


@pytest.mark.parametrize(("level", "status"), [("0", 200), ("2", 200), ("3", 400), ("x", 400)])
def test_the_level_of_a_sleep(level: str, status: int) -> None:
    bench = Bench()
    response = bench.ask("POST", f"/lifecycle/engine/sleep?level={level}", headers=RIGHT)
    assert response.status_code == status
    assert bench.desk.asked == ([("sleep", int(level))] if status == 200 else [])


@pytest.mark.parametrize(
    "headers",
    [
        {},
        WRONG,
        {"Authorization": TOKEN},
        {"Authorization": f"Basic {TOKEN}"},
        {"Authorization": "Bearer "},
        {"Authorization": f"Bearer {TOKEN}x"},
        {"Authorization": f"Bearer {TOKEN[:-1]}"},
    ],
)
@pytest.mark.parametrize("path", POSTS)
def test_without_the_token_nothing_is_done(path: str, headers: dict[str, str]) -> None:
    bench = Bench()
    response = bench.ask("POST", path, headers=headers)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert TOKEN not in response.text
    assert bench.desk.asked == []


@pytest.mark.parametrize("token", [None, ""])
@pytest.mark.parametrize("path", POSTS)
def test_a_worker_without_a_token_takes_no_commands(path: str, token: str | None) -> None:
    bench = Bench(token=token)
    response = bench.ask("POST", path, headers={"Authorization": "Bearer "})
    assert response.status_code == 403
    assert "--control-token" in str(error_of(response)["hint"])
    assert bench.desk.asked == []


def test_the_token_is_asked_for_before_anything_else_is_looked_at() -> None:
    bench = Bench()
    wrong = bench.ask("POST", "/lifecycle/engine/sleep?level=9", headers=WRONG)
    assert wrong.status_code == 401
    assert bench.ask("POST", "/lifecycle/stop", content=b"now").status_code == 401


def test_a_token_may_hold_any_characters() -> None:
    bench = Bench(token="令牌")
    headers = [(b"Authorization", "bearer 令牌".encode())]
    assert bench.ask("POST", "/lifecycle/engine/wake", headers=headers).status_code == 200


# --- errors


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (TransitionRefused("not now", hint="later"), 409, "transition_refused"),
        (CommandFailed("sleep failed: no such mode", hint="later"), 502, "command_failed"),
        (LifecycleError("other", hint="later"), 502, "lifecycle_error"),
        (DeadlineError("sleep took longer", hint="later"), 504, "deadline_exceeded"),
        (EngineNotUp("there is no engine", hint="later"), 503, "engine_not_up"),
        (TimeoutError("sleep: no answer"), 504, "timeout"),
        (TimeoutError(), 504, "timeout"),
        (KeyError("secret-inside"), 500, "internal_error"),
    ],
)
@pytest.mark.parametrize("path", [*POSTS, "/lifecycle/engine"])
def test_every_failure_of_the_desk_is_an_answer(
    path: str, error: Exception, status: int, code: str
) -> None:
    bench = Bench()
    bench.desk.error = error
    bench.raising = status != 500  # a fault of ours belongs into the log as well
    response = bench.ask("GET" if path == "/lifecycle/engine" else "POST", path, headers=RIGHT)
    assert response.status_code == status
    shown = error_of(response)
    assert (shown["code"], bool(shown["message"]), bool(shown["hint"])) == (code, True, True)
    assert "secret-inside" not in response.text


@pytest.mark.parametrize(
    "error",
    [CommandFailed("no s3cret", hint="ask s3cret"), TimeoutError("s3cret is late")],
)
def test_an_error_of_the_engine_has_no_secrets(error: Exception) -> None:
    """It may quote anything that the engine was given."""
    bench = Bench(scrub=lambda text: text.replace("s3cret", "***"))
    bench.desk.error = error
    for method, path in (("GET", "/lifecycle/engine"), ("POST", "/lifecycle/engine/wake")):
        answer = bench.ask(method, path, headers=RIGHT)
        assert answer.is_error
        assert "s3cret" not in answer.text
        assert "***" in error_of(answer)["message"]


@pytest.mark.parametrize("path", ["/", "/nope", "/lifecycle/", "/lifecycle/nope", "/docs/x"])
def test_an_unknown_path_is_told_the_known_ones(path: str) -> None:
    response = Bench().ask("GET", path)
    assert response.status_code == 404
    assert error_of(response)["code"] == "not_found"
    known = {*(f"GET {path}" for path in READ_ONLY_PATHS), *(f"POST {path}" for path in POSTS)}
    assert set(response.json()["routes"]) == known


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/lifecycle"), ("GET", "/lifecycle/stop"), ("DELETE", "/livez"), ("PUT", "/readyz")],
)
def test_a_wrong_method_changes_nothing(method: str, path: str) -> None:
    bench = Bench()
    response = bench.ask(method, path, headers=RIGHT)
    assert response.status_code == 405
    assert response.headers["allow"]
    assert error_of(response)["code"] == "method_not_allowed"
    assert bench.desk.asked == []


def test_the_read_only_app_has_no_commands_and_no_pages() -> None:
    bench = Bench(read_only=True)
    for path in POSTS:
        assert bench.ask("POST", path, headers=RIGHT).status_code in (404, 405)
    for path in ("/docs", "/redoc", "/openapi.json"):
        assert bench.ask("GET", path).status_code == 404
    assert all(route.startswith("GET ") for route in bench.ask("GET", "/").json()["routes"])
    for path in READ_ONLY_PATHS:
        assert bench.ask("GET", path).status_code != 404
    assert bench.desk.asked == ["describe"]


def test_the_app_describes_itself_where_it_has_commands() -> None:
    paths = Bench().ask("GET", "/openapi.json").json()["paths"]
    assert set(paths) == {*READ_ONLY_PATHS, *POSTS}


def test_without_a_desk_only_reads_are_left() -> None:
    bench = Bench(engine=None)
    assert bench.ask("GET", "/lifecycle").status_code == 200
    assert bench.ask("GET", "/lifecycle/engine").status_code == 404
    assert bench.ask("POST", "/lifecycle/stop", headers=RIGHT).status_code == 404


# --- bodies


class Chunks:
    """A body without an announced size, which counts what was taken of it."""

    taken = 0

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for _ in range(1000):
            self.taken += 1
            yield b" " * 10_000


@pytest.mark.parametrize("path", POSTS)
def test_an_endless_body_is_refused_early_and_nothing_is_done(path: str) -> None:
    bench, body = Bench(), Chunks()
    response = bench.ask("POST", path, headers=RIGHT, content=body)
    assert response.status_code == 413
    assert response.headers["connection"] == "close"
    assert body.taken <= BODY_LIMIT // 10_000 + 2
    assert bench.desk.asked == []


@pytest.mark.parametrize("path", ["/lifecycle/stop", "/livez", "/nope"])
def test_a_body_announced_as_too_large_is_not_read_at_all(path: str) -> None:
    bench, body = Bench(), Chunks()
    headers = {**RIGHT, "Content-Length": str(BODY_LIMIT + 1)}
    response = bench.ask("POST", path, headers=headers, content=body)
    assert response.status_code == 413
    assert response.headers["connection"] == "close"
    assert error_of(response)["code"] == "body_too_large"
    assert body.taken == 0


def test_a_body_of_just_the_limit_is_taken() -> None:
    bench = Bench()
    body = b'{"now": true}'.ljust(BODY_LIMIT)
    response = bench.ask("POST", "/lifecycle/stop", headers=RIGHT, content=body)
    assert response.status_code == 202


def test_a_request_that_ends_in_its_body_does_nothing() -> None:
    bench = Bench()
    events = iter(
        [
            {"type": "http.request", "body": b'{"now"', "more_body": True},
            {"type": "http.disconnect"},
        ]
    )
    sent: list[Any] = []

    async def receive() -> Any:
        return next(events)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/lifecycle/stop",
        "query_string": b"",
        "headers": [(b"authorization", RIGHT["Authorization"].encode())],
    }
    asyncio.run(bench.app(scope, receive, send))
    assert sent[0]["status"] == 400
    assert json.loads(sent[1]["body"])["error"]["code"] == "bad_request"
    assert bench.desk.asked == []


# --- the desk between two loops


def others() -> set[asyncio.Task[Any]]:
    return {task for task in asyncio.all_tasks() if task is not asyncio.current_task()}


class MainLoop:
    """A worker's loop in a thread of its own, with a lifecycle and an engine that live on it."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.complaints: list[dict[str, Any]] = []
        self.loop.set_exception_handler(lambda _, context: self.complaints.append(context))
        self.thread = threading.Thread(target=self.loop.run_forever, name="fake-main")
        self.threads: list[str] = []
        self.stops: list[tuple[str, bool]] = []
        self.commands: list[tuple[str, Any]] = []
        self.cancelled = threading.Event()
        self.hang = False
        self.alive = True
        self.bounds_s: dict[str, float] = {}
        self.error: BaseException | None = None
        self.running = self.most_running = 0

    def ask_to_stop(self, cause: str, *, now: bool = False) -> None:
        self.stops.append((cause, now))

    async def command(self, name: str, argument: Any = None) -> None:
        self.commands.append((name, argument))
        await self._work()

    def command_bound_s(self, name: str) -> float:
        return self.bounds_s.get(name, 60.0)

    async def describe(self) -> Mapping[str, Any]:
        await self._work()
        return {"max_model_len": 512}

    async def _work(self) -> None:
        self.threads.append(threading.current_thread().name)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await asyncio.sleep(0)
            if self.error is not None:
                raise self.error
            if self.hang:
                await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        finally:
            self.running -= 1

    def call(self, function: Callable[[], Any]) -> None:
        self.loop.call_soon_threadsafe(function)

    def tasks(self) -> set[asyncio.Task[Any]]:
        async def look() -> set[asyncio.Task[Any]]:
            return others()

        return asyncio.run_coroutine_threadsafe(look(), self.loop).result(10)

    def end(self) -> None:
        """As asyncio.run() ends a loop: every task is cancelled first."""
        if self.loop.is_closed():
            return

        async def cancel_all() -> None:
            tasks = others()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(cancel_all(), self.loop).result(10)
        self.call(self.loop.stop)
        self.thread.join(10)
        self.loop.close()


@contextmanager
def main_loop() -> Iterator[MainLoop]:
    main = MainLoop()
    main.thread.start()
    try:
        yield main
    finally:
        main.end()
    assert main.complaints == []


def desk_for(main: MainLoop, **timeouts: float) -> LoopDesk:
    return LoopDesk(main, main, lambda: main.loop, **timeouts)


def test_work_is_done_on_the_main_loop_and_its_outcome_comes_back() -> None:
    async def scenario(main: MainLoop) -> None:
        desk: EngineDesk = desk_for(main)
        assert await desk.describe() == {"max_model_len": 512}
        await desk.command("sleep", 2)
        await desk.stop(True)

    with main_loop() as main:
        asyncio.run(scenario(main))
        assert main.commands == [("sleep", 2)]
        assert main.stops == [("POST /lifecycle/stop", True)]
        assert set(main.threads) == {"fake-main"}


@pytest.mark.parametrize("what", ["describe", "command"])
def test_what_takes_too_long_is_withdrawn_on_the_main_loop(what: str) -> None:
    async def scenario(main: MainLoop) -> None:
        main.bounds_s["sleep"] = 0.05
        desk = desk_for(main, describe_timeout_s=0.05)
        with pytest.raises(TimeoutError, match=r"no answer within 0\.05 s"):
            await (desk.describe() if what == "describe" else desk.command("sleep", 1))

    with main_loop() as main:
        main.hang = True
        asyncio.run(scenario(main))
        assert main.cancelled.wait(10)
        assert main.tasks() == set()


@pytest.mark.parametrize("alive", [True, False])
def test_an_engine_that_goes_away_during_a_question_is_not_there(alive: bool) -> None:
    """What fails inside of it then, such as a client that is None by now, is not the answer."""

    async def scenario(main: MainLoop) -> None:
        with pytest.raises(CommandFailed if alive else EngineNotUp):
            await desk_for(main).describe()

    with main_loop() as main:
        main.error, main.alive = AttributeError("'NoneType' object has no attribute"), alive
        asyncio.run(scenario(main))


def test_a_blocked_main_loop_costs_only_the_deadline_and_is_asked_nothing_late() -> None:
    async def scenario(main: MainLoop) -> None:
        desk = desk_for(main, describe_timeout_s=0.05)
        with pytest.raises(TimeoutError):
            await desk.describe()
        await desk.stop(False)  # does not wait

    with main_loop() as main:
        unblock = threading.Event()
        main.call(lambda: unblock.wait(10))
        try:
            asyncio.run(scenario(main))
        finally:
            unblock.set()
        assert main.tasks() == set()
        assert main.threads == [], "the question was withdrawn before it could be put"
        assert main.stops == [("POST /lifecycle/stop", False)]


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (TransitionRefused("not now"), TransitionRefused, "not now"),
        (CommandFailed("it failed"), CommandFailed, "it failed"),
        (KeyError("restart"), CommandFailed, "wake failed: 'restart'"),
        (RuntimeError(), CommandFailed, "wake failed: RuntimeError"),
        (TimeoutError("the engine's own"), TimeoutError, "the engine's own"),
    ],
)
def test_errors_come_back_as_ours(error: Exception, kind: type[Exception], text: str) -> None:
    with main_loop() as main:
        main.error = error
        with pytest.raises(kind) as caught:
            asyncio.run(desk_for(main).command("wake", None))
        assert str(caught.value) == text


@pytest.mark.parametrize("when", ["before run", "after its end", "while it does not run"])
def test_without_a_main_loop_everything_is_refused(when: str) -> None:
    async def scenario(desk: LoopDesk) -> None:
        text = "not started" if when == "before run" else "has ended"
        for call in (desk.describe(), desk.command("wake", None), desk.stop(False)):
            with pytest.raises(TransitionRefused, match=text):
                await call

    main = MainLoop()
    if when == "after its end":
        main.loop.close()
    asyncio.run(scenario(LoopDesk(main, main, lambda: None if when == "before run" else main.loop)))
    assert (main.stops, main.commands, main.threads) == ([], [], [])
    main.loop.close()


def test_a_worker_that_ends_meanwhile_refuses_rather_than_cancels() -> None:
    async def scenario(main: MainLoop) -> None:
        describing = asyncio.create_task(desk_for(main).describe())
        while not main.running:
            await asyncio.sleep(0.001)
        await asyncio.to_thread(main.end)
        with pytest.raises(TransitionRefused, match="has ended"):
            await describing

    with main_loop() as main:
        main.hang = True
        asyncio.run(scenario(main))


def test_a_loop_that_closes_first_leaves_nothing_unawaited() -> None:
    async def scenario(main: MainLoop) -> None:
        desk = desk_for(main, describe_timeout_s=0.05)
        blocked, unblock = threading.Event(), threading.Event()

        def block() -> None:
            blocked.set()
            unblock.wait(10)
            main.loop.stop()

        main.call(block)
        blocked.wait(10)
        describing = asyncio.create_task(desk.describe())
        await asyncio.sleep(0)  # the question is in the queue of a loop that will not come to it
        unblock.set()
        main.thread.join(10)
        main.loop.close()
        with pytest.raises(TimeoutError):
            await describing

    with main_loop() as main:
        asyncio.run(scenario(main))


def test_an_engine_is_asked_to_describe_itself_once_at_a_time() -> None:
    async def scenario(main: MainLoop) -> None:
        desk = desk_for(main)
        await asyncio.gather(*(desk.describe() for _ in range(20)))

    with main_loop() as main:
        asyncio.run(scenario(main))
        assert len(main.threads) == 20
        assert main.most_running == 1


def test_a_client_that_gives_up_takes_its_question_back() -> None:
    async def scenario(main: MainLoop) -> None:
        describing = asyncio.create_task(desk_for(main).describe())
        while not main.running:
            await asyncio.sleep(0.001)
        describing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await describing

    with main_loop() as main:
        main.hang = True
        asyncio.run(scenario(main))
        assert main.cancelled.wait(10)
        assert main.tasks() == set()
