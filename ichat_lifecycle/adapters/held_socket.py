"""The listening sockets of a fleet: held by the supervisor, served on by whichever worker there is.

While no worker does, the supervisor answers 503 there itself, so that no client is ever refused and
none hangs: before a worker has bound, between two of them, while one backs off.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from dataclasses import dataclass

import uvicorn

from ichat_lifecycle.adapters.prompt_server import PromptServer
from ichat_lifecycle.adapters.refusal import (
    UNAVAILABLE,
    Receive,
    Scope,
    Send,
    error_document,
    read_body,
    send_json,
)
from ichat_lifecycle.adapters.sockets import SocketBinder
from ichat_lifecycle.errors import ArgumentsError
from ichat_lifecycle.ports import Address

Certificate = tuple[str, str | None]


@dataclass(frozen=True, slots=True)
class Absence:
    """Why no worker serves: what a client is told."""

    message: str
    state: str
    retry_after_s: int


class HeldSocket:
    """One of them (fleet.ports.Socket).

    Args:
        absence: asked for each request that comes while nobody serves.

    Raises:
        AddressError: the address is taken or not allowed.
    """

    def __init__(self, address: Address, absence: Callable[[], Absence]) -> None:
        self._binder = SocketBinder(lambda: address)
        self._sock = self._binder.bind_now(address, address.host)
        self._absence = absence
        self._certificate: Certificate | None = None
        self._config = self._made_config(None)
        self._owners: list[object] = []
        self._closing = False
        self._changed = asyncio.Event()
        self._changed.set()
        self._task = asyncio.create_task(self._attend(), name="held socket")

    @property
    def fd(self) -> int:
        return self._sock.fileno()

    def certify(self, certificate: Certificate | None) -> None:
        """Speaks TLS with this certificate and key, or none. Raises ArgumentsError."""
        if certificate == self._certificate:
            return
        self._config = self._made_config(certificate)
        self._certificate = certificate
        self._changed.set()

    def served_by(self, who: object) -> None:
        if who not in self._owners:
            self._owners.append(who)
            self._changed.set()

    def left_by(self, who: object) -> None:
        if who in self._owners:
            self._owners.remove(who)
            self._changed.set()

    async def close(self) -> None:
        self.close_now()
        await asyncio.wait({self._task})

    def close_now(self) -> None:
        self._closing = True
        self._changed.set()

    async def _attend(self) -> None:
        """Answers whenever nobody else does."""
        try:
            while not self._closing:
                if self._owners:
                    await self._change()
                else:
                    await self._answer()
        finally:
            await self._binder.release()

    async def _change(self) -> None:
        await self._changed.wait()
        self._changed.clear()

    async def _answer(self) -> None:
        # A copy: the server closes what it has accepted on.
        sock, config = self._sock.dup(), self._config
        server = PromptServer(config)
        serving = server.serving(sock)
        await server.begun(serving)
        while not (self._owners or self._closing or serving.done() or config is not self._config):
            await self._change()
        server.should_exit = True
        server.wake()
        await asyncio.wait({serving})

    def _made_config(self, speaks: Certificate | None) -> uvicorn.Config:
        """Loaded, so that what is wrong with a certificate is known now. Raises ArgumentsError."""
        certificate, key = speaks or (None, None)
        config = uvicorn.Config(
            self._app,
            interface="asgi3",
            lifespan="off",
            log_config=None,
            access_log=False,
            workers=1,  # else WEB_CONCURRENCY is read, which may be no number
            proxy_headers=False,
            timeout_graceful_shutdown=1,
            ssl_certfile=certificate,
            ssl_keyfile=key,
        )
        try:
            config.load()
        except (OSError, ssl.SSLError) as error:
            raise ArgumentsError(f"{certificate}, {key}: no TLS with these: {error}") from error
        return config

    async def _app(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1013})
            return
        await read_body(receive)
        absence = self._absence()
        headers = [
            (b"retry-after", str(absence.retry_after_s).encode()),
            (b"connection", b"close"),  # the next request is for a worker
        ]
        document = error_document(absence.message, UNAVAILABLE, absence.state)
        await send_json(send, UNAVAILABLE, document, headers)
