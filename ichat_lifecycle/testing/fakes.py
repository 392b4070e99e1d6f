"""Fakes of every port. What each call does is a plan, so that any life can be written down."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from ichat_lifecycle.ports import (
    FaultReport,
    PhaseReport,
    Ports,
    Verdict,
    VerdictReport,
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one call does: after `delay_s` it returns, or raises `error`.

    `hang` waits until cancelled; `ignore_cancel_s` swallows cancellation and goes on that long.
    """

    delay_s: float = 0.0
    error: BaseException | None = None
    hang: bool = False
    ignore_cancel_s: float = 0.0

    async def play(self) -> None:
        try:
            await asyncio.sleep(1e9 if self.hang else self.delay_s)
        except asyncio.CancelledError:
            if not self.ignore_cancel_s:
                raise
            await asyncio.sleep(self.ignore_cancel_s)
        if self.error is not None:
            raise self.error


@dataclass
class FakeWorld:
    """Everything outside the lifecycle: plans in, a log of calls out.

    `plan` names calls as "engine.start", "server.drained", "probe.canary"…; a list is used up one
    call at a time, its last entry for ever.
    """

    plan: dict[str, Outcome | list[Outcome]] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    held: list[str] = field(default_factory=list)
    released: list[str] = field(default_factory=list)
    alive: bool = False
    asleep: bool = False
    health: bool = True
    in_flight: int = 0
    on_fault: FaultReport | None = None
    on_verdict: VerdictReport | None = None
    paces: list[float] = field(default_factory=list)

    async def play(self, name: str) -> None:
        self.calls.append(name)
        planned = self.plan.get(name, Outcome())
        if isinstance(planned, list):
            planned = planned.pop(0) if len(planned) > 1 else planned[0]
        await planned.play()

    def acquire(self, name: str) -> None:
        self.held.append(name)

    def let_go(self, name: str) -> None:
        self.released.append(name)

    def ports(self, *companions: str) -> Ports:
        """All ports, with one companion for each name."""
        return Ports(
            arguments=FakeArguments(self),
            binder=FakeBinder(self),
            engine=FakeEngine(self),
            server=FakeServer(self),
            probe=FakeProbe(self),
            watchdog=FakeWatchdog(self),
            clock=FakeClock(),
            companions=tuple(FakeCompanion(self, name) for name in companions),
        )


@dataclass
class FakeArguments:
    world: FakeWorld

    async def validate(self, on_phase: PhaseReport) -> None:
        on_phase("importing", None)
        await self.world.play("arguments.validate")


@dataclass
class FakeBinder:
    world: FakeWorld

    async def bind(self) -> None:
        self.world.acquire("socket")
        await self.world.play("binder.bind")

    async def release(self) -> None:
        self.world.let_go("socket")
        await self.world.play("binder.release")


@dataclass
class FakeEngine:
    world: FakeWorld

    @property
    def alive(self) -> bool:
        return self.world.alive

    async def start(self, on_fault: FaultReport, on_phase: PhaseReport) -> None:
        self.world.acquire("engine")
        self.world.on_fault = on_fault
        on_phase("loading_weights", 0.5)
        await self.world.play("engine.start")
        self.world.alive = True

    async def release(self, *, now: bool) -> None:
        self.world.let_go("engine")
        self.world.alive = False
        await self.world.play("engine.release_now" if now else "engine.release")

    def kill(self) -> None:
        self.world.calls.append("engine.kill")

    async def is_sleeping(self) -> bool:
        await self.world.play("engine.is_sleeping")
        return self.world.asleep

    async def sleep(self, level: int) -> None:
        await self.world.play("engine.sleep")
        self.world.asleep = True

    async def wake_up(self) -> None:
        await self.world.play("engine.wake_up")
        self.world.asleep = False

    async def reset_prefix_cache(self) -> None:
        await self.world.play("engine.reset_prefix_cache")

    async def describe(self) -> Mapping[str, Any]:
        await self.world.play("engine.describe")
        return {"model": "fake"}


@dataclass
class FakeServer:
    world: FakeWorld

    @property
    def in_flight(self) -> int:
        return self.world.in_flight

    async def open(self, sock: Any, on_fault: FaultReport) -> None:
        self.world.acquire("server")
        await self.world.play("server.open")

    async def attach(self) -> None:
        self.world.acquire("app")
        await self.world.play("server.attach")

    async def detach(self) -> None:
        self.world.let_go("app")
        await self.world.play("server.detach")

    async def drained(self) -> None:
        await self.world.play("server.drained")

    async def cut(self) -> None:
        await self.world.play("server.cut")

    async def close(self) -> None:
        self.world.let_go("server")
        await self.world.play("server.close")


@dataclass
class FakeProbe:
    world: FakeWorld

    async def health(self) -> bool:
        await self.world.play("probe.health")
        return self.world.health

    async def warm_up(self) -> None:
        await self.world.play("probe.warm_up")

    async def canary(self) -> None:
        await self.world.play("probe.canary")


@dataclass
class FakeWatchdog:
    """Says only what a test has it say, through `world.on_verdict`."""

    world: FakeWorld

    async def start(self, on_verdict: VerdictReport) -> None:
        self.world.acquire("watchdog")
        self.world.on_verdict = on_verdict
        await self.world.play("watchdog.start")

    def pace(self, interval_s: float) -> None:
        self.world.paces.append(interval_s)

    async def stop(self) -> None:
        self.world.let_go("watchdog")
        await self.world.play("watchdog.stop")


@dataclass
class FakeCompanion:
    world: FakeWorld
    name: str

    async def start(self) -> None:
        self.world.acquire(self.name)
        await self.world.play(f"{self.name}.start")

    async def stop(self) -> None:
        self.world.let_go(self.name)
        await self.world.play(f"{self.name}.stop")


class FakeClock:
    """Follows the loop's virtual time from a fixed day on."""

    def now(self) -> datetime:
        try:
            seconds = asyncio.get_running_loop().time()
        except RuntimeError:
            seconds = 0.0
        return datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=seconds)


def say(world: FakeWorld, *verdicts: Verdict) -> None:
    """Has the watchdog say these."""
    assert world.on_verdict is not None, "the watchdog is not running"
    for verdict in verdicts:
        world.on_verdict(verdict)
