"""Strangers on every port: what they send costs little memory, few lines of log, and nobody else.

The servers are our real ones, with the limits that they have in a fleet.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from dataclasses import replace
from typing import Any

import psutil
import pytest
import uvicorn
from descriptors import no_descriptor_left
from on_loop import run
from structlog.testing import capture_logs

from ichat_lifecycle.adapters import calm_log
from ichat_lifecycle.adapters.connections import Limits
from ichat_lifecycle.adapters.held_socket import Absence, HeldSocket
from ichat_lifecycle.adapters.http_connection import (
    PIPELINED_MAX,
    LimitedAuto,
    LimitedH11,
    LimitedHttpTools,
)
from ichat_lifecycle.adapters.prompt_server import PromptServer
from ichat_lifecycle.adapters.refusal import Receive, Scope, Send, send_json
from ichat_lifecycle.control.fleet_server import serving as fleet_serving
from ichat_lifecycle.control.server import ControlPlane
from ichat_lifecycle.ports import Address

pytestmark = pytest.mark.hostile

LOOPBACK = "127.0.0.1"
DEADLINE_S = 60.0
MB = 2**20
ROOM = 60 * MB  # what an attack may cost a process for a while
PATIENT = Limits(lambda: 100)

GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
WAIT = GET.replace(b"/ ", b"/wait ")
CHUNKED = b"POST /%b HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
UPGRADE = GET[:-2] + b"Connection: Upgrade\r\nUpgrade: x\r\n\r\n"
PROTOCOLS = pytest.mark.parametrize("protocol", [LimitedHttpTools, LimitedH11])


class App:
    """Answers at `/`, reads all at `/read`, begins at `/begin` and reads then, waits at `/wait`."""

    def __init__(self) -> None:
        self.waiting = asyncio.Event()
        self.headers: list[Any] = []
        self.read = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        if path == "/begin":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"begun", "more_body": True})
        if path in ("/wait", "/begin", "/read"):
            self.waiting.set()
            while (await receive()).get("more_body"):
                pass
        if path == "/wait":
            await receive()  # until the client has gone
        self.headers = list(scope["headers"])
        self.read.set()
        if path != "/begin":
            await send_json(send, 200, {})


@contextlib.asynccontextmanager
async def serving(protocol: Any, limits: Limits = PATIENT) -> AsyncIterator[tuple[App, int, Any]]:
    app = App()
    config = uvicorn.Config(app, interface="asgi3", lifespan="off", log_config=None, workers=1)
    config.timeout_graceful_shutdown = 1
    config.load()
    server = PromptServer(config, limits, protocol)
    sock = socket.create_server((LOOPBACK, 0))
    task = server.serving(sock)
    assert await server.begun(task)
    try:
        yield app, sock.getsockname()[1], server
    finally:
        server.should_exit = True
        server.wake()
        await asyncio.wait({task})


async def flood(port: int, first: bytes, piece: bytes, most: int) -> tuple[int, bytes]:
    """Sends up to `most` bytes: how many were taken before the end, and what came back."""
    reader, writer = await asyncio.open_connection(LOOPBACK, port)
    answer = asyncio.create_task(_all_of(reader))
    sent = 0
    try:
        writer.write(first)
        while sent < most and not answer.done():
            writer.write(piece)
            await writer.drain()
            sent += len(piece)
    except OSError:
        pass
    finally:
        writer.transport.abort()
    return sent, await answer


async def _all_of(reader: asyncio.StreamReader) -> bytes:
    got = bytearray()
    with contextlib.suppress(OSError):
        while data := await reader.read(MB):
            got += data[: MB - len(got)]
    return bytes(got)


async def exchange(port: int, data: bytes) -> bytes:
    reader, writer = await asyncio.open_connection(LOOPBACK, port)
    writer.write(data)
    try:
        return await _all_of(reader)
    finally:
        writer.close()


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What is logged; as in a process that has told nothing yet."""
    fresh = calm_log._Calm()
    before, calm_log.CALM_LOGGER.filters = calm_log.CALM_LOGGER.filters, [fresh]
    with caplog.at_level(logging.INFO):
        yield caplog
    calm_log.CALM_LOGGER.filters = before


# --- memory


async def held(scenario: Callable[[int], Awaitable[None]]) -> None:
    with socket.create_server((LOOPBACK, 0)) as probe:
        port = probe.getsockname()[1]
    socket_ = HeldSocket(Address(LOOPBACK, port), lambda: Absence("gone", "starting", 1))
    try:
        await scenario(port)
    finally:
        await socket_.close()


async def of_fleet(scenario: Callable[[int], Awaitable[None]]) -> None:
    sock = socket.create_server((LOOPBACK, 0))
    async with fleet_serving(App(), sock):
        await scenario(sock.getsockname()[1])


async def of_worker(scenario: Callable[[int], Awaitable[None]]) -> None:
    control = ControlPlane(App, LOOPBACK, 0, None, lambda url: None)
    await control.start()
    try:
        await scenario(control.address[1])
    finally:
        await control.stop()


@pytest.mark.parametrize("server", [held, of_fleet, of_worker])
@pytest.mark.parametrize(
    ("first", "piece"),
    [
        (b"GET / HTTP/1.1\r\nHost: localhost\r\n", b"X: " + b"a" * 8000 + b"\r\n"),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: ", b"a" * 65536),
        (b"GET /", b"a" * 65536),
        (b"", b"a" * 65536),
        (b"", b"\r\n" * 32768),
        (CHUNKED % b"wait", b"1;" + b"a" * 65536),
        (CHUNKED % b"wait" + b"0\r\n", b"X: " + b"a" * 8000 + b"\r\n"),
        (CHUNKED % b"wait", b"1\r\na\r\n" * 10_000),
        (WAIT, GET * 2000),
        (b"", GET * 2000),
    ],
    ids=[
        "lines", "a line", "a target", "a method", "empty lines",
        "an extension", "trailers", "a body", "pipelined", "unread",
    ],
)  # fmt: skip
def test_no_request_takes_memory_without_end(
    server: Callable[[Any], Coroutine[Any, Any, None]], first: bytes, piece: bytes
) -> None:
    """120 MB of headers on one connection have made a supervisor 852 MB larger."""
    process = psutil.Process()

    async def attack(port: int) -> None:
        before = process.memory_info().rss
        flooding = [asyncio.create_task(flood(port, first, piece, 30 * MB)) for _ in range(3)]
        _, pending = await asyncio.wait(flooding, timeout=2.0)
        grown = process.memory_info().rss - before
        for task in pending:  # it is not read any more, which is as good as an end
            task.cancel()
        await asyncio.gather(*flooding, return_exceptions=True)
        assert grown < ROOM, grown
        closing = GET[:-2] + b"Connection: close\r\n\r\n"
        assert (await exchange(port, closing)).startswith(b"HTTP/1.1 ")

    run(server(attack))


def test_pipelined_requests_are_few() -> None:
    """With httptools each 18 bytes were some kilobytes, and each answer let more of them in."""

    async def scenario() -> None:
        async with serving(LimitedHttpTools) as (app, port, server):
            some = asyncio.create_task(exchange(port, WAIT + GET * PIPELINED_MAX))
            await app.waiting.wait()
            _, answer = await flood(port, WAIT, GET * 5000, 10 * MB)
            assert answer == b"", "no answer in the place of another one's"
            assert len(server.server_state.connections) == 1
            assert not some.done()
            some.cancel()

    run(scenario())


@pytest.mark.parametrize(
    "piece", [b"X: " + b"a" * 1000 + b"\r\n", b"X" * 1000], ids=["trailers", "a trailer"]
)
@PROTOCOLS
def test_trailers_have_an_end_and_are_no_headers(protocol: Any, piece: bytes) -> None:
    limits = replace(PATIENT, head_bytes=16 * 1024)

    async def scenario() -> None:
        async with serving(protocol, limits) as (app, port, _):
            sent, _ = await flood(port, CHUNKED % b"read" + b"0\r\n", piece, 100 * MB)
            assert sent < 100 * MB
            ending = b"1\r\na\r\n0\r\nAuthorization: a\r\nHost: b\r\n\r\n"
            request = CHUNKED.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n") % b"read"
            app.read.clear()
            assert b" 200 " in await exchange(port, request + ending)
            assert [value for name, value in app.headers if name == b"host"] == [b"localhost"]
            assert b"authorization" not in dict(app.headers)

    run(scenario())


# --- file descriptors


def test_a_held_socket_outlasts_a_lack_of_descriptors(log: pytest.LogCaptureFixture) -> None:
    """A copy of the socket could not be made, and then its port was closed for good."""

    async def attack(held: HeldSocket, port: int) -> None:
        worker = object()
        held.served_by(worker)
        await asyncio.sleep(0.1)
        reader, writer = await asyncio.open_connection(LOOPBACK, port)  # waits in the queue
        with no_descriptor_left():
            held.left_by(worker)
            await asyncio.sleep(1.0)
            assert held.fd >= 0
        writer.write(GET)
        assert (await reader.readline()).startswith(b"HTTP/1.1 503 ")
        writer.close()

    async def scenario() -> None:
        with socket.create_server((LOOPBACK, 0)) as probe:
            port = probe.getsockname()[1]
        held = HeldSocket(Address(LOOPBACK, port), lambda: Absence("gone", "starting", 1))
        try:
            await attack(held, port)
        finally:
            await held.close()

    with capture_logs() as told:
        run(scenario())
    assert [line["event"] for line in told] == ["connections_not_accepted"]
    assert [record for record in log.records if record.levelno >= logging.ERROR] == []


# --- two readings of one request


@PROTOCOLS
@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", (400,)),
        (b"GET / HTTP/1.1\r\nHost: a\r\nhost: a\r\n\r\n", (400,)),
        (b"GET / HTTP/0.9\r\nHost: a\r\n\r\n", (400, 505)),
        (b"GET / HTTP/2.0\r\nHost: a\r\n\r\n", (400, 505)),
        (b"GET / HTTP/9.9\r\nHost: a\r\n\r\n", (400, 505)),
        (b"GET /\r\n\r\n", (400, 505)),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab", (400,)),
        (
            b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n"
            b"0\r\n\r\n",
            (400, 200),  # h11 reads it as RFC 9112 says: the chunks are the body
        ),
        (b"GET / HTTP/1.1\r\nHost : a\r\n\r\n", (400,)),
        (b"GET / HTTP/1.1\r\nHost: a\r\n X: b\r\n\r\n", (400, 200)),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: a\x00b\r\n\r\n", (400,)),
        (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n", (400, 200)),
        (b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n", (400,)),
    ],
)
def test_what_two_servers_read_in_two_ways_is_refused(
    protocol: Any, request_: bytes, status: tuple[int, ...]
) -> None:
    async def scenario() -> None:
        limits = replace(PATIENT, head_s=2.0)
        async with serving(protocol, limits) as (_, port, _):
            request = request_.replace(b"Host: a\r\n", b"Host: a\r\nConnection: close\r\n", 1)
            answer = await exchange(port, request)
            assert int(answer.split()[1]) in status, answer
            assert answer.count(b"HTTP/1.1 ") == 1
            if not answer.startswith(b"HTTP/1.1 200"):
                assert b"\r\nx-content-type-options: nosniff\r\n" in answer
                assert b"\r\ncache-control: no-store\r\n" in answer

    run(scenario())


@PROTOCOLS
@pytest.mark.parametrize("method", [b"POST", b"HEAD"])
@pytest.mark.parametrize("path", [b"begin", b"read", b""])
def test_nonsense_in_a_body_adds_no_second_answer(
    protocol: Any, path: bytes, method: bytes, log: pytest.LogCaptureFixture
) -> None:
    """And no traceback: h11 refuses to send one, or a body where the request was a HEAD."""

    async def scenario() -> None:
        async with serving(protocol) as (app, port, server):
            reader, writer = await asyncio.open_connection(LOOPBACK, port)
            writer.write(CHUNKED.replace(b"POST", method) % path)
            first = await reader.readuntil(b"\r\n\r\n") if path != b"read" else b""
            await (app.waiting if path else app.read).wait()
            writer.write(b"nonsense\r\n")
            answer = first + await _all_of(reader)
            writer.close()
            assert answer.count(b"HTTP/1.1 ") == 1, answer
            while server.server_state.connections or server.server_state.tasks:
                await asyncio.sleep(0.01)

    run(scenario())
    assert [record.levelname for record in log.records if record.levelno > logging.WARNING] == []


# --- the log


@pytest.mark.parametrize("nonsense", [b"nonsense\r\n\r\n", UPGRADE + b"\r\nx\r\n\r\n"])
@PROTOCOLS
def test_clients_cannot_fill_the_log(
    protocol: Any, nonsense: bytes, log: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        async with serving(protocol, replace(PATIENT, head_s=1.0)) as (_, port, _):
            asked = [exchange(port, nonsense) for _ in range(30)]
            await asyncio.gather(*asked)

    run(scenario())
    told = [record for record in log.records if record.levelno >= logging.WARNING]
    assert 1 <= len(told) <= 2


def test_a_stop_tells_nothing_of_the_answers_that_it_ends(log: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with serving(LimitedAuto) as (app, port, _):
            asked = asyncio.create_task(exchange(port, WAIT))
            await app.waiting.wait()
        await asked

    run(scenario())
    assert [record for record in log.records if record.levelno >= logging.ERROR] == []
