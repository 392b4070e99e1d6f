"""The supervisor: a file in, exit code out. A fleet, its processes, sockets, signals and routes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import random
import secrets
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import structlog

from ichat_lifecycle import environment
from ichat_lifecycle.adapters import logs
from ichat_lifecycle.adapters.clock import SystemClock
from ichat_lifecycle.adapters.held_socket import Absence, HeldSocket
from ichat_lifecycle.adapters.host_rules import Host, warn_of_oom
from ichat_lifecycle.adapters.line_writer import LineWriter
from ichat_lifecycle.adapters.notify_socket import NotifySockets
from ichat_lifecycle.adapters.output_tail import OutputTail
from ichat_lifecycle.adapters.signals import StopSignals
from ichat_lifecycle.adapters.sockets import SocketBinder
from ichat_lifecycle.adapters.terminal import LiveStream
from ichat_lifecycle.adapters.threads import in_thread
from ichat_lifecycle.adapters.worker_process import SERVE, ServeLauncher
from ichat_lifecycle.beacon import FLEET_THREAD, FLEET_TOKEN_VARIABLE, name_this_thread
from ichat_lifecycle.client.fleet_table import FleetBoard
from ichat_lifecycle.config import TOKEN_VARIABLE, Restart
from ichat_lifecycle.control.events import Bell, Events
from ichat_lifecycle.control.fleet_app import build_fleet_app
from ichat_lifecycle.control.fleet_server import serving
from ichat_lifecycle.errors import OPEN_FILES_HINT, AddressError, ExitCode, LifecycleError
from ichat_lifecycle.fleet.asking import WorkerClients
from ichat_lifecycle.fleet.fleet import Fleet
from ichat_lifecycle.fleet.gateway import RunningGateway
from ichat_lifecycle.fleet.journal import LIMITS, FleetKind, ReloadRecord
from ichat_lifecycle.fleet.lines import bad_line, json_line
from ichat_lifecycle.fleet.load import Fleet as Content
from ichat_lifecycle.fleet.member import Member
from ichat_lifecycle.fleet.plans import Reading, read_plans
from ichat_lifecycle.fleet.ports import Plan
from ichat_lifecycle.fleet.slots import Slots
from ichat_lifecycle.fleet.states import Stage
from ichat_lifecycle.fleet.surroundings import Surroundings
from ichat_lifecycle.fleet.token import kept_token
from ichat_lifecycle.fleet.view import fleet_document
from ichat_lifecycle.journal import Journal
from ichat_lifecycle.ports import Address
from ichat_lifecycle.redact import Secrets

log = structlog.get_logger("ichat_lifecycle.fleet")

RETRY_S, LONGEST_RETRY_S = 5, 30
READING_S = 240.0  # with what vLLM's parser may take; a file system that hangs never answers
LOOK_S, LOOK_SHARE = 1.0, 0.05  # of a core, at most

Reader = Callable[[], Reading]


class Supervisor:
    """One run of `up`.

    Args:
        file: that is read again by a reload.
        read: reads it: what it says, and the plans that it comes to.
        stream: where the workers' lines go.
        hidden: what is scrubbed out of all lines and errors; what the file has is added to it.
        board: what people look at: of the lines they get only what is bad. None: there is none.
        command: what a worker is run with.
    """

    def __init__(
        self,
        file: Path,
        read: Reader,
        stream: logs.Writable,
        *,
        hidden: Secrets | None = None,
        board: FleetBoard | None = None,
        command: Sequence[str] = SERVE,
    ) -> None:
        self._path = file
        self._read = read
        self._stream = stream
        self._hidden = hidden or Secrets()
        self._board = board
        self._shown = json_line if board is None else bad_line
        self._command = command
        self._bell = Bell()
        self._journal = Journal(LIMITS)
        self._held: dict[str, HeldSocket] = {}
        self._hidden.add(os.environ.get(TOKEN_VARIABLE))
        self._reloading: asyncio.Task[Mapping[str, Any]] | None = None
        self._hang_ups: set[asyncio.Task[None]] = set()
        self._hung_up_early = False
        self._stop_asked = asyncio.Event()
        self._fleet: Fleet | None = None

    @property
    def file(self) -> str:
        return str(self._path)

    @property
    def _running(self) -> Fleet:
        assert self._fleet is not None, "nobody asks before there is one"
        return self._fleet

    # --- a whole run

    async def run(self) -> int:
        """Returns the exit code.

        Raises:
            LifecycleError: the file is wrong, or an address cannot be had. Nothing was started.
        """
        self._loop = asyncio.get_running_loop()
        self._install_signals()
        found = await self._first_reading()
        if found is None:
            return int(ExitCode.OK)
        self._output = OutputTail()
        notify = NotifySockets()
        try:
            fleet = self._fleet = self._make_fleet(found.content, notify)
            async with self._serving(found.content), self._looking():
                if self._stop_asked.is_set():
                    fleet.ask_to_stop()
                if self._hung_up_early:
                    self._hang_up()
                return await fleet.run(found.plans)
        finally:
            notify.close()

    async def _first_reading(self) -> Reading | None:
        """None where a stop was asked for meanwhile: vLLM's parser takes seconds."""
        reading = asyncio.ensure_future(self._read_file())
        stop = asyncio.create_task(self._stop_asked.wait())
        await asyncio.wait({reading, stop}, return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        return None if self._stop_asked.is_set() else await reading

    async def _read_file(self) -> Reading:
        log.info("reading", file=self.file)
        try:
            async with asyncio.timeout(READING_S):
                found = await in_thread(self._read, "reading the file")
        except TimeoutError as error:
            # Its thread goes on, and holds up nobody: the next reload has one of its own.
            raise LifecycleError(
                f"{self.file}: not read within {READING_S:g} s",
                code="not_read",
                hint="look at the file systems of the file, and of the paths in it",
            ) from error
        self._hidden.add(found.content.fleet.token)
        for plan in found.plans:
            self._hidden.collect(plan.env, plan.secret_argv)
        return found

    def _make_fleet(self, content: Content, notify: NotifySockets) -> Fleet:
        self._content, settings = content, content.fleet
        launcher = ServeLauncher(
            notify,
            lambda plan: self._held[plan.address].fd,
            self._take_line,
            os.environ.get(TOKEN_VARIABLE, ""),
            self._command,
            self._hidden.scrub,
            self._hidden.add,
        )
        self._around = Surroundings(
            launcher,
            Slots(settings.max_parallel_starts),
            Restart(**settings.restart.model_dump()),
            SystemClock(),
            random.random,
            self._journal,
            self._bell.ring,
            settings.watchdog,
            self._hidden.scrub,
        )
        return Fleet(self._around, self._open)

    def _install_signals(self) -> None:
        def stop(cause: str, *, now: bool) -> None:
            with contextlib.suppress(RuntimeError):  # it has ended
                self._loop.call_soon_threadsafe(self._asked_to_stop, cause, now)

        StopSignals(stop).install()
        hang_up = self._hang_up if self._board is None else self._lose_terminal
        self._loop.add_signal_handler(signal.SIGHUP, hang_up)

    def _asked_to_stop(self, cause: str, now: bool) -> None:
        log.info("stop_requested", cause=cause, now=now)
        self._stop_asked.set()
        if self._fleet is not None:
            self._fleet.ask_to_stop(now=now)

    def _lose_terminal(self) -> None:
        """In a terminal SIGHUP says that it is closed."""
        self._asked_to_stop("SIGHUP", now=False)

    def stop(self, *, now: bool) -> None:
        """As a signal does."""
        self._asked_to_stop("control", now)

    # --- lines

    def _take_line(self, name: str, line: str) -> None:
        self._output.add(name, line)
        text = self._shown(name, line)
        if text:
            self._stream.write(text + "\n")

    @contextlib.asynccontextmanager
    async def _looking(self) -> AsyncIterator[None]:
        """While it lasts, the board is kept up to date, where there is one."""
        if self._board is None:
            yield
            return
        async with contextlib.aclosing(WorkerClients(self._hidden)) as clients:
            looking = asyncio.create_task(self._keep_looking(self._board, clients))
            try:
                yield
            finally:
                looking.cancel()
                await self._look(self._board, clients)  # what is shown last is how it has ended

    async def _keep_looking(self, board: FleetBoard, clients: WorkerClients) -> None:
        """Once a second; less often where the workers are many."""
        while True:
            busy_s = time.process_time()
            await self._look(board, clients)
            busy_s = time.process_time() - busy_s
            await asyncio.sleep(max(LOOK_S, busy_s / LOOK_SHARE))

    async def _look(self, board: FleetBoard, clients: WorkerClients) -> None:
        board.document = await fleet_document(self._running, self.file, clients)

    # --- sockets

    def _open(self, plan: Plan) -> HeldSocket:
        """Raises AddressError."""
        address = Address(plan.host, plan.port, plan.uds)
        try:
            held = HeldSocket(
                address,
                lambda: self._absence(plan.address),
                lambda: self._running.lose_socket(plan.address),
            )
        except OSError as error:  # no file descriptor is left
            raise AddressError(
                f"{plan.name}: {plan.address}: {error.strerror}", hint=OPEN_FILES_HINT
            ) from error
        self._held[plan.address] = held
        return held

    def _absence(self, address: str) -> Absence:
        """What a client is told while nobody serves there."""
        here = [m for m in self._running.members if m.plan.address == address]
        here.sort(key=lambda member: member.leaving)
        if not here:
            return Absence("There is no worker any more.", Stage.STOPPED, LONGEST_RETRY_S)
        member = here[0]
        reason = f" ({member.reason})" if member.reason else ""
        message = f"The worker {member.name} does not serve: it is {member.stage.value}{reason}."
        return Absence(
            message,
            member.stage.value,
            self._retry_after_s(member),
            member.plan.answer_headers,
            member.plan.hosts,
        )

    def _retry_after_s(self, member: Member) -> int:
        expected_s = member.told.expected_s if member.told else None
        if member.stage is Stage.BACKING_OFF and member.due_s is not None:
            expected_s = member.due_s - self._loop.time() + RETRY_S
        return max(1, min(LONGEST_RETRY_S, math.ceil(expected_s or RETRY_S)))

    # --- reload

    async def reload(self) -> Mapping[str, Any]:
        """Reads the file again and does what has changed in it; after those that came before.

        Raises:
            LifecycleError: it is wrong, or something cannot be done. Nothing was changed.
        """
        while self._reloading is not None and not self._reloading.done():
            await asyncio.wait({self._reloading})
        self._reloading = asyncio.create_task(self._reload(), name="reload")
        return await self._reloading

    async def _reload(self) -> Mapping[str, Any]:
        try:
            found = await self._read_file()
            record = self._running.change(found.plans)
        except Exception as error:
            known = error if isinstance(error, LifecycleError) else LifecycleError(repr(error))
            known.scrub(self._hidden.scrub)
            now = SystemClock().now()
            self._journal.add(FleetKind.RELOAD, ReloadRecord(now, error=known.line()))
            self._bell.ring()
            log.error("reload_failed", error=known.line(), problems=list(known.told))
            raise known from error
        self._take_settings(found.content)
        return record.as_dict()

    def _take_settings(self, content: Content) -> None:
        """Those that can change while it runs, for workers that are started from now on."""
        settings = content.fleet
        self._around.slots.resize(settings.max_parallel_starts)
        self._around.restart = Restart(**settings.restart.model_dump())
        self._around.watchdog_s = settings.watchdog
        was = _fixed(self._content)
        fixed = [f"fleet.{key}" for key, value in _fixed(content).items() if value != was[key]]
        if fixed:
            log.warning("not_applied", keys=fixed)

    def _hang_up(self) -> None:
        """SIGHUP. One reload may wait for the one under way; it reads what is there by then."""

        async def reload() -> None:
            with contextlib.suppress(LifecycleError):  # it is logged
                await self.reload()

        if self._fleet is None:
            self._hung_up_early = True
        elif len(self._hang_ups) <= 1:
            task = asyncio.create_task(reload(), name="SIGHUP")
            self._hang_ups.add(task)
            task.add_done_callback(self._hang_ups.discard)

    # --- routes

    @contextlib.asynccontextmanager
    async def _serving(self, content: Content) -> AsyncIterator[None]:
        """While it lasts, the supervisor answers. Raises AddressError."""
        settings = content.fleet
        address = Address(settings.host, content.fleet_port, settings.uds)
        binder, sock = await _bound(address, may_be_another=settings.port is None)
        url = binder.bound.url if binder.bound else ""
        try:
            with kept_token(settings.token or os.environ.get(FLEET_TOKEN_VARIABLE)) as token:
                self._hidden.add(token)
                async with self._answering(sock, token, settings.hosts):
                    name_this_thread(FLEET_THREAD)
                    log.info("fleet", url=url, file=self.file, pid=os.getpid())
                    yield
        finally:
            await binder.release()

    @contextlib.asynccontextmanager
    async def _answering(
        self, sock: socket.socket, token: str, hosts: Sequence[str]
    ) -> AsyncIterator[None]:
        async with contextlib.aclosing(WorkerClients(self._hidden)) as clients:
            app = build_fleet_app(
                self._running,
                self,
                self._output,
                Events(self._journal, secrets.token_hex(4), self._bell),
                token=token,
                clients=clients,
                hidden=self._hidden,
            )
            async with serving(app, sock, hosts):
                try:
                    yield
                finally:
                    self._bell.close()
                    self._output.close()


async def _bound(address: Address, *, may_be_another: bool) -> tuple[SocketBinder, socket.socket]:
    """A listening socket there; with `may_be_another`, on any free port where that one is taken.

    Raises AddressError.
    """
    binder = SocketBinder(lambda: address, private=True)
    try:
        return binder, await binder.bind()
    except AddressError as error:
        if not may_be_another or address.uds or error.code != "address_taken":
            raise
    anywhere = Address(address.host, 0)
    binder = SocketBinder(lambda: anywhere)
    sock = await binder.bind()
    log.warning("fleet_port_taken", wanted=address.port, port=sock.getsockname()[1])
    return binder, sock


def _fixed(content: Content) -> Mapping[str, Any]:
    """What stays as it is as long as a supervisor runs."""
    settings = content.fleet
    port = content.fleet_port
    kept = {"host": settings.host, "port": port, "uds": settings.uds, "token": settings.token}
    return {**kept, "hosts": settings.hosts}


def up(
    file: Path,
    stream: TextIO | None = None,
    *,
    command: Sequence[str] = SERVE,
    read: Reader | None = None,
) -> int:
    """Runs all workers of a file until they have been stopped.

    Args:
        stream: where lines go, and in a terminal the table; default: stderr.
        command: what a worker is run with.
        read: reads the file; default: with vLLM's own parser for what is vLLM's.

    Raises:
        LifecycleError: the file is wrong, or an address cannot be had. Nothing was started.
    """
    notes = environment.prepare(os.environ)
    stream = stream or sys.stderr
    target: logs.Writable = stream
    board = FleetBoard(str(file)) if stream.isatty() else None
    gateway = RunningGateway()
    with contextlib.ExitStack() as stack:
        if board is not None:
            target = stack.enter_context(LiveStream(stream, board.table, refresh_per_s=2))
        lines = LineWriter(target, lambda count: log.warning("lines_dropped", count=count))
        stack.callback(lines.close)
        level = "info" if board is None else "warning"  # what goes well is in the table
        hidden = Secrets()
        hidden.collect_environment(os.environ)
        logs.configure(lines, as_json=board is None, scrub=hidden.scrub, level=level)
        environment.log_all(notes)
        warn_of_oom(Host())
        # A server begins and ends there with each absence of a worker.
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
        supervisor = Supervisor(
            file,
            read or (lambda: read_plans(file, os.environ, gateway=gateway)),
            lines,
            hidden=hidden,
            board=board,
            command=command,
        )
        code = asyncio.run(supervisor.run())
        if not lines.close():
            os._exit(code)  # nobody reads: whatever else wrote would wait for ever
        return code
