"""The effects of each transition, through ports only. Method names are those the table uses."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import structlog

from ichat_lifecycle.bounds import Abandoned, Interrupted, Latch, error_of, race
from ichat_lifecycle.config import Settings
from ichat_lifecycle.errors import EngineDiedError
from ichat_lifecycle.journal import StageOutcome
from ichat_lifecycle.ports import (
    Companion,
    Fault,
    FaultReport,
    PhaseReport,
    Ports,
    Release,
    VerdictReport,
)
from ichat_lifecycle.resources import Released, ResourceStack

log = structlog.get_logger("ichat_lifecycle")

# Runs one call to the world, under this name.
Call = Callable[[Coroutine[Any, Any, Any], str], Awaitable[Any]]

SOCKET, SERVER, ENGINE, APP, WATCHDOG = "socket", "server", "engine", "app", "watchdog"


class StageReport(Protocol):
    """Told that a stage of a drain, a restart or a stop has ended."""

    def __call__(
        self,
        stage: str,
        outcome: StageOutcome,
        took_s: float,
        *,
        ended: int | None = None,
        error: BaseException | None = None,
    ) -> None: ...


@dataclass(frozen=True, slots=True)
class Hooks:
    """What the lifecycle lends its actions.

    `hurry` is set when a stop is to happen at once: no drain, the engine ended by force.
    `interrupt` is set when a stop or a fault ends whatever else goes on. `call` makes one call to
    the world on the way up, within the deadline that holds now.
    """

    hurry: Latch
    interrupt: Latch
    call: Call
    on_fault: FaultReport
    on_phase: PhaseReport
    on_verdict: VerdictReport
    on_released: Callable[[Released], None]
    on_stage: StageReport


class Actions:
    """Acquires and releases through the ports; decides nothing.

    `abandoned` holds what was cancelled on the way and may not have ended.
    """

    def __init__(
        self, ports: Ports, settings: Settings, resources: ResourceStack, hooks: Hooks
    ) -> None:
        self._ports = ports
        self._settings = settings
        self._resources = resources
        self._hooks = hooks
        self.abandoned = Abandoned()
        self._engines = 0  # how many have been released

    def by_name(self) -> Mapping[str, Callable[[], Awaitable[None]]]:
        """The actions by the names in the table."""
        return {
            "bind": self.bind,
            "start_engine": self.start_engine,
            "serve": self.serve,
            "become_ready": self.become_ready,
            "restart_engine": self.restart_engine,
            "stop": self.stop,
        }

    async def start_companion(self, companion: Companion) -> None:
        stop = self._settings.stop.companion
        await self._acquire(companion.name, companion.start, companion.stop, stop)

    async def bind(self) -> None:
        # The server answers 503 from here on: a port that is bound and silent hangs its clients.
        stop, binder, server = self._settings.stop, self._ports.binder, self._ports.server
        sock = await self._acquire(SOCKET, binder.bind, binder.release, stop.socket)
        await self._acquire(
            SERVER, lambda: server.open(sock, self._hooks.on_fault), server.close, stop.server
        )

    async def start_engine(self) -> None:
        report, engine = self._fault_report(self._engines), self._ports.engine
        await self._acquire(
            ENGINE,
            lambda: engine.start(report, self._hooks.on_phase),
            self._release_engine,
            self._settings.stop.engine,
        )

    def _fault_report(self, engine: int) -> FaultReport:
        def report(fault: Fault) -> None:
            # The death of an engine that is being replaced is not one of its successor.
            if engine == self._engines:
                self._hooks.on_fault(fault)

        return report

    async def serve(self) -> None:
        server = self._ports.server
        await self._acquire(APP, server.attach, server.detach, self._settings.stop.app)

    async def become_ready(self) -> None:
        watchdog = self._ports.watchdog
        await self._acquire(
            WATCHDOG,
            lambda: watchdog.start(self._hooks.on_verdict, self._fault_report(self._engines)),
            watchdog.stop,
            self._settings.stop.watchdog,
        )

    async def _acquire(
        self,
        name: str,
        acquire: Callable[[], Coroutine[Any, Any, Any]],
        release: Release,
        deadline_s: float,
    ) -> Any:
        """What is not begun is not held; what fails half way is."""
        if self._hooks.interrupt.is_set():
            raise Interrupted
        self._resources.push(name, release, deadline_s)
        return await self._hooks.call(acquire(), name)

    async def restart_engine(self) -> None:
        await self.cut()
        await self._resources.release_above(SERVER, self._hooks.on_released, self._hooks.interrupt)
        if self._resources.lost:
            lost = ", ".join(self._resources.lost)
            raise EngineDiedError(
                f"not released in time: {lost}; a new engine beside it would fail",
                code="engine_not_released",
            )

    async def stop(self) -> None:
        """Drains, then releases everything. Raises nothing: each error is reported."""
        if SERVER in self._resources.names and not await self._drained(self._hooks.hurry):
            await self.cut()
        await self._resources.release_above(None, self._hooks.on_released)

    async def drain(self) -> None:
        """Lets running requests finish, and cuts what is left at the deadline.

        Raises:
            Interrupted: a stop or a fault came first. Nothing was cut.
        """
        if not await self._drained(self._hooks.interrupt):
            if self._hooks.interrupt.is_set():
                raise Interrupted
            await self.cut()

    async def _drained(self, interrupt: Latch) -> bool:
        drained = self._ports.server.drained()
        return await self._tried("drain", drained, self._settings.stop.drain, interrupt)

    async def cut(self) -> None:
        """Ends what is in flight, each request with an explicit error; a failure is recorded."""
        if not await self._tried("cut", self._ports.server.cut(), self._settings.stop.cut):
            log.warning("cut_incomplete", in_flight=self._ports.server.in_flight)

    async def _tried(
        self,
        what: str,
        work: Coroutine[Any, Any, None],
        deadline_s: float,
        interrupt: Latch | None = None,
    ) -> bool:
        """Whether `work` ended well; a failure is recorded, as nothing may stop a stop."""
        loop, server = asyncio.get_running_loop(), self._ports.server
        began, before = loop.time(), server.in_flight
        task = asyncio.create_task(work, name=what)
        outcome, error = StageOutcome.INTERRUPTED, None
        try:
            if await race(task, deadline_s, interrupt):
                error = error_of(task)
                outcome = StageOutcome.FAILED if error else StageOutcome.DONE
            elif interrupt is None or not interrupt.is_set():
                outcome = StageOutcome.TIMED_OUT
        finally:
            task.cancel()
            self.abandoned.add(task)
            took_s, ended = loop.time() - began, before - server.in_flight
            self._hooks.on_stage(what, outcome, took_s, ended=ended, error=error)
        return outcome is StageOutcome.DONE

    async def _release_engine(self) -> None:
        self._engines += 1  # whatever it reports from now on is our own doing
        release = asyncio.ensure_future(self._ports.engine.release(now=self._hooks.hurry.is_set()))
        try:
            if not await race(release, None, self._hooks.hurry):
                self._ports.engine.kill()
            await release
        finally:
            release.cancel()
