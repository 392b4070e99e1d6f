"""Uvicorn as all of our HTTP servers run it.

Signals are left alone, a stop is prompt, connections have limits, and refusals reach their clients.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn

from ichat_lifecycle.adapters.acceptor import Acceptor
from ichat_lifecycle.adapters.connections import Crowd, Limits
from ichat_lifecycle.adapters.http_connection import LimitedAuto

# How often Uvicorn refreshes the `Date` header and counts requests; a stop does not wait for it.
TICK_S = 0.1
# How often a stop looks whether connections are left.
POLL_S = 0.01


class PromptServer(uvicorn.Server):
    """Ends as soon as it may.

    Uvicorn's own looks ten times a second whether to end, sleeps for 0.1 s, and then looks ten
    times a second whether connections are left: up to 0.3 s in which nothing happens.

    Args:
        limits: of its connections.
        protocol: one of http_connection.

    Attributes:
        listening: set once it accepts connections.
    """

    def __init__(self, config: uvicorn.Config, limits: Limits, protocol: Any = LimitedAuto) -> None:
        super().__init__(config)
        self._protocol = protocol
        self._crowd = Crowd(limits, self._count)
        self._acceptor = Acceptor(self._make_connection, self._crowd, lambda: self.config.ssl)
        self._listeners: list[socket.socket] = []
        self.listening = asyncio.Event()
        self._woken = asyncio.Event()

    def wake(self) -> None:
        """There is a reason to end, which on_tick() will see; on the server's own loop."""
        self._woken.set()

    def serving(self, sock: socket.socket | None) -> asyncio.Task[None]:
        """Serves on the socket; a task, for `begun` and for the end."""
        return asyncio.create_task(self.serve(sockets=[sock] if sock else None), name="uvicorn")

    async def begun(self, serving: asyncio.Task[None]) -> bool:
        """Whether it listens, once that is clear. Before that it must not be asked to exit: Uvicorn
        would skip its shutdown."""
        listening = asyncio.create_task(self.listening.wait())
        try:
            await asyncio.wait({listening, serving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            listening.cancel()
        return not serving.done()

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            await super().serve(sockets)
        finally:
            self._acceptor.close()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # signals belong to the worker alone

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=[])  # without any, Uvicorn accepts nothing itself
        for sock in sockets or []:
            self.accept_on(sock)
        self.listening.set()

    @property
    def accepting(self) -> bool:
        """Whether new connections are accepted."""
        return self._acceptor.accepting

    def accept_on(self, sock: socket.socket) -> None:
        """Accept connections on one more bound socket, which is closed with the server."""
        self._listeners.append(sock)
        self.borrow(sock)

    def borrow(self, sock: socket.socket) -> None:
        """Accept connections on one more bound socket, which stays open after the server."""
        self._acceptor.accept_on(sock, self.config.backlog)

    def let_go(self, sock: socket.socket) -> None:
        """Accept no more on this socket, which stays open until the server ends."""
        self._acceptor.let_go(sock)

    def let_go_of_all(self) -> None:
        """Accept no more at all, from now on."""
        self._acceptor.let_go_of_all()

    def _count(self) -> int:
        return len(self.server_state.connections) + self._acceptor.connecting

    def _make_connection(self, crowded: bool, on_made: Callable[[], None]) -> asyncio.Protocol:
        made: asyncio.Protocol = self._protocol(
            config=self.config,
            server_state=self.server_state,
            app_state=self.lifespan.state,
            crowd=self._crowd,
            crowded=crowded,
            on_made=on_made,
        )
        return made

    def hang_up(self) -> None:
        """Closes idle connections, and the others after their answers."""
        for connection in list(self.server_state.connections):
            connection.shutdown()

    async def main_loop(self) -> None:
        ticks = 0
        while not await self.on_tick(ticks):
            ticks += 1
            self._acceptor.refill()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TICK_S):
                    await self._woken.wait()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stops listening, closes idle connections, and waits until the others are answered.

        They have `timeout_graceful_shutdown`, if there is one; `force_exit` gives them up.
        """
        await self._acceptor.stop()
        for sock in self._listeners:
            sock.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        try:
            async with asyncio.timeout(self.config.timeout_graceful_shutdown):
                await self._answered()
        except TimeoutError:
            for task in self.server_state.tasks:
                task.cancel("the HTTP server's graceful shutdown took too long")
        self.abort()
        await asyncio.sleep(0)  # their ends are seen before the server's own

    def abort(self) -> None:
        """Close every connection that is left, whatever is under way on it."""
        for connection in list(self.server_state.connections):
            connection.transport.abort()

    async def _answered(self) -> None:
        state = self.server_state
        while (state.connections or state.tasks) and not self.force_exit:
            await asyncio.sleep(POLL_S)
