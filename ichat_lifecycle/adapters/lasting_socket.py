"""A listening socket that other processes hold too, and that none of them can end for good."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

import structlog

from ichat_lifecycle.adapters.shutdown_watch import ShutdownWatch
from ichat_lifecycle.adapters.sockets import BACKLOG, SocketBinder
from ichat_lifecycle.errors import AddressError
from ichat_lifecycle.ports import Address

log = structlog.get_logger("ichat_lifecycle.fleet")

# Between two revivals. A process that shuts the socket down in a loop costs its own clients more
# than it costs us.
FIRST_DELAY_S, LONGEST_DELAY_S = 0.2, 5.0
FORGIVEN_S = 60.0  # after so long a pause the next revival comes at once again


class LastingSocket:
    """Listens until `close`; for the calling event loop.

    After a `shutdown()` by whoever has inherited it, a TCP socket listens again as it is, so that
    each process that holds it may go on. A Unix socket cannot: another one takes its path, and who
    holds the former has to get it anew.

    Args:
        on_new: called once `sock` is another socket, before the former is closed.

    Raises:
        AddressError: the address is taken or not allowed.
        OSError: there is no file descriptor left.
    """

    def __init__(self, address: Address, on_new: Callable[[], None]) -> None:
        self._address = address
        self._on_new = on_new
        self._loop = asyncio.get_running_loop()
        self._binder = SocketBinder(lambda: address)
        self._watch = ShutdownWatch(self._shut_down)
        try:
            self.sock = self._binder.bind_now(address, address.host)
        except BaseException:
            self._watch.close()
            raise
        self._watch.watch(self.sock)
        self._timer: asyncio.TimerHandle | None = None
        self._delay_s = FIRST_DELAY_S
        self._revived_s = float("-inf")
        self._error = ""

    async def close(self) -> None:
        """Close the socket and remove its file. Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
        self._watch.close()
        await self._binder.release()

    def _shut_down(self) -> None:
        quiet_s = self._loop.time() - self._revived_s
        if quiet_s > FORGIVEN_S:
            self._delay_s = FIRST_DELAY_S
            hint = "a worker, or code that it runs, has called shutdown() on its listening socket"
            log.warning("socket_shut_down", address=self._address.url, hint=hint)
            self._revive()
        else:
            self._try_later()

    def _try_later(self) -> None:
        self._timer = self._loop.call_later(self._delay_s, self._revive)
        self._delay_s = min(2 * self._delay_s, LONGEST_DELAY_S)

    def _revive(self) -> None:
        self._revived_s = self._loop.time()
        try:
            self._listen_again()
            self._error = ""
        except (AddressError, OSError) as error:
            if str(error) != self._error:  # once, however often it is tried
                self._error = str(error)
                log.error("socket_not_revived", address=self._address.url, error=self._error)
            self._try_later()

    def _listen_again(self) -> None:
        """Raises AddressError, OSError."""
        if self.sock.family != socket.AF_UNIX:
            self.sock.listen(BACKLOG)
            self._watch.watch(self.sock)
            return
        former, self.sock = self.sock, self._binder.bind_now(self._address, self._address.host)
        self._watch.watch(self.sock)
        self._on_new()
        former.close()
