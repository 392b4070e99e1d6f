"""The listening sockets of a fleet: held by the supervisor, served on by whichever worker there is.

While no worker does, the supervisor answers 503 there itself, so that no client is ever refused and
none hangs: before a worker has bound, between two of them, while one backs off.
"""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace

import structlog
import uvicorn

from ichat_lifecycle.adapters.answer_headers import AnswerHeaders
from ichat_lifecycle.adapters.connections import Limits, connections_of_held
from ichat_lifecycle.adapters.http_connection import LINGER_S, LimitedH11
from ichat_lifecycle.adapters.lasting_socket import LastingSocket
from ichat_lifecycle.adapters.main_port_names import MainPortNames, misdirect
from ichat_lifecycle.adapters.prompt_server import PromptServer
from ichat_lifecycle.adapters.refusal import (
    CLOSE,
    UNAVAILABLE,
    Receive,
    Scope,
    Send,
    error_document,
    send_json,
)
from ichat_lifecycle.adapters.tls import Tls
from ichat_lifecycle.errors import ArgumentsError
from ichat_lifecycle.ports import Address

log = structlog.get_logger("ichat_lifecycle.fleet")

Certificate = tuple[str, str | None]
Speech = tuple[Certificate | None, str]

# All of a process, which share its file descriptors.
_held: weakref.WeakSet[HeldSocket] = weakref.WeakSet()
LIMITS = Limits(
    lambda: connections_of_held(len(_held)), head_s=10.0, head_bytes=16 * 1024, head_count=100
)
NO_HEADERS = AnswerHeaders()
RETRY_S = 0.5  # where nobody can listen
CLOSE_S = 1.0  # for answers under way, when the whole ends


@dataclass(frozen=True, slots=True)
class Absence:
    """Why no worker serves, as clients get it, with the headers that its worker's answers have.

    `retry_after_s` is for the header `Retry-After`; `hosts` are its worker's `http.hosts`.
    """

    message: str
    state: str
    retry_after_s: int
    headers: AnswerHeaders = NO_HEADERS
    hosts: tuple[str, ...] = ()


class HeldSocket:
    """One of them (fleet.ports.Socket).

    Args:
        absence: asked for each request that comes while nobody serves.
        on_lost: called once those who serve hold a socket that nobody can connect to any more.

    Raises:
        AddressError: the address is taken or not allowed.
    """

    def __init__(
        self,
        address: Address,
        absence: Callable[[], Absence],
        on_lost: Callable[[], None] = lambda: None,
    ) -> None:
        self._on_lost = on_lost
        self._absence = absence
        self._speaks: Speech = (None, "")
        self._config = self._made_config(None)  # before there is a port that a failure would keep
        self._listener = LastingSocket(address, self._take_new_socket)
        self._before: tuple[Speech, uvicorn.Config] = self._speaks, self._config
        self._owners: list[object] = []
        self._server: PromptServer | None = None
        self._ending: dict[asyncio.Task[None], PromptServer] = {}
        self._closing = False
        self._unusable = ""
        self._bound = None if address.uds else address.host
        self._changed = asyncio.Event()
        self._changed.set()
        _held.add(self)
        self._task = asyncio.create_task(self._attend(), name="held socket")

    @property
    def fd(self) -> int:
        return self._listener.sock.fileno()

    def certify(self, certificate: Certificate | None, digest: str = "") -> None:
        """Speak TLS with this certificate and key, or none; see fleet.ports.Socket.

        A change is taken back without reading the files, which may be other ones already.
        """
        wanted = certificate, digest
        if wanted == self._speaks:
            return
        speaks, config = self._before
        if wanted != speaks:
            config = self._made_config(certificate)
        self._before = self._speaks, self._config
        self._speaks, self._config = wanted, config
        if self._server is not None:
            self._server.config = self._config  # for connections from now on

    def served_by(self, who: object) -> None:
        if who not in self._owners:
            self._owners.append(who)
            self._changed.set()

    def left_by(self, who: object) -> None:
        if who in self._owners:
            self._owners.remove(who)
            self._changed.set()

    def _take_new_socket(self) -> None:
        """The one that was handed down is of no use any more."""
        if self._server is not None:
            self._server.let_go_of_all()  # before the socket is closed
        self._owners.clear()
        self._changed.set()
        self._on_lost()

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
            await self._end()
        finally:
            _held.discard(self)
            await self._listener.close()

    async def _change(self) -> None:
        await self._changed.wait()
        self._changed.clear()

    async def _answer(self) -> None:
        server = self._server = PromptServer(self._config, LIMITS, LimitedH11)
        sock, serving = self._listener.sock, server.serving(None)
        await server.begun(serving)
        unusable: OSError | None = None
        try:
            server.borrow(sock)  # not a copy, for which there may be no descriptor
        except OSError as error:
            unusable = error
        while sock is self._listener.sock and not (
            unusable or self._owners or self._closing or serving.done()
        ):
            await self._change()
        self._server = None
        server.let_go_of_all()
        server.should_exit = True
        server.wake()
        # In the background: who uploads much is answered, and still sending.
        self._ending[serving] = server
        serving.add_done_callback(self._ending.pop)
        if unusable is not None:
            await self._wait_after(unusable)

    async def _wait_after(self, error: OSError) -> None:
        """Nobody can listen there now, such as after a shutdown of which no word has come yet."""
        if str(error) != self._unusable:  # once, however often it is tried
            self._unusable = str(error)
            log.warning("held_socket_unusable", error=self._unusable)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(RETRY_S):
                await self._change()

    async def _end(self) -> None:
        """Ends the servers that are left."""
        if self._ending:
            await asyncio.wait(set(self._ending), timeout=CLOSE_S)
        for server in self._ending.values():
            server.force_exit = True
        if self._ending:
            await asyncio.wait(set(self._ending))

    def _made_config(self, speaks: Certificate | None) -> uvicorn.Config:
        """Loaded, so that what is wrong with a certificate is known now. Raises ArgumentsError."""
        certificate, key = speaks or (None, None)
        config = uvicorn.Config(
            self._app,
            interface="asgi3",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            h11_max_incomplete_event_size=LIMITS.head_bytes,
            workers=1,  # else WEB_CONCURRENCY is read, which may be no number
            proxy_headers=False,
            timeout_graceful_shutdown=int(LINGER_S),
        )
        config.load()
        if certificate is not None:
            config.ssl_certfile, config.ssl_keyfile = certificate, key
            try:
                config.ssl = Tls(certificate, key).context()
            except ArgumentsError as error:
                message = f"{certificate}, {key}: no TLS with these: {error.message}"
                raise ArgumentsError(message, hint=error.hint) from error
        return config

    async def _app(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1013})
            return
        absence = self._absence()
        names = MainPortNames(self._bound, absence.hosts, absence.headers.allowed_origins)
        if not names.trust(scope):  # a web page's, maybe
            absence = replace(absence, message="The worker does not serve.")

        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            # An API key does not open the lifecycle's routes to any name: nobody asks for it here.
            if names.refuse(scope, scope["path"]):
                await misdirect(send)
                return
            retry_after = (b"retry-after", str(absence.retry_after_s).encode())
            document = error_document(absence.message, UNAVAILABLE, absence.state)
            await send_json(
                send, UNAVAILABLE, document, [retry_after, CLOSE]
            )  # the next is for a worker

        await absence.headers.around(answer)(scope, receive, send)
