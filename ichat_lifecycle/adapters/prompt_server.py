"""Uvicorn as both of our HTTP servers run it: signals are left alone, and a stop is prompt."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
from collections.abc import Callable, Iterator
from typing import cast

import uvicorn

# How often Uvicorn refreshes the `Date` header and counts requests; a stop does not wait for it.
TICK_S = 0.1
# How often a stop looks whether connections are left.
POLL_S = 0.01
# Loop turns from accept() to a connection's entry in `server_state`, and one more.
ACCEPT_TURNS = 4


class PromptServer(uvicorn.Server):
    """Ends as soon as it may.

    Uvicorn's own looks ten times a second whether to end, sleeps for 0.1 s, and then looks ten
    times a second whether connections are left: up to 0.3 s in which nothing happens.

    Attributes:
        listening: set once it accepts connections.
    """

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
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

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # signals belong to the worker alone

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        self.listening.set()

    async def accept_on(self, sock: socket.socket) -> None:
        """Accepts connections on one more listening socket, as on those of the start-up."""
        config = self.config
        protocol = functools.partial(
            cast("Callable[..., asyncio.Protocol]", config.http_protocol_class),
            config=config,
            server_state=self.server_state,
            app_state=self.lifespan.state,
        )
        loop = asyncio.get_running_loop()
        self.servers.append(
            await loop.create_server(protocol, sock=sock, ssl=config.ssl, backlog=config.backlog)
        )

    def let_go(self, sock: socket.socket) -> None:
        """Accepts no more on this socket, which stays open."""
        asyncio.get_running_loop().remove_reader(sock.fileno())

    def hang_up(self) -> None:
        """Closes idle connections, and the others after their answers."""
        for connection in list(self.server_state.connections):
            connection.shutdown()

    async def main_loop(self) -> None:
        ticks = 0
        while not await self.on_tick(ticks):
            ticks += 1
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TICK_S):
                    await self._woken.wait()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stops listening, closes idle connections, and waits until the others are answered.

        They have `timeout_graceful_shutdown`, if there is one; `force_exit` gives them up.
        """
        await self._stop_accepting()
        for server in self.servers:
            server.close()
        for sock in sockets or []:
            sock.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        try:
            async with asyncio.timeout(self.config.timeout_graceful_shutdown):
                await self._answered()
        except TimeoutError:
            for task in self.server_state.tasks:
                task.cancel("the HTTP server's graceful shutdown took too long")

    async def _stop_accepting(self) -> None:
        """asyncio drops, open, what a server accepted in the turn in which it is closed."""
        loop = asyncio.get_running_loop()
        for server in self.servers:
            for sock in server.sockets:
                loop.remove_reader(sock.fileno())
        for _ in range(ACCEPT_TURNS):
            await asyncio.sleep(0)

    async def _answered(self) -> None:
        state = self.server_state
        while (state.connections or state.tasks) and not self.force_exit:
            await asyncio.sleep(POLL_S)
