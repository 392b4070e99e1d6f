"""A worker for the client's tests: a life in real time, with a real control plane."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from client_story import Story

from ichat_lifecycle.control.app import build_control_app
from ichat_lifecycle.control.events import Bell, Events
from ichat_lifecycle.control.server import ControlPlane

LOOPBACK = "127.0.0.1"
DEADLINE_S = 60.0


class LiveStory(Story):
    """One whose times are those of the clock on the wall."""

    def now(self) -> datetime:
        return datetime.now(UTC)

    def monotonic(self) -> float:
        return time.monotonic()


class _CountingBell(Bell):
    """Each reader of the events listens to it."""

    def __init__(self, worker: LiveWorker) -> None:
        super().__init__()
        self._worker = worker

    def listen(self) -> None:
        super().listen()
        self._worker.readers += 1


class LiveWorker:
    """An async context manager; what happens to `story` is seen by whoever listens."""

    def __init__(self, host: str = LOOPBACK, port: int = 0, **identity: Any) -> None:
        self.story = LiveStory(**identity)
        self.readers = 0  # of the events so far
        self._bell = _CountingBell(self)
        self._plane = ControlPlane(self._app, host, port, None, lambda url: None, self._bell.close)
        self.story.recorder.listeners.append(self._bell.ring)

    def _app(self) -> Any:
        identity = self.story.identity
        identity.control_url = self._plane.url
        events = Events(self.story.journal, identity.start_id, self._bell)
        return build_control_app(self.story, identity, events=events)

    async def __aenter__(self) -> Self:
        await self._plane.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def stop(self) -> None:
        """The control plane goes away, as that of a worker that ends."""
        await self._plane.stop()

    def hang_up(self) -> None:
        """Lets all connections go, as a control plane with too many of them does."""
        server: Any = self._plane._server
        loop = server._loop
        for connection in list(server.server_state.connections):
            loop.call_soon_threadsafe(connection.transport.abort)

    @property
    def url(self) -> str:
        return self._plane.url

    @property
    def port(self) -> int:
        return self._plane.address[1]


def lived(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Runs a scenario, for DEADLINE_S at most."""

    async def main() -> None:
        async with asyncio.timeout(DEADLINE_S):
            await scenario()

    asyncio.run(main())


def own_proc(directory: Path, pid: int | None = None) -> Path:
    """A /proc with nobody in it but `pid`, by default this process: others may have workers too."""
    for name in ("self", str(pid or os.getpid())):
        (directory / name).symlink_to(f"/proc/{name}")
    return directory


@contextlib.contextmanager
def nobody() -> Iterator[str]:
    """A URL where nothing listens: the port is taken, so that nobody else gets it."""
    with socket.socket() as sock:
        sock.bind((LOOPBACK, 0))
        yield f"http://{LOOPBACK}:{sock.getsockname()[1]}"


Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Coroutine[Any, Any, None]]


@contextlib.asynccontextmanager
async def something_else(
    answer: Answer, port: int = 0, tls: ssl.SSLContext | None = None
) -> AsyncIterator[str]:
    """The URL of a server that is no worker; `port` 0 (default): any that is free."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.CancelledError):
            await answer(reader, writer)
        writer.close()

    server = await asyncio.start_server(serve, LOOPBACK, port, ssl=tls)
    try:
        yield f"http{'s' if tls else ''}://{LOOPBACK}:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


def http_answer(status: str, media_type: str, body: bytes) -> Answer:
    """One answer to every request."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        head = f"HTTP/1.1 {status}\r\nContent-Type: {media_type}\r\nConnection: close\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        await writer.drain()

    return answer
