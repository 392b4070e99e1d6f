"""The probe against a real server on loopback, plain and on a Unix socket."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from structlog.testing import capture_logs

from ichat_lifecycle.adapters.gate import PASS_HEADER
from ichat_lifecycle.adapters.probe import HttpProbe, Target, request_for
from ichat_lifecycle.config import WarmUp
from ichat_lifecycle.errors import ExitCode, StartError
from ichat_lifecycle.ports import Address

WARM_UP = WarmUp()
COMPLETION = {"id": "cmpl-1", "created": 1, "choices": [{"text": " world", "finish_reason": "x"}]}


@dataclass
class Service:
    """A server that answers as it is told, and notes what it is asked."""

    status: int = 200
    document: Any = field(default_factory=lambda: dict(COMPLETION))
    asked: list[tuple[str, str]] = field(default_factory=list)
    bodies: list[Any] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)
    address: Address = field(default_factory=Address)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = b""
        more = True
        while more:
            message = await receive()
            body += message["body"]
            more = message["more_body"]
        self.asked.append((scope["method"], scope["path"]))
        self.bodies.append(json.loads(body) if body else None)
        self.headers = {k.decode(): v.decode() for k, v in scope["headers"]}
        text = self.document if isinstance(self.document, str) else json.dumps(self.document)
        start = {"type": "http.response.start", "status": self.status, "headers": []}
        await send(start)
        await send({"type": "http.response.body", "body": text.encode()})

    def probe(self, *tasks: str, **more: Any) -> HttpProbe:
        target = Target(self.address, "demo", tasks or ("generate",), "the-pass", **more)
        return HttpProbe(lambda: target, WARM_UP)


@contextlib.asynccontextmanager
async def serving(service: Service, sock: socket.socket) -> AsyncIterator[None]:
    server = uvicorn.Server(uvicorn.Config(service, lifespan="off", log_config=None))
    running = asyncio.create_task(server.serve(sockets=[sock]))
    try:
        async with asyncio.timeout(30):
            while not server.started:
                await asyncio.sleep(0)
        yield
    finally:
        server.should_exit = True
        await running


Scenario = Callable[[Service], Coroutine[Any, Any, None]]


@pytest.fixture(params=["tcp", "uds"])
def serve(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., Service]]:
    """Runs a scenario against a service, on TCP and on a Unix socket."""

    def run(scenario: Scenario, **told: Any) -> Service:
        async def main() -> Service:
            if request.param == "tcp":
                sock = socket.create_server(("127.0.0.1", 0))
                address = Address("127.0.0.1", sock.getsockname()[1])
            else:
                sock = socket.socket(socket.AF_UNIX)
                path = str(tmp_path / "main.sock")
                sock.bind(path)
                address = Address(uds=path)
            service = Service(address=address, **told)
            async with serving(service, sock):
                await scenario(service)
            return service

        return asyncio.run(main())

    yield run


def refused_address(kind: str, tmp_path: Path) -> Address:
    """Where nobody listens."""
    if kind == "uds":
        return Address(uds=str(tmp_path / "none.sock"))
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return Address("127.0.0.1", sock.getsockname()[1])


# --- health


@pytest.mark.parametrize(
    ("status", "healthy"), [(200, True), (503, False), (500, False), (204, False), (307, False)]
)
def test_health_is_200_and_nothing_else(
    serve: Callable[..., Service], status: int, healthy: bool
) -> None:
    async def scenario(service: Service) -> None:
        assert await service.probe().health() is healthy

    assert serve(scenario, status=status).asked == [("GET", "/health")]


@pytest.mark.parametrize("kind", ["tcp", "uds"])
def test_not_being_answered_is_no(kind: str, tmp_path: Path) -> None:
    address = refused_address(kind, tmp_path)
    probe = Service(address=address).probe()
    assert asyncio.run(probe.health()) is False


def test_a_server_that_hangs_up_is_no() -> None:
    async def main() -> None:
        async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.close()

        server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
        async with server:
            address = Address("127.0.0.1", server.sockets[0].getsockname()[1])
            assert await Service(address=address).probe().health() is False

    asyncio.run(main())


@pytest.mark.parametrize(
    ("more", "authorization"), [({}, None), ({"api_key": "secret"}, "Bearer secret")]
)
def test_our_requests_carry_our_pass_and_the_key(
    serve: Callable[..., Service], more: dict[str, str], authorization: str | None
) -> None:
    """Past the gate by the one, past vLLM's own authentication by the other."""

    async def scenario(service: Service) -> None:
        probe = service.probe(**more)
        for ask in (probe.health, probe.warm_up, probe.canary):
            await ask()
            assert service.headers[PASS_HEADER.decode()] == "the-pass"
            assert service.headers.get("authorization") == authorization

    serve(scenario)


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


@pytest.mark.parametrize("tasks", [(), ("transcription",), ("render",)])
def test_a_model_without_a_small_request_is_not_warmed_up(tasks: tuple[str, ...]) -> None:
    """It is said, and nothing is asked: no server is there in this test."""
    assert request_for(tasks, "demo", WARM_UP) is None
    target = Target(Address("127.0.0.1", 1), "demo", tasks, "the-pass")
    probe = HttpProbe(lambda: target, WARM_UP)
    with capture_logs() as logs:
        asyncio.run(probe.warm_up())
        asyncio.run(probe.canary())
    assert [entry["event"] for entry in logs] == ["warm_up_skipped"] * 2


# --- warm-up and canary


@pytest.mark.parametrize(
    ("tasks", "document", "essence"),
    [
        ("generate", COMPLETION, [" world"]),
        ("embed", {"id": "x", "data": [{"embedding": [0.5]}]}, [{"embedding": [0.5]}]),
    ],
)
def test_the_first_warm_up_is_what_the_canary_expects(
    serve: Callable[..., Service], tasks: str, document: dict[str, Any], essence: Any
) -> None:
    """Without ids and times, which differ each time. A different answer is logged, not judged."""

    async def scenario(service: Service) -> None:
        probe = service.probe(tasks)
        await probe.warm_up()
        assert probe.expected == essence
        with capture_logs() as logs:
            service.document = {**document, "id": "another", "created": 2}
            await probe.canary()
            assert logs == []
            service.document = {"data": [], **({"choices": []} if tasks == "generate" else {})}
            await probe.warm_up()
            assert probe.expected == essence
            await probe.canary()
        assert [entry["event"] for entry in logs] == ["canary_differs"]

    service = serve(scenario, document=document)
    assert len(service.asked) == 4
    assert all(body == service.bodies[0] for body in service.bodies), "one and the same question"


@pytest.mark.parametrize("ask", ["warm_up", "canary"])
@pytest.mark.parametrize("status", [400, 404, 500, 503])
def test_an_answer_that_is_not_200_is_an_error(
    serve: Callable[..., Service], ask: str, status: int
) -> None:
    """With the path, the status and the beginning of what the server said."""
    said = '{"error": "no such model"}' + "x" * 10_000

    async def scenario(service: Service) -> None:
        probe = service.probe()
        with pytest.raises(StartError) as caught:
            await getattr(probe, ask)()
        error = caught.value
        assert (error.code, error.exit_code) == ("warm_up_failed", ExitCode.ENGINE_START_FAILED)
        assert f"/v1/completions got {status}" in error.message
        assert (error.root_cause or "").startswith('{"error": "no such model"}')
        assert len(error.line()) < 1000
        assert probe.expected is None

    serve(scenario, status=status, document=said)


@pytest.mark.parametrize("kind", ["tcp", "uds"])
@pytest.mark.parametrize("ask", ["warm_up", "canary"])
def test_a_server_that_is_gone_is_an_error_of_ours(kind: str, ask: str, tmp_path: Path) -> None:
    """A start that fails says what failed, in one line, with a code."""
    probe = Service(address=refused_address(kind, tmp_path)).probe()
    with pytest.raises(StartError) as caught:
        asyncio.run(getattr(probe, ask)())
    assert caught.value.code == "warm_up_failed"
    assert "/v1/completions" in caught.value.message
    assert caught.value.root_cause


def test_the_target_is_asked_for_each_time(serve: Callable[..., Service]) -> None:
    """The address is known after the bind, the tasks after the engine's start."""

    async def scenario(service: Service) -> None:
        targets = [
            Target(service.address, name, tasks, "the-pass")
            for name, tasks in (("one", ("generate",)), ("two", ("embed",)))
        ]
        current = targets[0]
        probe = HttpProbe(lambda: current, WARM_UP)
        await probe.warm_up()
        current = targets[1]
        await probe.warm_up()
        assert [body["model"] for body in service.bodies] == ["one", "two"]
        assert [path for _, path in service.asked] == ["/v1/completions", "/v1/embeddings"]

    serve(scenario)


def test_an_unfinished_request_can_be_cancelled(serve: Callable[..., Service]) -> None:
    """It has no deadline of its own, as the first one may compile for minutes: the caller's ends
    it, and closes its connection."""

    async def scenario(service: Service) -> None:
        asked = asyncio.Event()
        gone = asyncio.Event()

        async def never(self: Service, scope: Any, receive: Any, send: Any) -> None:
            asked.set()
            while (await receive())["type"] != "http.disconnect":
                pass
            gone.set()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Service, "__call__", never)
            asking = asyncio.create_task(service.probe().warm_up())
            await asyncio.wait_for(asked.wait(), 30)
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking
            await asyncio.wait_for(gone.wait(), 30)

    serve(scenario)
