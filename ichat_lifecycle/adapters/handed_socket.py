"""A listening socket that somebody else has bound and handed down, such as a fleet's supervisor.

It outlives the worker, and others may accept from it as well: the worker before, the one after, or
the supervisor while there is none. So a worker with such a socket

- asks itself on a socket of its own, which nobody else can answer;
- takes no more connections from the handed one a moment before it stops: they are somebody else's.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Protocol

from ichat_lifecycle.adapters.sockets import listening_socket, prepare_for_clients
from ichat_lifecycle.errors import ArgumentsError
from ichat_lifecycle.journal import Snapshot
from ichat_lifecycle.ports import Address
from ichat_lifecycle.states import State

LOOPBACK = "127.0.0.1"
# For the requests of connections that are accepted already: a part of the last resort's margin.
LET_GO_S = 0.25


def check_handed(fd: int) -> Address:
    """Where the inherited file descriptor listens.

    Raises:
        ArgumentsError: it is no listening stream socket.
    """
    sock = _handed(fd)
    try:
        return _address_of(sock)
    finally:
        sock.detach()


def _handed(fd: int) -> socket.socket:
    try:
        sock = socket.socket(fileno=fd)
    except OSError as error:
        raise ArgumentsError(f"--fd {fd}: not an open socket ({error.strerror})") from error
    listens = sock.type == socket.SOCK_STREAM and sock.getsockopt(
        socket.SOL_SOCKET, socket.SO_ACCEPTCONN
    )
    if not listens:
        sock.detach()
        raise ArgumentsError(
            f"--fd {fd}: not a listening socket", hint="bind it and call listen() before"
        )
    return sock


def _address_of(sock: socket.socket) -> Address:
    name = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        return Address(uds=str(name))
    return Address(str(name[0]), int(name[1]))


class HandedBinder:
    """The socket of a worker that was handed one (ports.Binder).

    Args:
        fd: the inherited file descriptor.
        tls: asked at bind(), whether TLS is spoken on it.

    Attributes:
        bound: the address of the handed socket; None while there is none.
        inside: that of the worker's own, for questions to itself.
        handed: the handed socket; None before bind() and after release().
    """

    def __init__(self, fd: int, tls: Callable[[], bool]) -> None:
        self._fd = fd
        self._tls = tls
        self._own: socket.socket | None = None
        self.handed: socket.socket | None = None
        self.bound: Address | None = None
        self.inside: Address | None = None

    async def bind(self) -> socket.socket:
        """The worker's own socket. Raises ArgumentsError: nothing was handed."""
        prepare_for_clients()
        tls = self._tls()
        self.handed = _handed(self._fd)
        self.handed.set_inheritable(False)
        found = _address_of(self.handed)
        self.bound = Address(found.host, found.port, found.uds, tls)
        self._own = listening_socket(LOOPBACK, 0)
        self.inside = Address(LOOPBACK, self._own.getsockname()[1], tls=tls)
        return self._own

    async def release(self) -> None:
        """Closes both; the handed one stays open where it came from. Safe without a bind."""
        for sock in (self._own, self.handed):
            if sock is not None:
                sock.close()
        self._own = self.handed = self.bound = self.inside = None


class Acceptor(Protocol):
    """What accepts connections."""

    def accept_on(self, sock: socket.socket) -> None: ...
    def let_go(self, sock: socket.socket) -> None: ...
    def hang_up(self) -> None: ...


class Stoppable(Protocol):
    """What is asked to stop; a lifecycle."""

    stop_hooks: list[Callable[[], None]]

    def ask_to_stop(self, cause: str, *, now: bool = False) -> None: ...


class Handover:
    """When the handed socket's connections are the worker's: a listener of its lifecycle.

    Args:
        lifecycle: is told to stop, a moment after the socket was let go of.
        when_ready: from READY on instead of from BOUND on, because somebody else serves until then.
    """

    def __init__(
        self,
        binder: HandedBinder,
        server: Acceptor,
        lifecycle: Stoppable,
        *,
        when_ready: bool,
    ) -> None:
        self._binder = binder
        self._server = server
        self._lifecycle = lifecycle
        self._begins = State.READY if when_ready else State.BOUND
        self._accepting = False
        self._state = State.PARSED
        self._loop: asyncio.AbstractEventLoop | None = None

    def changed(self, snapshot: Snapshot) -> None:
        self._state = snapshot.state
        if self._binder.handed is None:
            return
        if not self._accepting and snapshot.state is self._begins:
            self._loop = asyncio.get_running_loop()
            self._accepting = True
            self._server.accept_on(self._binder.handed)
        elif snapshot.state is State.STOPPING:
            self._let_go()
            self._server.hang_up()

    def _let_go(self) -> None:
        if self._accepting and self._binder.handed is not None:
            self._accepting = False
            self._server.let_go(self._binder.handed)

    def ask_to_stop(self, cause: str, *, now: bool = False) -> None:
        """Asks for a stop; from any thread, also in a signal's handler.

        A graceful one of a READY worker lets go of the socket first, and begins LET_GO_S later:
        whoever has connected by then is served, and the next ones are somebody else's. No client
        sees that there are two.
        """
        if now or self._loop is None or self._state is not State.READY:
            self._lifecycle.ask_to_stop(cause, now=now)
            return
        for hook in tuple(self._lifecycle.stop_hooks):  # the last resort counts from here on
            hook()
        self._loop.call_soon_threadsafe(self._let_go_and_stop, cause)

    def _let_go_and_stop(self, cause: str) -> None:
        self._let_go()
        asyncio.get_running_loop().call_later(LET_GO_S, self._lifecycle.ask_to_stop, cause)
