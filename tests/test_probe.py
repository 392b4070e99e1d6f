"""The worker's questions to itself, against an app that answers as it is told."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.responses import JSONResponse
from structlog.testing import capture_logs

from ichat_lifecycle.adapters.inner_app import below_middleware
from ichat_lifecycle.adapters.probe import RANK_HEADER, SelfProbe, Target
from ichat_lifecycle.adapters.questions import request_for, shows_work
from ichat_lifecycle.config import WarmUp
from ichat_lifecycle.errors import ExitCode, StartError
from ichat_lifecycle.ports import Address

WARM_UP = WarmUp()
COMPLETION = {"id": "cmpl-1", "created": 1, "choices": [{"text": " world", "finish_reason": "x"}]}


@dataclass
class Service:
    """An app that answers as it is told, and notes what it is asked."""

    status: int = 200
    document: Any = field(default_factory=lambda: dict(COMPLETION))
    error: Exception | None = None
    tokenizer: bool = True
    asked: list[tuple[str, str]] = field(default_factory=list)
    bodies: list[Any] = field(default_factory=list)
    scope: dict[str, Any] = field(default_factory=dict)
    workers_asked: int = 0
    workers_error: Exception | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body += message["body"]
            more = message["more_body"]
        self.asked.append((scope["method"], scope["path"]))
        self.bodies.append(json.loads(body) if body else None)
        self.scope = dict(scope)
        if self.error is not None:
            raise self.error
        text = self.document if isinstance(self.document, str) else json.dumps(self.document)
        await send({"type": "http.response.start", "status": self.status, "headers": []})
        await send({"type": "http.response.body", "body": text.encode()})

    async def check_workers(self, rank: int = 0) -> None:
        self.workers_asked += 1
        if self.workers_error is not None:
            raise self.workers_error

    def probe(self, *tasks: str, address: Address | None = None, **more: Any) -> SelfProbe:
        target = Target(
            self,
            address or Address("127.0.0.1", 1),
            "demo",
            tasks or ("generate",),
            self.tokenizer,
            check_workers=self.check_workers,
            **more,
        )
        return SelfProbe(lambda: target, WARM_UP)


def run(scenario: Coroutine[Any, Any, Any]) -> Any:
    async def bounded() -> Any:
        async with asyncio.timeout(60):
            return await scenario

    return asyncio.run(bounded())


async def with_listener(use: Callable[[Address], Coroutine[Any, Any, Any]], says: bytes) -> Any:
    """Something on loopback that says this to whoever connects, and closes."""

    async def say(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(says)
        writer.close()

    server = await asyncio.start_server(say, "127.0.0.1", 0)
    async with server:
        return await use(Address("127.0.0.1", server.sockets[0].getsockname()[1]))


# --- health


@pytest.mark.parametrize("status", [200, 204, 307, 500, 503])
def test_health_is_200_and_nothing_else_and_says_what_came_instead(status: int) -> None:
    service = Service(status=status, document="too hot")

    async def look(address: Address) -> None:
        found = await service.probe(address=address).health()
        assert found.passed is (status == 200)
        if status != 200:
            assert found.problem == f"/health got {status}: too hot"

    run(with_listener(look, b"HTTP/1.1 503 Service Unavailable\r\n"))
    assert service.asked == [("GET", "/health")]


@pytest.mark.parametrize("answer", [b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 401 Unauthorized\r\n"])
def test_any_answer_of_the_main_port_is_one(answer: bytes) -> None:
    async def look(address: Address) -> None:
        assert (await Service().probe(address=address).health()).passed

    run(with_listener(look, answer))


def test_a_main_port_that_is_not_served_is_not_healthy() -> None:
    """READY promises that clients can connect, however well the engine is."""

    async def look(address: Address) -> str:
        return (await Service().probe(address=address).health()).problem

    with socket.create_server(("127.0.0.1", 0)) as sock:
        nobody = Address("127.0.0.1", sock.getsockname()[1])
    assert "refused" in run(look(nobody)).lower()
    assert "without an answer" in run(with_listener(look, b""))
    assert "not HTTP" in run(with_listener(look, b"SSH-2.0-OpenSSH\r\n"))


def test_an_app_that_raises_or_is_missing_is_not_healthy() -> None:
    service = Service(error=RuntimeError("no engine"))
    assert "no engine" in run(service.probe().health()).problem
    target = Target(None, Address(), "demo", ("generate",))
    assert "no app" in run(SelfProbe(lambda: target, WARM_UP).health()).problem


# --- past what is outside


def test_no_middleware_of_the_outside_is_asked() -> None:
    """One wants a header, one refuses 127.0.0.1, one blocks: none of them says anything of the
    engine."""
    app = FastAPI(root_path="/api")
    met: list[str] = []

    class WantsHeader:
        def __init__(self, app: Any) -> None:
            self.app = app

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            met.append("class")
            await JSONResponse({"error": "who are you"}, 403)(scope, receive, send)

    async def refuse_loopback(request: Any, call_next: Any) -> Any:
        met.append("function")
        return JSONResponse({"error": "not from here"}, 403)

    app.add_middleware(WantsHeader)
    app.middleware("http")(refuse_loopback)

    async def health() -> dict[str, str]:
        return {}

    async def complete(body: dict[str, Any]) -> dict[str, Any]:
        return COMPLETION

    app.add_api_route("/health", health)
    app.add_api_route("/v1/completions", complete, methods=["POST"])

    async def look(address: Address) -> None:
        target = Target(below_middleware(app), address, "demo", ("generate",))
        probe = SelfProbe(lambda: target, WARM_UP)
        assert (await probe.health()).passed
        await probe.warm_up()
        await probe.canary()
        await probe.token()

    run(with_listener(look, b"HTTP/1.1 503 Service Unavailable\r\n"))
    assert met == []


def test_the_proxies_of_the_environment_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    service = Service()
    run(service.probe().warm_up())
    assert service.asked == [("POST", "/v1/completions")]


def test_requests_have_the_state_of_the_apps_start_up() -> None:
    service = Service()
    run(service.probe(state={"made": "at start-up"}).warm_up())
    assert service.scope["state"] == {"made": "at start-up"}


# --- which request


@pytest.mark.parametrize(
    ("tasks", "path", "keys"),
    [
        (("generate",), "/v1/completions", {"prompt", "max_tokens", "temperature", "seed"}),
        (("embed", "generate"), "/v1/completions", {"prompt", "max_tokens", "temperature", "seed"}),
        (("embed", "token_embed"), "/v1/embeddings", {"input"}),
        (("classify", "token_classify"), "/classify", {"input"}),
        (("token_embed",), "/pooling", {"input"}),
        (("token_classify",), "/pooling", {"input"}),
        (("encode", "score"), "/pooling", {"input"}),
        (("score",), "/score", {"text_1", "text_2"}),
    ],
)
def test_each_kind_of_model_has_a_request(
    tasks: tuple[str, ...], path: str, keys: set[str]
) -> None:
    """Greedy and small, by the API that this model has."""
    call = request_for(tasks, "demo", WarmUp(prompt="Hi", max_tokens=3))
    assert call is not None
    assert call[0] == path
    assert call[1].keys() == {"model", *keys}
    assert call[1]["model"] == "demo"
    assert "Hi" in call[1].values()
    if path == "/v1/completions":
        assert (call[1]["temperature"], call[1]["max_tokens"]) == (0.0, 3)


@pytest.mark.parametrize("tasks", [("generate",), ("embed",), ("classify",), ("token_embed",)])
def test_an_engine_without_a_tokenizer_is_asked_by_token_ids(tasks: tuple[str, ...]) -> None:
    """Small ones: vLLM 0.32 does not check them then, and one too large ends the engine."""
    call = request_for(tasks, "demo", WARM_UP, by_ids=True)
    assert call is not None
    ids = call[1].get("prompt") or call[1]["input"]
    assert ids
    assert all(isinstance(i, int) and 0 < i < 10 for i in ids)


@pytest.mark.parametrize(
    "tasks", [(), ("transcription",), ("render",), ("embed&token_classify",), ("plugin",)]
)
def test_a_model_without_a_small_request_is_not_warmed_up(tasks: tuple[str, ...]) -> None:
    assert request_for(tasks, "demo", WARM_UP) is None
    service = Service()
    target = Target(service, Address(), "demo", tasks, check_workers=service.check_workers)
    probe = SelfProbe(lambda: target, WARM_UP)
    with capture_logs() as logs:
        run(probe.warm_up())
        run(probe.canary())
    assert [entry["event"] for entry in logs] == ["warm_up_skipped"] * 2
    assert service.asked == []
    run(probe.token())
    assert service.workers_asked == 1, "its processes are asked all the same"


# --- warm-up and canary


@pytest.mark.parametrize(
    ("tasks", "document", "essence"),
    [
        ("generate", COMPLETION, [" world"]),
        ("generate", {"choices": [{"text": "", "token_ids": [5, 6]}]}, [[5, 6]]),
        ("embed", {"id": "x", "data": [{"embedding": [0.5]}]}, [{"embedding": [0.5]}]),
    ],
)
def test_the_first_warm_up_is_what_the_canary_expects(
    tasks: str, document: dict[str, Any], essence: Any
) -> None:
    """Without ids and times, which differ each time. A different answer is logged, not judged."""
    service = Service(document=document)
    other = {"data": [{"embedding": [1]}]} if tasks == "embed" else {"choices": [{"text": "x"}]}

    async def scenario() -> None:
        probe = service.probe(tasks)
        await probe.warm_up()
        assert probe.expected == essence
        with capture_logs() as logs:
            service.document = {**document, "id": "another", "created": 2}
            await probe.canary()
            assert logs == []
            service.document = other
            await probe.warm_up()
            assert probe.expected == essence
            await probe.canary()
        assert [entry["event"] for entry in logs] == ["canary_differs"]

    run(scenario())
    assert len(service.asked) == 4
    assert all(body == service.bodies[0] for body in service.bodies), "one and the same question"


@pytest.mark.parametrize("ask", ["warm_up", "canary"])
@pytest.mark.parametrize("status", [400, 404, 500, 503])
def test_an_answer_that_is_not_200_is_an_error(ask: str, status: int) -> None:
    """With the path, the status and the beginning of what the server said."""
    probe = Service(status, '{"error": "no such model"}' + "x" * 10_000).probe()
    with pytest.raises(StartError) as caught:
        run(getattr(probe, ask)())
    error = caught.value
    assert (error.code, error.exit_code) == ("warm_up_failed", ExitCode.ENGINE_START_FAILED)
    assert f"/v1/completions got {status}" in error.message
    assert (error.root_cause or "").startswith('{"error": "no such model"}')
    assert len(error.line()) < 1000
    assert probe.expected is None


ABORTED = {"choices": [{"text": "", "finish_reason": "abort"}], "usage": {"completion_tokens": 0}}


@pytest.mark.parametrize("document", [ABORTED, {"data": []}, {}, [], "not JSON", '"text"'])
def test_an_answer_without_output_warms_nothing_up(document: Any) -> None:
    with pytest.raises(StartError, match="got 200 without any output"):
        run(Service(document=document).probe().warm_up())


@pytest.mark.parametrize("ask", ["warm_up", "canary"])
def test_an_app_that_raises_is_an_error_of_ours(ask: str) -> None:
    """A start that fails reports what failed, in one line, with a code."""
    probe = Service(error=ValueError("within the app")).probe()
    with pytest.raises(StartError) as caught:
        run(getattr(probe, ask)())
    assert caught.value.code == "warm_up_failed"
    assert "/v1/completions" in caught.value.message
    assert "within the app" in (caught.value.root_cause or "")


def test_a_request_of_the_operators_gets_the_models_name_and_wants_200() -> None:
    service = Service(document={"any": "thing"})
    run(service.probe().request("/v1/x", {"messages": []}))
    run(service.probe().request("/v1/x", {"model": "adapter"}))
    assert service.bodies == [{"model": "demo", "messages": []}, {"model": "adapter"}]
    service.status, service.document = 400, {"error": {"message": "no such schema"}}
    with pytest.raises(StartError, match="/v1/x answers 400") as caught:
        run(service.probe().request("/v1/x", {}))
    assert caught.value.root_cause == "no such schema"


def test_the_target_is_asked_for_each_time() -> None:
    """The address is known after the bind, the tasks after the engine's start."""
    service = Service(document={**COMPLETION, "data": [1]})
    targets = [
        Target(service, Address(), name, tasks)
        for name, tasks in (("one", ("generate",)), ("two", ("embed",)))
    ]
    waiting = iter(targets)
    probe = SelfProbe(lambda: next(waiting), WARM_UP)
    run(probe.warm_up())
    run(probe.warm_up())
    assert [body["model"] for body in service.bodies] == ["one", "two"]
    assert [path for _, path in service.asked] == ["/v1/completions", "/v1/embeddings"]


# --- the watchdog's token


@pytest.mark.parametrize(
    ("document", "shows"),
    [
        (COMPLETION, True),
        ({"choices": [{"text": ""}], "usage": {"completion_tokens": 1}}, True),
        ({"choices": [{"text": "", "token_ids": [4]}]}, True),
        ({"data": [{"embedding": [1.0]}]}, True),
        (ABORTED, False),
        ({"error": {"message": "no"}}, False),
        ({"choices": "text"}, False),
        ({"choices": [3]}, False),
        (None, False),
    ],
)
def test_only_output_shows_that_an_engine_works(document: Any, shows: bool) -> None:
    assert shows_work(document) is shows


def test_a_token_that_comes_asks_nobody_else() -> None:
    service = Service()
    run(service.probe().token())
    assert (service.bodies[0]["max_tokens"], service.workers_asked) == (1, 0)


def test_a_rank_is_named_by_its_place_among_those_of_this_process() -> None:
    """Of another host's ranks vLLM's client knows nothing, and one rank needs no name."""
    header = RANK_HEADER.lower().encode()

    def named(rank: int, *ranks: int) -> bytes | None:
        service = Service()
        run(service.probe(ranks=ranks).token(rank))
        return dict(service.scope["headers"]).get(header)

    assert [named(rank, 2, 3) for rank in (2, 3)] == [b"0", b"1"]
    assert [named(rank, 0, 1) for rank in (0, 1)] == [b"0", b"1"]
    assert named(0, 0) is None


@pytest.mark.parametrize(("status", "document"), [(400, "no"), (503, "scaling"), (200, ABORTED)])
def test_a_token_that_is_refused_proves_nothing_so_the_processes_are_asked(
    status: int, document: Any
) -> None:
    """The API refuses without an engine. It is logged once, however often it happens."""
    service = Service(status, document)
    probe = service.probe()
    with capture_logs() as logs:
        run(probe.token())
        run(probe.token())
    assert service.workers_asked == 2
    assert [entry["event"] for entry in logs] == ["token_refused"]
    service.workers_error = RuntimeError("a worker says that it is not well")
    with pytest.raises(RuntimeError, match="not well"):
        run(probe.token())


def test_a_token_that_is_refused_waits_for_processes_that_are_stuck() -> None:
    """Silence is what the watchdog measures: a refusal must not stand in its way."""
    service = Service(400, "no")

    async def stuck(rank: int) -> None:
        await asyncio.Event().wait()

    async def scenario() -> None:
        target = Target(service, Address(), "demo", ("generate",), check_workers=stuck)
        asking = asyncio.create_task(SelfProbe(lambda: target, WARM_UP).token())
        while not service.asked:
            await asyncio.sleep(0)
        done, _ = await asyncio.wait({asking}, timeout=0.05)
        assert not done
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)

    run(scenario())


def test_without_a_way_below_the_api_a_refused_token_is_an_error() -> None:
    target = Target(Service(400, "no"), Address(), "demo", ("generate",))
    with pytest.raises(StartError, match="got 400"):
        run(SelfProbe(lambda: target, WARM_UP).token())


# --- a question that nobody waits for any more


@pytest.mark.parametrize("listens", [True, False])
def test_an_unfinished_request_can_be_cancelled(listens: bool) -> None:
    """It has no deadline of its own, as the first one may compile for minutes. The app sees a
    client that hangs up, and is cancelled where it does not look; nothing of it is left."""
    asked, ended = asyncio.Event(), asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        asked.set()
        try:
            while listens and (await receive())["type"] != "http.disconnect":
                pass
            if not listens:
                await asyncio.Event().wait()
        finally:
            ended.set()

    async def scenario() -> None:
        target = Target(app, Address(), "demo", ("generate",))
        asking = asyncio.create_task(SelfProbe(lambda: target, WARM_UP).warm_up())
        await asked.wait()
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert ended.is_set()
        await asyncio.sleep(0)  # the loop's turn in which cancelled tasks end
        assert asyncio.all_tasks() == {asyncio.current_task()}

    async def main() -> None:
        async with asyncio.timeout(60):
            await scenario()

    asyncio.run(main())
