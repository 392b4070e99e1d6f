"""The control plane's thread: Uvicorn on a loop of its own, so that it answers in every state.

Idle connections cannot lock anybody out. Uvicorn's `limit_concurrency` counts connections, idle
ones too, and would answer 503 to the probe that comes after them. Here the newcomer always gets in
(see adapters.connections): the connection that has been without a request for longest makes room,
or the oldest of all where each has one under way. A request has to arrive within its time, its body
included, however slowly bytes drip in. Some file descriptors are kept, so that a probe gets in when
the process has none left.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import errno
import socket
import threading
from collections.abc import Callable, Sequence
from typing import Any

import structlog
import uvicorn

from ichat_lifecycle.adapters.connections import Limits, connections_of_control
from ichat_lifecycle.adapters.host_names import HostNames
from ichat_lifecycle.adapters.http_connection import LimitedH11
from ichat_lifecycle.adapters.prompt_server import PromptServer
from ichat_lifecycle.beacon import CONTROL_THREAD, name_this_thread
from ichat_lifecycle.control.web_guard import HostGuard
from ichat_lifecycle.errors import (
    AddressError,
    ArgumentsError,
    LifecycleError,
    LimitError,
    StartError,
    StopDeadlineError,
)
from ichat_lifecycle.ports import Address

log = structlog.get_logger("ichat_lifecycle")

PORT_OFFSET = 10_000
LAST_PORT = 65_535

CONTROL_LIMITS = Limits(
    connections_of_control,
    head_s=10.0,
    request_s=10.0,
    head_bytes=16 * 1024,
    body_bytes=256 * 1024,  # four times what the routes take
    unread_s=10.0,
    cut_busy=True,
    spare=4,
)
KEEP_ALIVE_S = 5
BACKLOG = 128

# A stop: answers under way may end within GRACE_S; all of it fits into STOP_S, and both into the
# second that config.Stop gives a companion.
GRACE_S = 0.3
STOP_S = 0.8
FORCED_S = 0.1


class ControlPlane:
    """The control plane as a companion of a lifecycle.

    Args:
        app_factory: makes the ASGI app, called once in the new thread. Import what it needs
            before: an import cannot be interrupted by a stop.
        host: where to listen, for example 127.0.0.1.
        port: None: `main_port` + 10000, or any free port where that is not a valid one or is taken.
            0: any free.
        main_port: the worker's main port; None or 0 where it has none yet, or a Unix socket.
        announce: told the URL once it answers, on the caller's loop.
        on_stopping: called in the new thread before connections are waited for, to end answers
            that would go on for ever.
        hosts: names besides those of loopback that requests may be for; see HostNames.

    After start(): `address` is host and port as bound, `url` how a client here would write them.
    """

    name = "control plane"

    def __init__(
        self,
        app_factory: Callable[[], Any],
        host: str,
        port: int | None,
        main_port: int | None,
        announce: Callable[[str], None],
        on_stopping: Callable[[], None] = lambda: None,
        hosts: Sequence[str] = (),
    ) -> None:
        self.address: tuple[str, int] = (host, 0)
        self.url = ""
        self._app_factory = app_factory
        self._host = host
        self._port = port
        self._main_port = main_port
        self._announce = announce
        self._on_stopping = on_stopping
        self._hosts = hosts
        self._thread: threading.Thread | None = None
        self._server: _Server | None = None
        self._stop_asked = threading.Event()
        self._answering = _running_future()
        self._ended = _running_future()

    async def start(self) -> None:
        """Binds, starts the thread, and returns once it answers. Call it once.

        Raises:
            AddressError: the address is taken or not allowed.
            ArgumentsError: the port is no port.
            StartError: the app could not be made, or there are too many threads.
        """
        if self._thread is not None:
            raise RuntimeError("a control plane starts once; make a new one")
        sock = self._bind()
        host, port = sock.getsockname()[:2]
        self.address, self.url = (host, port), Address(host, port).url
        thread = threading.Thread(
            target=self._live, args=(sock,), name="control-plane", daemon=True
        )
        try:
            thread.start()
        except RuntimeError as error:
            sock.close()  # otherwise the thread's task
            raise LimitError(f"the control plane could not start: {error}") from error
        self._thread = thread
        await asyncio.wrap_future(self._answering)
        self._announce(self.url)

    async def stop(self) -> None:
        """Ends the thread and closes the socket, within 0.9 s. Safe at any time, also again.

        Raises:
            StopDeadlineError: the thread is stuck in the app.
        """
        self._stop_asked.set()
        if self._thread is None:
            return
        if self._server is not None:
            self._server.wake_from_outside()
        if not await self._has_ended(STOP_S):
            if self._server is not None:
                self._server.force_exit = True
            if not await self._has_ended(FORCED_S):
                raise StopDeadlineError("the control plane's thread did not end")
        self._thread.join()  # it has nothing left to do

    async def _has_ended(self, timeout_s: float) -> bool:
        done, _ = await asyncio.wait({asyncio.wrap_future(self._ended)}, timeout=timeout_s)
        return bool(done)

    def _bind(self) -> socket.socket:
        port = self._wanted_port()
        try:
            return self._listen(port)
        except (OSError, UnicodeError) as error:
            raise AddressError(
                f"--control-port: {_shown(self._host, port)} {_why_not(error)}",
                hint="choose another --control-port, or 0 for any free one"
                if _is_taken(error)
                else "choose another --control-host or --control-port",
            ) from error

    def _listen(self, port: int) -> socket.socket:
        """Nobody chose the default port, and from 32768 on (main port 22768) any client of this
        machine may have it: a free one takes its place."""
        try:
            return _listen(self._host, port)
        except OSError as error:
            if self._port is not None or not _is_taken(error):
                raise
            sock = _listen(self._host, 0)
        log.warning("control_port_taken", wanted=port, port=sock.getsockname()[1])
        return sock

    def _wanted_port(self) -> int:
        if self._port is None:
            wanted = (self._main_port or 0) + PORT_OFFSET
            return wanted if PORT_OFFSET < wanted <= LAST_PORT else 0
        if not 0 <= self._port <= LAST_PORT:
            raise ArgumentsError(f"--control-port {self._port}: expected 0 to {LAST_PORT}")
        return self._port

    # --- in the control plane's own thread ------------------------------------------------------

    def _live(self, sock: socket.socket) -> None:
        name_this_thread(CONTROL_THREAD)
        try:
            # Not the policy's loop: the data plane may have set one that suits only itself.
            with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
                runner.run(self._serve(sock))
        except BaseException as error:
            self._fail(error)
        finally:
            sock.close()
            self._ended.set_result(None)

    async def _serve(self, sock: socket.socket) -> None:
        config = uvicorn.Config(
            self._guarded(),
            interface="asgi3",
            ws="none",
            lifespan="off",
            log_config=None,
            # `access_log=False` would take the handlers of the whole process' access log away;
            # _Connection switches it off for its own.
            proxy_headers=False,
            workers=1,  # else WEB_CONCURRENCY is read, which may be no number
            server_header=False,
            backlog=BACKLOG,
            timeout_keep_alive=KEEP_ALIVE_S,
            h11_max_incomplete_event_size=CONTROL_LIMITS.head_bytes,
        )
        self._server = _Server(
            config,
            self._stop_asked,
            lambda: self._answering.set_result(None),
            self._on_stopping,
        )
        await self._server.serve(sockets=[sock])

    def _guarded(self) -> HostGuard:
        """Its app, which answers to its own names alone where a browser may be on the machine."""
        return HostGuard(self._app_factory(), HostNames(self.address[0], self._hosts))

    def _fail(self, error: BaseException) -> None:
        if self._answering.done():
            log.error("control_plane_died", exc_info=error)
        elif isinstance(error, LifecycleError):
            self._answering.set_exception(error)
        else:
            text = str(error) or type(error).__name__
            failure = StartError(f"the control plane could not start: {text}")
            failure.__cause__ = error
            self._answering.set_exception(failure)


class _Server(PromptServer):
    """One that another thread stops, and whose shutdown is bounded."""

    def __init__(
        self,
        config: uvicorn.Config,
        stop_asked: threading.Event,
        on_answering: Callable[[], None],
        on_stopping: Callable[[], None],
    ) -> None:
        super().__init__(config, CONTROL_LIMITS, _Connection)
        self._loop = asyncio.get_running_loop()
        self._stop_asked = stop_asked
        self._on_answering = on_answering
        self._on_stopping = on_stopping

    def wake_from_outside(self) -> None:
        """Has `stop_asked` looked at now, from any thread."""
        with contextlib.suppress(RuntimeError):  # its loop has ended
            self._loop.call_soon_threadsafe(self.wake)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_answering()

    async def on_tick(self, counter: int) -> bool:
        # Asked here, not by `should_exit`: set during startup, that would skip shutdown().
        return self._stop_asked.is_set() or await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._on_stopping()
        try:
            async with asyncio.timeout(GRACE_S):
                await super().shutdown(sockets)
        except TimeoutError:
            self.abort()
            await asyncio.sleep(0)  # their ends are seen before the loop's own


class _Connection(LimitedH11):
    """One that is not in the access log: that is the main port's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.access_log = False


def _running_future() -> concurrent.futures.Future[None]:
    """One that a waiter's cancellation does not cancel: the thread sets it in any case."""
    future: concurrent.futures.Future[None] = concurrent.futures.Future()
    future.set_running_or_notify_cancel()
    return future


def _listen(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(
        host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    return sock


def _shown(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _is_taken(error: Exception) -> bool:
    return getattr(error, "errno", None) == errno.EADDRINUSE


def _why_not(error: Exception) -> str:
    match getattr(error, "errno", None):
        case errno.EADDRINUSE:
            return "is taken"
        case errno.EACCES | errno.EPERM:
            return "is not allowed for this user"
        case errno.EADDRNOTAVAIL:
            return "is no address of this machine"
        case _:
            return f"cannot be bound: {getattr(error, 'strerror', None) or error}"
