"""Notices that somebody has shut down a listening socket that other processes share.

`shutdown()` acts on the socket itself, not on one process's descriptor: whoever has inherited a
listener can end it for all that hold it. Nothing is reported: `accept()` fails from then on, and
only for those who accept.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
from collections.abc import Callable

# Without EPOLLIN: connections that wait are for whoever serves, and must not wake this process.
# A hang-up is always reported; the flag is for a Unix socket of which only one direction was ended.
_EVENTS = select.EPOLLRDHUP


class ShutdownWatch:
    """Watches one socket at a time; for the calling event loop.

    Args:
        on_shut_down: called on the loop, once for each call of `watch`.

    Raises:
        OSError: there is no file descriptor left.
    """

    def __init__(self, on_shut_down: Callable[[], None]) -> None:
        self._on_shut_down = on_shut_down
        self._loop = asyncio.get_running_loop()
        # Of its own, because the loop's selector asks for readability as well.
        self._epoll = select.epoll()
        self._watched = -1
        self._loop.add_reader(self._epoll.fileno(), self._fire)

    def watch(self, sock: socket.socket) -> None:
        """Watch this socket from now on, in place of the one before."""
        self._forget()
        self._watched = sock.fileno()
        self._epoll.register(self._watched, _EVENTS)

    def close(self) -> None:
        """Stop watching. Idempotent; to be called before the socket is closed."""
        if not self._epoll.closed:
            self._loop.remove_reader(self._epoll.fileno())
            self._epoll.close()

    def _forget(self) -> None:
        if self._watched >= 0:
            with contextlib.suppress(OSError):  # it has been closed
                self._epoll.unregister(self._watched)
            self._watched = -1

    def _fire(self) -> None:
        if self._epoll.poll(0):
            self._forget()
            self._on_shut_down()
