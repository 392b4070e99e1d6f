"""Accepts connections for a server, within its limits, and also when descriptors run out.

asyncio's own server accepts without a limit, counts no TLS handshakes, and pauses for a second with
a traceback each time that the process has no file descriptor left.
"""

from __future__ import annotations

import asyncio
import errno
import select
import socket
import ssl
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import structlog

from ichat_lifecycle.adapters.connections import Crowd, SpareDescriptors, Stage
from ichat_lifecycle.errors import OPEN_FILES_HINT

log = structlog.get_logger("ichat_lifecycle")

AT_ONCE = 32  # connections that are accepted in one turn of the loop
PAUSE_S = 0.2  # before the next try, where nothing can be accepted
WARNING_S = 60.0  # at most one warning in so long
SHUTDOWN_S = 5.0  # the closing handshake of TLS

_OUT_OF_RESOURCES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})

# Makes the protocol of a connection. True: it is one too many and every other one is busy. The
# function is to be called once the connection counts by itself.
Maker = Callable[[bool, Callable[[], None]], asyncio.Protocol]


class Acceptor:
    """Accepts on any number of listening sockets, which it does not close.

    Args:
        make: makes the protocol of a new connection.
        tls: the context that new connections are to use; None for no TLS.
    """

    def __init__(self, make: Maker, crowd: Crowd, tls: Callable[[], ssl.SSLContext | None]) -> None:
        self._make = make
        self._crowd = crowd
        self._tls = tls
        self._loop = asyncio.get_running_loop()
        self._spare = SpareDescriptors(crowd.limits.spare)
        self._sockets: set[socket.socket] = set()
        self._pauses: dict[socket.socket, asyncio.TimerHandle] = {}
        self._begun: set[_Handshake] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._warned_s = float("-inf")

    @property
    def connecting(self) -> int:
        """Connections that are accepted and not made yet; TLS handshakes, mostly."""
        return len(self._begun)

    @property
    def accepting(self) -> bool:
        """Whether there is a socket that it accepts on."""
        return bool(self._sockets)

    def accept_on(self, sock: socket.socket, backlog: int) -> None:
        """Accept connections on a bound socket from now on."""
        sock.setblocking(False)
        sock.listen(backlog)
        self._spare.refill()
        self._sockets.add(sock)
        self._resume(sock)

    def let_go(self, sock: socket.socket) -> None:
        """Accept no more on this socket. Idempotent."""
        self._sockets.discard(sock)
        if (pause := self._pauses.pop(sock, None)) is not None:
            pause.cancel()
        elif sock.fileno() >= 0:
            self._loop.remove_reader(sock)

    def let_go_of_all(self) -> None:
        for sock in tuple(self._sockets):
            self.let_go(sock)

    async def stop(self) -> None:
        """Accept no more; return once all that is accepted is a connection or closed."""
        self.let_go_of_all()
        for handshake in tuple(self._begun):
            if handshake.tls:
                handshake.drop()
        while self._tasks:
            await asyncio.wait(self._tasks)

    def close(self) -> None:
        """Accept no more, and hold no file descriptors. Idempotent."""
        self.let_go_of_all()
        self._spare.close()

    def refill(self) -> None:
        """Take back the spare file descriptors that are missing."""
        self._spare.refill()

    # --- accepting

    def _resume(self, sock: socket.socket) -> None:
        self._pauses.pop(sock, None)
        self._loop.add_reader(sock, self._on_readable, sock)

    def _on_readable(self, sock: socket.socket) -> None:
        sock.setblocking(False)  # whoever shares it may have changed that, and would stop our loop
        for _ in range(AT_ONCE):
            try:
                connection, _ = sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return  # another process was faster, or the client has gone
            except OSError as error:
                # Linux looks for a descriptor before it looks whether anybody waits for one.
                if not _somebody_waits(sock):
                    return
                if not self._find_descriptor(error):
                    self._pause(sock, error)
                    return
            else:
                full = self._crowd.full
                self._begin(connection, not self._crowd.make_room())
                if full:
                    return  # else those of one turn push out each other, their requests unread

    def _begin(self, connection: socket.socket, crowded: bool) -> None:
        connection.setblocking(False)
        handshake = _Handshake(connection, self._tls(), crowded, self._begun)
        self._crowd.place(handshake, Stage.WAITING)
        handshake.task = task = asyncio.create_task(self._connect(handshake), name="connection")
        self._tasks.add(task)
        task.add_done_callback(partial(self._end, handshake))

    def _find_descriptor(self, error: OSError) -> bool:
        """Whether there may be a file descriptor now, or in the loop's next turn."""
        if error.errno not in _OUT_OF_RESOURCES:
            return False
        return self._spare.release_one()

    def _pause(self, sock: socket.socket, error: OSError) -> None:
        """Try again later; at once, where a connection has made room."""
        out = error.errno in _OUT_OF_RESOURCES
        if out and self._crowd.drop_one():
            return  # its descriptor is closed within two turns of the loop
        now_s = time.monotonic()
        if now_s - self._warned_s >= WARNING_S:
            self._warned_s = now_s
            hint = OPEN_FILES_HINT if out else None
            log.warning("connections_not_accepted", error=error.strerror, hint=hint)
        self._loop.remove_reader(sock)
        self._pauses[sock] = self._loop.call_later(PAUSE_S, self._resume, sock)

    async def _connect(self, handshake: _Handshake) -> None:
        tls: dict[str, Any] = {}
        if handshake.tls is not None:
            tls["ssl_handshake_timeout"] = self._crowd.limits.head_s
            tls["ssl_shutdown_timeout"] = SHUTDOWN_S
        await self._loop.connect_accepted_socket(
            lambda: self._make(handshake.crowded, lambda: self._forget(handshake)),
            handshake.sock,
            ssl=handshake.tls,
            **tls,
        )

    def _end(self, handshake: _Handshake, task: asyncio.Task[None]) -> None:
        """Also of a task that was cancelled before its first step."""
        self._tasks.discard(task)
        self._forget(handshake)
        if task.cancelled() or task.exception():  # the client's failure, such as a bad handshake
            handshake.sock.close()

    def _forget(self, handshake: _Handshake) -> None:
        self._begun.discard(handshake)
        self._crowd.remove(handshake)


def _somebody_waits(sock: socket.socket) -> bool:
    poll = select.poll()  # needs no descriptor of its own
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))


class _Handshake:
    """A connection that has been accepted, until its protocol has it.

    Args:
        begun: all of them that count.
    """

    task: asyncio.Task[None]
    streams = False

    def __init__(
        self,
        sock: socket.socket,
        tls: ssl.SSLContext | None,
        crowded: bool,
        begun: set[_Handshake],
    ) -> None:
        self.sock, self.tls, self.crowded = sock, tls, crowded
        self._begun = begun
        begun.add(self)

    def drop(self) -> None:
        self._begun.discard(self)
        self.task.cancel()
