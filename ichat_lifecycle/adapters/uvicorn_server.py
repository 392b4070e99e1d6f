"""Uvicorn on the bound socket, behind the `Server` port.

One server for the whole life: it answers from BOUND on through the gate, and vLLM's app is attached
to it later. So no connection is refused while the model loads or the engine restarts.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import structlog
import uvicorn
from uvicorn.lifespan.on import LifespanOn

from ichat_lifecycle.adapters.connections import Limits, connections_of_main
from ichat_lifecycle.adapters.gate import Gate
from ichat_lifecycle.adapters.prompt_server import PromptServer
from ichat_lifecycle.adapters.refusal import App
from ichat_lifecycle.adapters.tls import Tls
from ichat_lifecycle.bounds import error_of
from ichat_lifecycle.config import Http
from ichat_lifecycle.errors import ArgumentsError, StartError
from ichat_lifecycle.ports import Fault, FaultReport

# vLLM's names; of the two Uvicorn has only the first one, and heeds it with h11 alone.
_HEAD_BYTES, _HEAD_COUNT = "h11_max_incomplete_event_size", "h11_max_header_count"

log = structlog.get_logger("ichat_lifecycle")


class AppBuilder(Protocol):
    """Builds the engine's ASGI app."""

    async def build(self) -> App: ...


class UvicornServer:
    """The `Server` port.

    Args:
        gate: the ASGI app that Uvicorn runs.
        options: gives Uvicorn's options as `vllm serve` would set them.
        builder: builds the app that is attached.
        refresher: makes vLLM's refresher of TLS certificates from an SSL context, where asked for.
        on_closing: called before connections are waited for, to end answers that would go on.
        http: the limits of clients.
    """

    def __init__(
        self,
        gate: Gate,
        options: Callable[[], Mapping[str, Any]],
        builder: AppBuilder,
        refresher: Callable[[uvicorn.Config], Any | None] = lambda config: None,
        on_closing: Callable[[], None] = lambda: None,
        http: Http | None = None,
    ) -> None:
        self._http = http or Http()
        self._gate = gate
        self._options = options
        self._builder = builder
        self._make_refresher = refresher
        self._on_closing = on_closing
        self._refresher: Any | None = None
        self._server: PromptServer | None = None
        self._task: asyncio.Task[None] | None = None
        self._lifespan: LifespanOn | None = None
        self._closing = False
        self._tls = Tls()

    @property
    def in_flight(self) -> int:
        return self._gate.in_flight

    async def open(self, sock: socket.socket | None, on_fault: FaultReport) -> None:
        """Serves the gate on the socket; returns once it listens."""
        options = dict(self._options())
        limits = self._limits(options.pop(_HEAD_BYTES, None), options.pop(_HEAD_COUNT, None))
        config = self._config(options, limits)
        self._server = server = PromptServer(config, limits)
        self._refresher = self._make_refresher(config)
        self._task = server.serving(sock)
        self._task.add_done_callback(lambda task: self._on_end(task, on_fault))
        if not await server.begun(self._task):
            error = error_of(self._task)
            raise StartError(
                "the HTTP server ended while it started",
                code="server_exited",
                root_cause=repr(error) if error else None,
            )

    def accept_on(self, sock: socket.socket) -> None:
        """Accepts connections on one more listening socket, until let_go() or close()."""
        assert self._server is not None, "it is open from BOUND on"
        self._server.accept_on(sock)

    def let_go(self, sock: socket.socket) -> None:
        """Leaves a socket that has been accepted on to others."""
        if self._server is not None:
            self._server.let_go(sock)

    def renew_certificate(self) -> None:
        """Serve new connections with what is in the files of the certificate now.

        Where they cannot be used, the certificate before stays, and an error is logged.
        """
        config = self._server.config if self._server is not None else None
        if config is None or config.ssl is None:
            return
        try:
            config.ssl = self._tls.context()
        except ArgumentsError as error:
            log.error("certificate_not_renewed", file=config.ssl_certfile, error=error.message)
            return
        log.info("certificate_renewed", file=config.ssl_certfile)
        if self._refresher is not None:  # it has the context before
            self._refresher.stop()
            self._refresher = self._make_refresher(config)

    def hang_up(self) -> None:
        """Has clients come back by the socket: closes idle connections, others once answered."""
        if self._server is not None:
            self._server.hang_up()

    def _limits(self, head_bytes: int | None, head_count: int | None) -> Limits:
        http = self._http
        return Limits(
            lambda: connections_of_main(http.max_connections),
            head_s=http.header_timeout,
            silence_s=http.body_timeout,
            head_bytes=head_bytes or Limits.head_bytes,
            head_count=head_count,
        )

    def _config(self, options: Mapping[str, Any], limits: Limits) -> uvicorn.Config:
        self._tls = tls = Tls.of(options.get)
        rest = {name: value for name, value in options.items() if not name.startswith("ssl_")}
        config = uvicorn.Config(self._gate, lifespan="off", workers=1, **rest)
        config.h11_max_incomplete_event_size = limits.head_bytes
        config.load()
        if tls.spoken:  # by a context of our own; Uvicorn says by these that it speaks it
            config.ssl = tls.context()
            config.ssl_certfile, config.ssl_keyfile = tls.certfile, tls.keyfile
            config.ssl_ca_certs = tls.ca_certs
        return config

    def _on_end(self, task: asyncio.Task[None], on_fault: FaultReport) -> None:
        error = None if task.cancelled() else task.exception()
        if not self._closing:
            on_fault(
                Fault(
                    "server_exited",
                    "the HTTP server ended by itself",
                    root_cause=repr(error) if error else None,
                )
            )

    async def attach(self) -> None:
        """Builds the app, runs its start-up, and lets requests through to it."""
        app = await self._builder.build()
        # Uvicorn's own implementation of the lifespan protocol; its server runs only the gate.
        lifespan = LifespanOn(uvicorn.Config(app, lifespan="on", log_config=None, workers=1))
        self._lifespan = lifespan
        await lifespan.startup()
        if lifespan.should_exit:
            raise StartError("vLLM's app failed in its start-up", code="app_start_failed")
        self._gate.app_state = lifespan.state
        self._gate.app = app

    async def detach(self) -> None:
        """Takes the app away and runs its shut-down."""
        self._gate.app = None
        self._gate.app_state = {}
        lifespan, self._lifespan = self._lifespan, None
        if lifespan is not None:
            await lifespan.shutdown()

    async def drained(self) -> None:
        await self._gate.drained()

    async def cut(self) -> None:
        await self._gate.cut()

    async def close(self) -> None:
        """Closes the listener and every connection."""
        self._closing = True
        self._on_closing()
        if self._refresher is not None:
            self._refresher.stop()
        server, task = self._server, self._task
        if server is None or task is None:
            return
        if not server.listening.is_set():
            # Uvicorn skips its shutdown when asked to exit during its start-up.
            task.cancel()
        server.should_exit = True
        server.wake()
        try:
            await asyncio.wait({task})
        finally:
            server.force_exit = True
