"""The effects of each transition, through ports only. Method names are those the table uses."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping

import structlog

from ichat_lifecycle.bounds import error_of, race
from ichat_lifecycle.config import Settings
from ichat_lifecycle.errors import EngineDiedError
from ichat_lifecycle.ports import FaultReport, PhaseReport, Ports, VerdictReport
from ichat_lifecycle.resources import Released, ResourceStack

log = structlog.get_logger("ichat_lifecycle")

SOCKET, SERVER, ENGINE, APP, WATCHDOG = "socket", "server", "engine", "app", "watchdog"


class Actions:
    """Acquires and releases through the ports; decides nothing.

    Args:
        hurry: set when a stop is to happen at once: no drain, the engine ended by force.
    """

    def __init__(
        self,
        ports: Ports,
        settings: Settings,
        resources: ResourceStack,
        hurry: asyncio.Event,
        *,
        on_fault: FaultReport,
        on_phase: PhaseReport,
        on_verdict: VerdictReport,
        on_released: Callable[[Released], None],
    ) -> None:
        self._ports = ports
        self._settings = settings
        self._resources = resources
        self._hurry = hurry
        self._on_fault = on_fault
        self._on_phase = on_phase
        self._on_verdict = on_verdict
        self._on_released = on_released

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

    async def bind(self) -> None:
        # The server answers 503 from here on: a port that is bound and silent hangs its clients.
        stop = self._settings.stop
        self._resources.push(SOCKET, self._ports.binder.release, stop.socket)
        sock = await self._ports.binder.bind()
        self._resources.push(SERVER, self._ports.server.close, stop.server)
        await self._ports.server.open(sock, self._on_fault)

    async def start_engine(self) -> None:
        self._resources.push(ENGINE, self._release_engine, self._settings.stop.engine)
        await self._ports.engine.start(self._on_fault, self._on_phase)

    async def serve(self) -> None:
        self._resources.push(APP, self._ports.server.detach, self._settings.stop.app)
        await self._ports.server.attach()

    async def become_ready(self) -> None:
        self._resources.push(WATCHDOG, self._ports.watchdog.stop, self._settings.stop.watchdog)
        await self._ports.watchdog.start(self._on_verdict)

    async def restart_engine(self) -> None:
        await self._cut()
        await self._resources.release_above(SERVER, self._on_released)
        if self._resources.lost:
            lost = ", ".join(self._resources.lost)
            raise EngineDiedError(
                f"not released in time: {lost}; a new engine beside it would fail",
                code="engine_not_released",
            )

    async def stop(self) -> None:
        """Drains, then releases everything. Raises nothing: each error is reported."""
        if SERVER in self._resources.names:
            await self.drain()
        await self._resources.release_above(None, self._on_released)

    async def drain(self) -> None:
        """Lets running requests finish, and cuts what is left at the deadline or on a hurry."""
        deadline_s = self._settings.stop.drain
        if not await self._tried(self._ports.server.drained(), deadline_s, self._hurry):
            await self._cut()

    async def _cut(self) -> None:
        if not await self._tried(self._ports.server.cut(), self._settings.stop.cut):
            log.warning("cut_incomplete", in_flight=self._ports.server.in_flight)

    async def _tried(
        self, work: Awaitable[None], deadline_s: float, interrupt: asyncio.Event | None = None
    ) -> bool:
        """Whether `work` ended well; a failure is logged, as nothing may stop a stop."""
        task = asyncio.ensure_future(work)
        try:
            if not await race(task, deadline_s, interrupt):
                return False
        finally:
            task.cancel()
        if error := error_of(task):
            log.error("drain_failed", error=repr(error))
        return error is None

    async def _release_engine(self) -> None:
        release = asyncio.ensure_future(self._ports.engine.release(now=self._hurry.is_set()))
        try:
            if not await race(release, None, self._hurry):
                self._ports.engine.kill()
            await release
        finally:
            release.cancel()
