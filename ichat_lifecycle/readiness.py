"""SERVING: what has to be shown before a worker is READY. Runs in the writer's own loop."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import structlog

from ichat_lifecycle.bounds import Interrupted
from ichat_lifecycle.config import WarmUpRequest
from ichat_lifecycle.errors import DeadlineError, StartError
from ichat_lifecycle.ports import Notice, Probe

if TYPE_CHECKING:
    from ichat_lifecycle.lifecycle import Lifecycle

log = structlog.get_logger("ichat_lifecycle")


class Readiness:
    """The proof of readiness, anew for each engine."""

    def __init__(self, life: Lifecycle, probe: Probe) -> None:
        self._life = life
        self._probe = probe
        self._noticed: frozenset[str] = frozenset()  # codes of the last engine's warnings
        self._last = ""  # what stood in the way when it was last looked at

    async def prove(self) -> None:
        """Waits for `/health` and the main port, then warms up.

        Raises:
            StartError: a warm-up request was not answered as it should be.
            DeadlineError: `start.ready_timeout` has passed; its root cause is what came instead.
        """
        timeout_s = self._life.settings.start.ready_timeout
        try:
            with self._life.deadline(timeout_s, "proving readiness"):
                await self._await_health()
                await self._inspect()
                await self._warm_up()
        except DeadlineError as error:
            error.root_cause = error.root_cause or self._last
            error.hint = error.hint or "raise start.ready_timeout if it only needs longer"
            raise

    async def _await_health(self) -> None:
        life = self._life
        life.report_phase("waiting_for_health")
        self._last = "/health has not answered"
        while not (found := await life.bounded(self._probe.health(), "health")).passed:
            self._last = found.problem
            await life.bounded(asyncio.sleep(life.settings.start.poll_interval), "between polls")
        life.learn(health_answered=True)

    async def _inspect(self) -> None:
        """What is found here is shown to operators; it keeps nobody from being READY."""
        self._last = "the look at what clients will meet has not ended"
        try:
            found = await self._life.bounded(self._probe.inspect(), "inspection")
        except (Interrupted, DeadlineError):
            raise
        except Exception as error:
            log.warning("inspection_failed", error=repr(error))
            return
        codes = frozenset(notice.code for notice in found)
        self._life.recorder.warn(*found, instead_of=self._noticed - codes)
        self._noticed = codes

    async def _warm_up(self) -> None:
        life, wanted = self._life, self._life.settings.warm_up.requests
        life.report_phase("warm_up")
        for number in range(1, wanted + 1):
            self._last = f"warm-up request {number} of {wanted} has not been answered"
            await life.bounded(self._probe.warm_up(), "warm-up")
        for number, request in enumerate(life.settings.warm_up.extra):
            name = f"warm_up.extra.{number} ({request.name or request.path})"
            self._last = f"{name} has not been answered"
            await self._warm_up_by(request, name, f"warm_up_extra_{number}_failed")
        life.learn(warmed_up=True)

    async def _warm_up_by(self, request: WarmUpRequest, name: str, code: str) -> None:
        try:
            asking = self._probe.request(request.path, request.body)
            await self._life.bounded(asking, "warm-up")
        except StartError as error:
            message, hint = f"{name}: {error.message}", "correct the request"
            if request.required:
                raise StartError(
                    message,
                    code="warm_up_failed",
                    root_cause=error.root_cause,
                    hint=f"{hint}, or set its `required` to false",
                ) from error
            self._noticed |= {code}
            self._life.recorder.warn(Notice(code, message, error.root_cause, hint))
