"""Connections of all our servers on real sockets: their time, their number, and early answers."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
import ssl
import subprocess
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from on_loop import eventually, open_files
from tools import of_the_system
from websockets.asyncio.client import connect

from ichat_lifecycle.adapters.connections import (
    Limits,
    connections_of_control,
    connections_of_held,
    connections_of_main,
)
from ichat_lifecycle.adapters.http_connection import LimitedAuto, LimitedH11
from ichat_lifecycle.adapters.prompt_server import PromptServer
from ichat_lifecycle.adapters.refusal import CROWDED, Receive, Scope, Send, send_json

LOOPBACK = "127.0.0.1"
DEADLINE_S = 30.0  # for anything that should take no time at all
CERTIFICATE = str(Path(__file__).with_name("certificate.pem"))
UPLOAD = 60 * 2**20
PATIENT = Limits(lambda: 100)
# Each limit alone, as short as it can be.
SHORT_HEAD = replace(PATIENT, head_s=0.2)
SHORT_BODY = replace(PATIENT, silence_s=0.2)

PROTOCOLS = pytest.mark.parametrize("protocol", [LimitedAuto, LimitedH11])

GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"


class App:
    """Refuses `/refuse` unread, closes after `/close`, waits at `/wait`, and reads the rest."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.waiting = asyncio.Semaphore(0)
        self.seen: list[int] = []
        self.gone = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await self._echo(receive, send)
            return
        path = scope["path"]
        if path in ("/refuse", "/close"):
            close = [(b"connection", b"close")] if path == "/close" else []
            await send_json(send, 503, {"error": "later"}, close)
            return
        if path == "/stream":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"a", "more_body": True})
            await self._read(receive)
            await receive()
            return
        if path == "/wait":
            self.waiting.release()
            await self.go.wait()
        crowded = bool(scope["state"].get(CROWDED))
        await send_json(send, 200, {"length": await self._read(receive), "crowded": crowded})

    async def _read(self, receive: Receive) -> int:
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.gone.set()
                return size
            size += len(message["body"])
            self.seen.append(size)
            if not message["more_body"]:
                return size

    async def _echo(self, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        while (message := await receive())["type"] == "websocket.receive":
            await send({"type": "websocket.send", "text": message["text"]})


class Bench:
    def __init__(self, server: PromptServer, app: App, port: int) -> None:
        self.server, self.app, self.port = server, app, port
        self.url = f"http://{LOOPBACK}:{port}"

    async def dial(self, data: bytes = b"") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection(LOOPBACK, self.port)
        writer.write(data)
        return reader, writer

    @property
    def connections(self) -> int:
        return len(self.server.server_state.connections)


@contextlib.asynccontextmanager
async def serving(
    limits: Limits = PATIENT, protocol: Any = LimitedAuto, **options: Any
) -> AsyncIterator[Bench]:
    app = App()
    given = {"timeout_graceful_shutdown": 1, **options}
    config = uvicorn.Config(app, interface="asgi3", lifespan="off", log_config=None, **given)
    config.load()
    server = PromptServer(config, limits, protocol)
    sock = socket.create_server((LOOPBACK, 0))
    task = server.serving(sock)
    assert await server.begun(task)
    try:
        async with asyncio.timeout(DEADLINE_S):
            yield Bench(server, app, sock.getsockname()[1])
    finally:
        server.should_exit = True
        server.wake()
        await asyncio.wait({task})
    assert task.exception() is None


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    """The scenario, after which no file descriptor is left."""

    async def main() -> None:
        before = open_files()
        await scenario()
        await eventually(lambda: open_files() == before)

    asyncio.run(main())


async def head_of(reader: asyncio.StreamReader) -> bytes:
    return await reader.readuntil(b"\r\n\r\n")


async def answer_of(reader: asyncio.StreamReader) -> tuple[int, dict[str, Any]]:
    head = (await head_of(reader)).decode().lower()
    length = int(head.partition("content-length: ")[2].partition("\r\n")[0])
    return int(head.split()[1]), json.loads(await reader.readexactly(length))


async def ended(reader: asyncio.StreamReader) -> bytes:
    """All that comes until the other end closes."""
    with contextlib.suppress(ConnectionResetError):
        return await reader.read()
    return b""


# --- time


@PROTOCOLS
@pytest.mark.parametrize("beginning", [b"", b"GET / HT", GET[:-2], b"\r\n"])
def test_a_head_has_to_come_in_time(protocol: Any, beginning: bytes) -> None:
    async def scenario() -> None:
        async with serving(SHORT_HEAD, protocol) as bench:
            reader, writer = await bench.dial(beginning)
            # Of an empty line before a request h11 makes a bad one.
            assert (await ended(reader))[:12] in (b"", b"HTTP/1.1 400")
            writer.close()

    run(scenario)


@PROTOCOLS
@pytest.mark.parametrize("first", [b"", GET], ids=["at once", "after an answer"])
def test_bytes_that_drip_in_buy_no_time(protocol: Any, first: bytes) -> None:
    """Uvicorn's own timer ends with the first byte after an answer, and never comes back."""

    async def scenario() -> None:
        async with serving(SHORT_HEAD, protocol) as bench:
            reader, writer = await bench.dial(first)
            if first:
                assert (await answer_of(reader))[0] == 200
            writer.write(b"GET / HTTP/1.1\r\nX: ")
            end = asyncio.create_task(ended(reader))
            while not end.done():
                writer.write(b"a")
                await asyncio.sleep(0.01)
            writer.close()

    run(scenario)


@PROTOCOLS
def test_an_idle_connection_is_closed_after_its_keep_alive(protocol: Any) -> None:
    async def scenario() -> None:
        async with serving(PATIENT, protocol, timeout_keep_alive=0.1) as bench:
            reader, writer = await bench.dial(GET)
            assert (await answer_of(reader))[0] == 200
            assert await reader.read() == b"", "an end, not a reset"
            writer.close()

    run(scenario)


@PROTOCOLS
def test_a_body_may_be_slow_and_not_silent(protocol: Any) -> None:
    """As an upload on a slow line: longer in all than any limit."""

    async def scenario() -> None:
        async with serving(replace(PATIENT, head_s=0.3, silence_s=1.0), protocol) as bench:
            reader, writer = await bench.dial(POST % 12)
            for _ in range(12):
                writer.write(b"a")
                await asyncio.sleep(0.1)
            assert await answer_of(reader) == (200, {"length": 12, "crowded": False})
            writer.write(POST % 12 + b"a")
            assert await ended(reader) == b""
            await bench.app.gone.wait()  # the app does not wait for the rest
            writer.close()

    run(scenario)


@PROTOCOLS
def test_a_whole_request_may_have_a_limit(protocol: Any) -> None:
    async def scenario() -> None:
        async with serving(replace(PATIENT, request_s=0.3), protocol) as bench:
            reader, writer = await bench.dial(POST % 1000)
            end = asyncio.create_task(ended(reader))
            while not end.done():
                writer.write(b"a")
                await asyncio.sleep(0.01)
            writer.close()

    run(scenario)


@PROTOCOLS
def test_a_client_is_not_to_blame_for_a_server_that_does_not_read(protocol: Any) -> None:
    """Its body is longer than what is buffered, and the app does not take it yet."""

    async def scenario() -> None:
        # Long enough for one loop that serves and sends on a busy machine.
        async with serving(replace(PATIENT, silence_s=1.0), protocol) as bench:
            reader, writer = await bench.dial(POST.replace(b"/", b"/wait", 1) % UPLOAD)
            writer.write(bytes(UPLOAD))
            await bench.app.waiting.acquire()
            await asyncio.sleep(1.5)
            bench.app.go.set()
            assert await answer_of(reader) == (200, {"length": UPLOAD, "crowded": False})
            writer.close()

    run(scenario)


@PROTOCOLS
def test_an_answer_may_take_any_time(protocol: Any) -> None:
    async def scenario() -> None:
        limits = Limits(lambda: 100, head_s=0.1, silence_s=0.1, request_s=0.1, unread_s=0.1)
        async with serving(limits, protocol, timeout_keep_alive=0.1) as bench:
            reader, writer = await bench.dial(GET.replace(b"/", b"/wait", 1))
            await bench.app.waiting.acquire()
            await asyncio.sleep(0.5)
            bench.app.go.set()
            assert (await answer_of(reader))[0] == 200
            writer.close()

    run(scenario)


@PROTOCOLS
def test_a_request_behind_another_one_waits_as_long_as_that_takes(protocol: Any) -> None:
    """Pipelined: the second one's body is not read before the first one is answered."""

    async def scenario() -> None:
        async with serving(replace(SHORT_BODY, head_s=0.2), protocol) as bench:
            reader, writer = await bench.dial(GET.replace(b"/", b"/wait", 1) + POST % 4 + b"12")
            await bench.app.waiting.acquire()
            await asyncio.sleep(0.6)
            bench.app.go.set()
            assert (await answer_of(reader))[0] == 200
            writer.write(b"34")
            assert await answer_of(reader) == (200, {"length": 4, "crowded": False})
            writer.close()

    run(scenario)


@PROTOCOLS
def test_a_websocket_may_be_silent(protocol: Any) -> None:
    async def scenario() -> None:
        limits = replace(PATIENT, head_s=0.1, silence_s=0.1, request_s=0.1)
        async with serving(limits, protocol, timeout_keep_alive=0.1) as bench:
            async with connect(f"ws://{LOOPBACK}:{bench.port}/") as websocket:
                await asyncio.sleep(0.5)
                await websocket.send("still there")
                assert await websocket.recv() == "still there"
                assert bench.connections == 1
            await eventually(lambda: bench.connections == 0)

    run(scenario)


# --- number


@PROTOCOLS
def test_the_newcomer_gets_in_and_the_silent_make_room(protocol: Any) -> None:
    """Silent ones first, then unfinished bodies; never one whose answer is under way."""

    async def scenario() -> None:
        async with serving(replace(PATIENT, connections=lambda: 4), protocol) as bench:
            waits = GET.replace(b"/", b"/wait", 1)
            busy, first = await bench.dial(waits)
            await bench.app.waiting.acquire()
            upload, second = await bench.dial(POST % 2 + b"a")
            await eventually(lambda: 1 in bench.app.seen)
            oldest, third = await bench.dial()
            await eventually(lambda: bench.connections == 3)
            silent, fourth = await bench.dial()
            await eventually(lambda: bench.connections == 4)
            async with httpx.AsyncClient() as client:
                assert (await client.get(bench.url)).status_code == 200
                assert await ended(oldest) == b""
                assert not silent.at_eof()
                more = [await bench.dial(waits) for _ in range(2)]
                for _ in more:
                    await bench.app.waiting.acquire()
                assert await ended(silent) == b""
            last, fifth = await bench.dial(waits)
            await bench.app.waiting.acquire()
            assert await ended(upload) == b"", "all others have an answer under way"
            bench.app.go.set()
            for reader in (busy, *(one for one, _ in more), last):
                assert (await answer_of(reader))[0] == 200
            for writer in (first, second, third, fourth, fifth, *(one for _, one in more)):
                writer.close()

    run(scenario)


def test_one_too_many_is_marked_where_all_others_are_busy() -> None:
    async def scenario() -> None:
        async with serving(replace(PATIENT, connections=lambda: 2)) as bench:
            waits = GET.replace(b"/", b"/wait", 1)
            busy = [await bench.dial(waits) for _ in range(2)]
            for _ in busy:
                await bench.app.waiting.acquire()
            async with httpx.AsyncClient() as client:
                assert (await client.get(bench.url)).json()["crowded"] is True
            bench.app.go.set()
            for reader, writer in busy:
                assert await answer_of(reader) == (200, {"length": 0, "crowded": False})
                writer.close()

    run(scenario)


def test_where_an_answer_may_be_cut_the_oldest_one_is() -> None:
    async def scenario() -> None:
        limits = replace(PATIENT, connections=lambda: 1, cut_busy=True)
        async with serving(limits) as bench:
            reader, writer = await bench.dial(GET.replace(b"/", b"/wait", 1))
            await bench.app.waiting.acquire()
            async with httpx.AsyncClient() as client:
                assert (await client.get(bench.url)).status_code == 200
            assert await ended(reader) == b""
            writer.close()
            bench.app.go.set()

    run(scenario)


@PROTOCOLS
def test_a_stream_makes_room_before_a_short_answer(protocol: Any) -> None:
    """However new: with a flood of streams, whoever asks for a document gets it."""

    async def scenario() -> None:
        limits = replace(PATIENT, connections=lambda: 3, cut_busy=True)
        async with serving(limits, protocol) as bench:
            reader, writer = await bench.dial(GET.replace(b"/", b"/wait", 1))
            await bench.app.waiting.acquire()
            streams = []
            for _ in range(6):
                streams.append(await bench.dial(GET.replace(b"/", b"/stream", 1)))
                assert b" 200 " in await head_of(streams[-1][0])
            for stream, _ in streams[:4]:
                await ended(stream)
            bench.app.go.set()
            assert (await answer_of(reader))[0] == 200
            for _, each in [(reader, writer), *streams]:
                each.close()

    run(scenario)


@PROTOCOLS
def test_a_flood_of_streams_does_not_cost_who_has_just_connected(protocol: Any) -> None:
    """And has not sent its request yet; whereas silent ones cost no stream."""

    async def scenario() -> None:
        limits = replace(PATIENT, connections=lambda: 6, cut_busy=True)
        stream = GET.replace(b"/", b"/stream", 1)
        async with serving(limits, protocol) as bench:
            reader, writer = await bench.dial()
            dialled = [await bench.dial(stream) for _ in range(20)]
            for flooding, _ in dialled[-3:]:
                assert b" 200 " in await head_of(flooding)
            writer.write(GET)
            assert (await answer_of(reader))[0] == 200
            silent = [await bench.dial() for _ in range(20)]
            for each, _ in silent[:14]:
                assert await ended(each) == b""
            assert not any(each.at_eof() for each, _ in dialled[-3:])
            for _, other in [(reader, writer), *dialled, *silent]:
                other.close()

    run(scenario)


def test_tls_handshakes_count_and_have_their_time() -> None:
    """asyncio's own server does not count them: each holds a descriptor for a minute."""
    tls = {"ssl_certfile": CERTIFICATE, "ssl_keyfile": CERTIFICATE}

    async def scenario() -> None:
        trusted = ssl.create_default_context(cafile=CERTIFICATE)
        async with serving(replace(PATIENT, connections=lambda: 3), **tls) as bench:
            silent = [await bench.dial() for _ in range(5)]
            async with httpx.AsyncClient(verify=trusted, timeout=DEADLINE_S) as client:
                answer = await client.get(f"https://{LOOPBACK}:{bench.port}/")
                assert answer.status_code == 200
            for reader, _ in silent[:3]:
                assert await ended(reader) == b""
            for _, writer in silent:
                writer.close()
        async with serving(SHORT_HEAD, **tls) as bench:
            reader, writer = await bench.dial()
            assert await ended(reader) == b""
            writer.close()

    run(scenario)


@pytest.mark.parametrize(
    ("files", "control", "main"),
    [(128, 16, 16), (512, 64, 320), (1024, 128, 768), (65535, 256, 65151), (-1, 256, 1048192)],
)
def test_the_control_plane_has_descriptors_of_its_own(
    files: int, control: int, main: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda which: (files, files))
    assert (connections_of_control(), connections_of_main()) == (control, main)
    assert connections_of_main(10) == 10
    assert connections_of_main(10**9) == main


@pytest.mark.parametrize("sockets", [1, 8, 32])
@pytest.mark.parametrize("files", [1024, 65535])
def test_held_sockets_together_leave_most_descriptors_to_workers(
    files: int, sockets: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda which: (files, files))
    assert sockets * connections_of_held(sockets) <= files // 4
    assert connections_of_held(sockets) >= 4


# --- early answers


def upload_with_httpx(url: str) -> int:
    return httpx.post(url, content=bytes(UPLOAD), timeout=DEADLINE_S).status_code


def upload_with_http_client(url: str) -> int:
    """Sends all before it reads anything, as most simple clients do."""
    parsed = httpx.URL(url)
    connection = http.client.HTTPConnection(parsed.host, parsed.port, timeout=DEADLINE_S)
    try:
        connection.request("POST", parsed.path, body=bytes(UPLOAD))
        return connection.getresponse().status
    finally:
        connection.close()


def upload_with_curl(url: str) -> int:
    words = ["-sS", "-o", "/dev/null", "-w", "%{http_code}", "--data-binary", "@-", url]
    command = [of_the_system("curl", "curl"), *words]
    done = subprocess.run(command, input=bytes(UPLOAD), capture_output=True, check=True)
    return int(done.stdout)


@PROTOCOLS
@pytest.mark.parametrize("path", ["/refuse", "/close"])
@pytest.mark.parametrize("upload", [upload_with_httpx, upload_with_http_client, upload_with_curl])
def test_a_refused_upload_sees_the_refusal(
    protocol: Any, path: str, upload: Callable[[str], int]
) -> None:
    """60 MB that nobody reads: without more, the kernel resets the connection."""

    async def scenario() -> None:
        async with serving(PATIENT, protocol) as bench:
            status = await asyncio.to_thread(upload, bench.url + path)
            assert status == 503

    run(scenario)


@PROTOCOLS
@pytest.mark.parametrize("path", [b"/refuse", b"/close"])
def test_a_slow_upload_sees_the_refusal_at_once(protocol: Any, path: bytes) -> None:
    async def scenario() -> None:
        async with serving(PATIENT, protocol) as bench:
            reader, writer = await bench.dial(POST.replace(b"/", path, 1) % 100 + b"a")
            assert await answer_of(reader) == (503, {"error": "later"})
            for _ in range(99):
                writer.write(b"a")
                await writer.drain()
            if path == b"/refuse":  # the connection goes on, behind a body that nobody read
                writer.write(GET)
                assert (await answer_of(reader))[0] == 200
            else:
                assert await reader.read() == b""
            writer.close()

    run(scenario)


@PROTOCOLS
def test_nobody_reads_for_ever(protocol: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is discarded has its time, too: in all, and without a byte."""
    monkeypatch.setattr("ichat_lifecycle.adapters.http_connection.LINGER_S", 0.5)
    monkeypatch.setattr("ichat_lifecycle.adapters.http_connection.LINGER_SILENCE_S", 0.2)

    async def scenario() -> None:
        async with serving(PATIENT, protocol) as bench:
            for path in (b"/refuse", b"/close"):
                post = POST.replace(b"/", path, 1) % UPLOAD
                reader, writer = await bench.dial(post)
                assert b"503" in await ended(reader)  # silent
                await eventually(lambda: bench.connections == 0)
                writer.close()
                reader, writer = await bench.dial(post)
                await head_of(reader)
                while bench.connections:
                    writer.write(b"a")
                    await asyncio.sleep(0.02)
                writer.close()

    run(scenario)


@PROTOCOLS
def test_after_a_discarded_body_the_keep_alive_counts(protocol: Any) -> None:
    async def scenario() -> None:
        async with serving(PATIENT, protocol, timeout_keep_alive=0.2) as bench:
            reader, writer = await bench.dial(POST.replace(b"/", b"/refuse", 1) % 2)
            assert (await answer_of(reader))[0] == 503
            writer.write(b"ab")
            assert await reader.read() == b""
            writer.close()

    run(scenario)


@PROTOCOLS
def test_a_refusal_asks_for_no_body(protocol: Any) -> None:
    """`Expect: 100-continue`: the answer comes in place of 100, and the connection ends."""

    async def scenario() -> None:
        async with serving(PATIENT, protocol) as bench:
            post = (POST % 5).replace(b"Host: x", b"Host: x\r\nExpect: 100-continue")
            reader, writer = await bench.dial(post.replace(b"/", b"/refuse", 1))
            answer = await reader.read()
            assert answer.startswith(b"HTTP/1.1 503 ")
            assert b"connection: close" in answer.lower()
            writer.close()
            reader, writer = await bench.dial(post)
            assert (await head_of(reader)).startswith(b"HTTP/1.1 100 ")
            writer.write(b"abcde")
            assert await answer_of(reader) == (200, {"length": 5, "crowded": False})
            writer.close()

    run(scenario)


def test_a_refused_upload_over_tls_sees_the_refusal() -> None:
    """TLS has no half-closed connections here."""

    def upload(port: int) -> int:
        trusted = ssl.create_default_context(cafile=CERTIFICATE)
        url = f"https://{LOOPBACK}:{port}/close"
        with httpx.Client(verify=trusted, timeout=DEADLINE_S) as client:
            return client.post(url, content=bytes(UPLOAD)).status_code

    async def scenario() -> None:
        async with serving(ssl_certfile=CERTIFICATE, ssl_keyfile=CERTIFICATE) as bench:
            assert await asyncio.to_thread(upload, bench.port) == 503

    run(scenario)


# --- heads


@PROTOCOLS
def test_a_head_that_is_too_large_is_refused_and_its_client_sees_that(protocol: Any) -> None:
    def ask(port: int) -> bytes:
        with socket.create_connection((LOOPBACK, port), timeout=DEADLINE_S) as client:
            sending = threading.Thread(target=send_much, args=(client,))
            sending.start()
            answer = b"".join(iter(lambda: client.recv(1 << 16), b""))
            client.shutdown(socket.SHUT_RDWR)
            sending.join()
            return answer

    def send_much(client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 2**20)

    async def scenario() -> None:
        limits = replace(PATIENT, head_bytes=4096)
        size = limits.head_bytes
        async with serving(limits, protocol, h11_max_incomplete_event_size=size) as bench:
            answer = await asyncio.to_thread(ask, bench.port)
            assert answer.startswith((b"HTTP/1.1 431 ", b"HTTP/1.1 400 "))
            headers = {"x": "a" * 3000}
            async with httpx.AsyncClient() as client:
                for _ in range(3):  # each on the same connection: the limit is one head's
                    answered = await client.get(bench.url, headers=headers)
                    assert answered.status_code == 200
                large = await client.post(bench.url, content=bytes(10**6))
                assert large.json()["length"] == 10**6, "a body is no head"

    run(scenario)


@PROTOCOLS
def test_a_head_of_too_many_lines_is_refused(protocol: Any) -> None:
    async def scenario() -> None:
        few = replace(PATIENT, head_count=20)
        async with serving(few, protocol) as bench, httpx.AsyncClient() as client:
            many = {f"x-{n}": "a" for n in range(20)}
            answer = await client.get(bench.url, headers=many)
            assert (answer.status_code, answer.json()["error"]["code"]) == (431, 431)
            assert (await client.get(bench.url)).status_code == 200

    run(scenario)
