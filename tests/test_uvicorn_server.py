"""A real Uvicorn on loopback, behind the Server port: one server for a whole life."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from on_loop import eventually, open_files
from structlog.testing import capture_logs

from ichat_lifecycle.adapters.gate import Gate
from ichat_lifecycle.adapters.refusal import App
from ichat_lifecycle.adapters.uvicorn_server import UvicornServer
from ichat_lifecycle.errors import ArgumentsError, ExitCode, StartError
from ichat_lifecycle.journal import Snapshot
from ichat_lifecycle.ports import Fault
from ichat_lifecycle.states import State

DEADLINE_S = 30  # for anything that should take no time at all


@dataclass
class Engine:
    """An app as vLLM's: it has a lifespan, and streams until it is let go."""

    events: list[str] = field(default_factory=list)
    go: asyncio.Event = field(default_factory=asyncio.Event)
    fail: str | None = None

    async def build(self) -> App:
        self.events.append("build")
        app = FastAPI(lifespan=self._lifespan)

        @app.post("/v1/completions")
        async def completions(request: Request) -> dict[str, Any]:
            return {"length": len(await request.body()), "greeting": request.state.greeting}

        @app.post("/stream")
        async def stream() -> StreamingResponse:
            return StreamingResponse(self._words(), media_type="text/event-stream")

        @app.get("/health")
        async def health() -> None:
            return None

        return app

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[dict[str, str]]:
        self.events.append("start-up")
        if self.fail == "start-up":
            raise RuntimeError("no start-up")
        yield {"greeting": "hello"}
        self.events.append("shut-down")
        if self.fail == "shut-down":
            raise RuntimeError("no shut-down")

    async def _words(self) -> AsyncIterator[bytes]:
        yield b"data: first\n\n"
        await self.go.wait()
        yield b"data: last\n\n"


class Bench:
    """A server that is open on a socket, and what it has reported."""

    def __init__(self, **options: Any) -> None:
        self.sock = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.sock.getsockname()[1]
        self.state = State.BOUND
        self.engine = Engine()
        self.faults: list[Fault] = []
        self.gate = Gate(self._snapshot, self._own_app, lambda: 1)
        # As vLLM's: with header limits that Uvicorn's constructor does not take.
        values = {"log_config": None, "timeout_graceful_shutdown": 1, **options}
        limits = {"h11_max_incomplete_event_size": 1 << 20, "h11_max_header_count": 64}
        self.server = UvicornServer(self.gate, lambda: {**limits, **values}, self.engine)

    def _snapshot(self) -> Snapshot:
        return Snapshot(self.state, datetime(2026, 1, 2, tzinfo=UTC), 0.0)

    async def _own_app(self, scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("not asked here")

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=f"http://127.0.0.1:{self.port}", timeout=DEADLINE_S)

    async def ask(self, path: str = "/v1/completions", content: bytes = b"x") -> httpx.Response:
        async with self.client() as client:
            return await client.post(path, content=content)

    async def attach(self) -> None:
        await self.server.attach()
        self.state = State.READY


def run(scenario: Callable[[Bench], Coroutine[Any, Any, None]], **options: Any) -> Bench:
    """The scenario between open() and the releases, after which nothing of the server is left."""

    async def main() -> Bench:
        before = open_files()
        bench = Bench(**options)
        await bench.server.open(bench.sock, bench.faults.append)
        try:
            async with asyncio.timeout(DEADLINE_S):
                await scenario(bench)
        finally:
            async with asyncio.timeout(DEADLINE_S):
                await bench.server.detach()
                await bench.server.close()
        assert asyncio.all_tasks() == {asyncio.current_task()}
        with (
            contextlib.suppress(ConnectionRefusedError),
            socket.create_connection(("127.0.0.1", bench.port)),
        ):
            raise AssertionError("it still listens")
        await eventually(lambda: open_files() == before)  # transports close a step later
        return bench

    return asyncio.run(main())


async def exchange(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> tuple[int, dict[str, Any]]:
    """One request and its answer on a connection that stays open."""
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nx")
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    length = int(head.partition("content-length: ")[2].partition("\r\n")[0])
    return int(head.split()[1]), json.loads(await reader.readexactly(length))


# --- a life


def test_it_answers_503_then_200_then_503() -> None:
    """From open() on, through attach and detach; the app's lifespan runs once, with its state."""

    async def scenario(bench: Bench) -> None:
        refused = await bench.ask()
        assert (refused.status_code, refused.json()["error"]["state"]) == (503, "BOUND")
        await bench.attach()
        assert bench.engine.events == ["build", "start-up"]
        answered = await bench.ask(content=b"12345")
        assert answered.status_code == 200
        assert answered.json() == {"length": 5, "greeting": "hello"}
        await bench.server.detach()
        assert (await bench.ask()).status_code == 503
        assert bench.engine.events == ["build", "start-up", "shut-down"]
        await bench.server.detach()
        assert bench.engine.events == ["build", "start-up", "shut-down"], "once"

    assert run(scenario).faults == [], "an end that was asked for is no fault"


def test_a_second_engine_gets_a_lifespan_of_its_own() -> None:
    """An engine's restart: the socket and the server stay."""

    async def scenario(bench: Bench) -> None:
        for _ in range(2):
            await bench.attach()
            assert (await bench.ask()).status_code == 200
            await bench.server.detach()
        assert bench.engine.events == ["build", "start-up", "shut-down"] * 2

    run(scenario)


def test_a_connection_survives_the_attach() -> None:
    """A client that was told 503 need not connect again."""

    async def scenario(bench: Bench) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", bench.port)
        assert (await exchange(reader, writer))[0] == 503
        await bench.attach()
        assert await exchange(reader, writer) == (200, {"length": 1, "greeting": "hello"})
        await bench.server.detach()
        assert (await exchange(reader, writer))[0] == 503
        writer.close()
        await writer.wait_closed()

    run(scenario)


def test_a_stream_survives_until_it_is_drained() -> None:
    """drained() waits for it; nothing new comes in; it ends whole."""

    async def scenario(bench: Bench) -> None:
        await bench.attach()
        async with bench.client() as client, client.stream("POST", "/stream") as response:
            lines = response.aiter_lines()
            assert await anext(lines) == "data: first"
            assert bench.server.in_flight == 1
            bench.state = State.STOPPING
            drained = asyncio.create_task(bench.server.drained())
            refused = await bench.ask()
            assert (refused.status_code, refused.headers["connection"]) == (503, "close")
            assert not drained.done()
            bench.engine.go.set()
            assert [line async for line in lines if line] == ["data: last"]
            await drained
        assert bench.server.in_flight == 0

    run(scenario)


def test_a_stream_that_is_cut_ends_with_an_error_event() -> None:
    """The client sees a body that is complete and says why."""

    async def scenario(bench: Bench) -> None:
        await bench.attach()
        async with bench.client() as client, client.stream("POST", "/stream") as response:
            lines = response.aiter_lines()
            assert await anext(lines) == "data: first"
            bench.state = State.STOPPING
            await bench.server.cut()
            (last,) = [line async for line in lines if line]
        assert json.loads(last.removeprefix("data: "))["error"]["state"] == "STOPPING"

    run(scenario)


def test_close_ends_what_is_still_running() -> None:
    """A stream that nobody drained or cut does not hold up the end, nor does an idle connection."""

    async def scenario(bench: Bench) -> None:
        await bench.attach()
        _, idle = await asyncio.open_connection("127.0.0.1", bench.port)
        async with bench.client() as client:
            with pytest.raises(httpx.RemoteProtocolError):
                async with client.stream("POST", "/stream") as response:
                    lines = response.aiter_lines()
                    assert await anext(lines) == "data: first"
                    await bench.server.close()
                    async for _ in lines:
                        pass
        idle.close()

    run(scenario)


# --- starts that fail


@pytest.mark.parametrize("when", ["build", "start-up"])
def test_an_app_that_cannot_start(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names it; requests stay refused; detach returns and the server goes on."""

    async def no_build(self: Engine) -> App:
        raise StartError("no build", code="app_start_failed")

    if when == "build":
        monkeypatch.setattr(Engine, "build", no_build)

    async def scenario(bench: Bench) -> None:
        bench.engine.fail = when
        with pytest.raises(StartError) as caught:
            await bench.server.attach()
        assert caught.value.code == "app_start_failed"
        assert (await bench.ask()).status_code == 503
        await bench.server.detach()
        assert "shut-down" not in bench.engine.events

    run(scenario)


def test_an_app_that_fails_to_shut_down_is_gone_all_the_same() -> None:
    async def scenario(bench: Bench) -> None:
        await bench.attach()
        bench.engine.fail = "shut-down"
        await bench.server.detach()
        assert (await bench.ask()).status_code == 503

    run(scenario)


def write_pem(path: Path) -> str:
    path.write_text("-----BEGIN CERTIFICATE-----\nnonsense\n-----END CERTIFICATE-----\n")
    return str(path)


@pytest.mark.parametrize("there", [True, False])
def test_a_bad_certificate_is_an_error_of_the_arguments(tmp_path: Path, there: bool) -> None:
    """Missing or nonsense: exit 2, with the flag's name; close() after it is safe."""
    pem = write_pem(tmp_path / "a.pem") if there else str(tmp_path / "none.pem")

    async def main() -> None:
        bench = Bench(ssl_certfile=pem, ssl_keyfile=pem)
        try:
            with pytest.raises(ArgumentsError, match="--ssl-certfile") as caught:
                await bench.server.open(bench.sock, bench.faults.append)
            assert caught.value.exit_code is ExitCode.BAD_ARGUMENTS
            await bench.server.close()
        finally:
            bench.sock.close()
        assert bench.faults == []

    asyncio.run(main())


ENCRYPTED = Path(__file__).with_name("encrypted_certificate.pem")
CERTIFICATES = [
    Path(__file__).with_name(f"{name}.pem") for name in ("certificate", "next_certificate")
]


def served_certificate(port: int) -> str:
    return ssl.get_server_certificate(("127.0.0.1", port), timeout=DEADLINE_S)


def test_a_new_certificate_under_the_same_path_is_served_once_it_is_renewed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Connections go on with the one before; one that cannot be used changes nothing."""
    pem = tmp_path / "a.pem"
    pem.write_bytes(CERTIFICATES[0].read_bytes())
    texts = [path.read_text() for path in CERTIFICATES]

    async def scenario(bench: Bench) -> None:
        open_before = ssl.create_default_context(cafile=str(CERTIFICATES[0]))
        reader, writer = await asyncio.open_connection("127.0.0.1", bench.port, ssl=open_before)
        assert await asyncio.to_thread(served_certificate, bench.port) in texts[0]
        pem.write_bytes(CERTIFICATES[1].read_bytes())
        assert await asyncio.to_thread(served_certificate, bench.port) in texts[0]
        bench.server.renew_certificate()
        assert await asyncio.to_thread(served_certificate, bench.port) in texts[1]
        assert (await exchange(reader, writer))[0] == 503
        writer.close()
        with contextlib.suppress(ssl.SSLError):
            await writer.wait_closed()
        pem.write_text("nonsense")
        bench.server.renew_certificate()
        assert await asyncio.to_thread(served_certificate, bench.port) in texts[1]

    run(scenario, ssl_certfile=str(pem), ssl_keyfile=str(pem))


def test_what_cannot_be_served_after_a_renewal_is_logged_by_its_flag(tmp_path: Path) -> None:
    """A key with a passphrase, too: nobody is asked for it at the terminal."""
    pem = tmp_path / "a.pem"
    pem.write_bytes(CERTIFICATES[0].read_bytes())

    async def scenario(bench: Bench) -> None:
        pem.write_bytes(ENCRYPTED.read_bytes())
        with capture_logs() as logs:
            bench.server.renew_certificate()
        (entry,) = logs
        assert entry["event"] == "certificate_not_renewed"
        assert entry["error"].startswith(f"--ssl-certfile {pem}: the key has a passphrase")
        served = await asyncio.to_thread(served_certificate, bench.port)
        assert served in CERTIFICATES[0].read_text()

    run(scenario, ssl_certfile=str(pem))


def test_without_tls_there_is_nothing_to_renew() -> None:
    async def scenario(bench: Bench) -> None:
        bench.server.renew_certificate()
        assert (await bench.ask()).status_code == 503

    run(scenario)


def test_the_refresher_follows_a_renewed_certificate() -> None:
    """It changes the context that it was given: that has to be the one that is served with."""
    watched: list[tuple[str, Any]] = []

    class Refresher:
        def __init__(self, config: uvicorn.Config) -> None:
            self._context = config.ssl
            watched.append(("started", self._context))

        def stop(self) -> None:
            watched.append(("stopped", self._context))

    async def main() -> None:
        pem = str(CERTIFICATES[0])
        options = {"log_config": None, "ssl_certfile": pem, "ssl_keyfile": pem}
        bench = Bench()
        server = UvicornServer(bench.gate, lambda: options, bench.engine, Refresher)
        await server.open(bench.sock, bench.faults.append)
        server.renew_certificate()
        await server.close()

    asyncio.run(main())
    (_, first), *rest = watched
    assert [what for what, _ in rest] == ["stopped", "started", "stopped"]
    assert rest[0][1] is first and rest[1][1] is rest[2][1] is not first


def test_a_socket_that_cannot_be_served() -> None:
    """open() fails with the cause, and leaves no task."""

    async def main() -> None:
        bench = Bench()
        bench.sock.close()
        with pytest.raises(StartError) as caught:
            await bench.server.open(bench.sock, bench.faults.append)
        assert caught.value.code == "server_exited"
        assert "Error" in (caught.value.root_cause or "")
        await bench.server.close()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())


@pytest.mark.parametrize("opened", [False, True])
def test_close_while_it_opens(opened: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uvicorn skips its own shutdown when asked to exit during its start-up: we must not wait."""

    async def hang(*args: Any, **kwargs: Any) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(uvicorn.Server, "startup", hang)

    async def main() -> None:
        bench = Bench()
        opening = asyncio.create_task(bench.server.open(bench.sock, bench.faults.append))
        if opened:
            await eventually(lambda: "uvicorn" in {t.get_name() for t in asyncio.all_tasks()})
        opening.cancel()
        await asyncio.wait({opening})
        async with asyncio.timeout(DEADLINE_S):
            await bench.server.close()
        bench.sock.close()
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert bench.faults == []

    asyncio.run(main())


# --- ends


def test_a_server_that_ends_by_itself_is_a_fault() -> None:
    """Told once, by its code; close() afterwards is safe."""

    async def scenario(bench: Bench) -> None:
        await bench.ask()
        await eventually(lambda: bool(bench.faults))

    (fault,) = run(scenario, limit_max_requests=1).faults
    assert fault.code == "server_exited"


def test_signals_are_left_alone() -> None:
    """Uvicorn's own handlers would stop the server behind the lifecycle's back."""
    before = signal.getsignal(signal.SIGTERM)

    async def scenario(bench: Bench) -> None:
        assert signal.getsignal(signal.SIGTERM) == before

    run(scenario)
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_refresher_of_certificates_is_stopped() -> None:
    stopped: list[str] = []

    class Refresher:
        def stop(self) -> None:
            stopped.append("stopped")

    async def main() -> None:
        bench = Bench()
        server = UvicornServer(
            bench.gate, lambda: {"log_config": None}, bench.engine, lambda config: Refresher()
        )
        await server.open(bench.sock, bench.faults.append)
        await server.close()

    asyncio.run(main())
    assert stopped == ["stopped"]
