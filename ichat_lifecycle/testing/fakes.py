"""Fakes of every port. What each call does is a plan, so that any life can be written down."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from ichat_lifecycle.adapters.gate import Gate
from ichat_lifecycle.ports import (
    Case,
    Fault,
    FaultReport,
    HealthCheck,
    Notice,
    PhaseReport,
    Ports,
    Verdict,
    VerdictReport,
    Watchdog,
)
from ichat_lifecycle.testing.plan import USUAL, Outcome

COMPANIONS = ("control", "heartbeat")


class EngineGone(Exception):
    """What requests in flight get when the engine dies."""


@dataclass(slots=True, eq=False)
class Call:
    """One call to the world. `ended_s` is None while it is under way; times are the loop's."""

    name: str
    began_s: float
    ended_s: float | None = None
    error: BaseException | None = None
    cancelled: bool = False

    def was_cancelled(self) -> None:
        self.cancelled = True


@dataclass
class FakeWorld:
    """Everything outside the lifecycle: plans in, a history of calls out.

    `plan` names calls as "engine.start", "server.drained", "probe.canary"…; a sequence is used up
    one call at a time, its last entry for ever. `usual` is how long calls take that have no plan.
    """

    plan: Mapping[str, Outcome | Sequence[Outcome]] = field(default_factory=dict)
    usual: Mapping[str, float] = field(default_factory=dict)
    history: list[Call] = field(default_factory=list)
    # "+name" and "-name", in the order in which resources were acquired and released.
    touched: list[str] = field(default_factory=list)
    alive: bool = False
    frozen: bool = False
    asleep: bool = False
    health: bool = True
    notices: tuple[Notice, ...] = ()  # what an inspection finds
    in_flight: int = 0
    progress: float = 0.0
    gate: Gate | None = None
    app: Any = None
    hang_up: Callable[[], None] = lambda: None
    observe: Callable[[], None] = lambda: None
    faults: list[FaultReport] = field(default_factory=list)
    on_server_fault: FaultReport | None = None
    on_verdict: VerdictReport | None = None
    on_watchdog_fault: FaultReport | None = None
    paces: list[float] = field(default_factory=list)
    cases: list[Case] = field(default_factory=list)  # of which evidence was saved
    _asked: dict[str, int] = field(default_factory=dict)
    _moved: list[asyncio.Future[None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.engine = FakeEngine(self)

    # --- what the ports play

    async def play(self, name: str) -> Outcome:
        """What the plan says of this call; returns that, for what it answers."""
        self.observe()
        outcome = self._next(name)
        call = Call(name, _now())
        self.history.append(call)
        try:
            await outcome.play(name, self.usual.get(name, 0.0), call.was_cancelled)
        except BaseException as error:
            call.error = error
            raise
        finally:
            call.ended_s = _now()
            self.observe()
        return outcome

    def _next(self, name: str) -> Outcome:
        planned = self.plan.get(name, USUAL)
        if isinstance(planned, Outcome):
            return planned
        asked = self._asked.get(name, 0)
        self._asked[name] = asked + 1
        return planned[min(asked, len(planned) - 1)]

    async def ask_engine(self, name: str) -> Outcome:
        """A call that the engine's own process has to answer: never, while that is frozen or dead.

        From vLLM: an RPC is never resolved when EngineCore dies at the wrong moment.
        """
        outcome = await self.play(name)
        while self.frozen or not self.alive:
            await self._movement()
        return outcome

    async def work(self, seconds: float) -> None:
        """What a request has the engine do. Raises EngineGone when that dies meanwhile."""
        await asyncio.sleep(seconds)
        while self.frozen and self.alive:
            await self._movement()
        if not self.alive:
            raise EngineGone
        self.progress += seconds

    async def _movement(self) -> None:
        moved = asyncio.get_running_loop().create_future()
        self._moved.append(moved)
        await moved

    # --- what happens to the world

    def die(self) -> None:
        """The engine ends, and tells."""
        if self.alive:
            self.alive = False
            self._wake()
            self.faults[-1](Fault("engine_died", "the engine was killed", "signal 9"))

    def move(self, *, frozen: bool) -> None:
        """The engine's process is stopped, or goes on."""
        self.frozen = frozen
        self._wake()

    def _wake(self) -> None:
        moved, self._moved = self._moved, []
        for waiter in moved:
            if not waiter.done():
                waiter.set_result(None)

    # --- what tests read

    @property
    def calls(self) -> list[str]:
        return [call.name for call in self.history]

    @property
    def held(self) -> list[str]:
        """Every acquisition, in order."""
        return [name[1:] for name in self.touched if name[0] == "+"]

    @property
    def released(self) -> list[str]:
        """Every release, in order."""
        return [name[1:] for name in self.touched if name[0] == "-"]

    def acquire(self, name: str) -> None:
        self.touched.append(f"+{name}")

    def let_go(self, name: str) -> None:
        self.touched.append(f"-{name}")

    def ports(
        self,
        *companions: str,
        watchdog: Callable[[FakeWorld], Watchdog] | None = None,
    ) -> Ports:
        """All ports, with one companion for each name; `watchdog` makes a real one."""
        return Ports(
            arguments=FakeArguments(self),
            binder=FakeBinder(self),
            engine=self.engine,
            server=FakeServer(self),
            probe=FakeProbe(self),
            watchdog=FakeWatchdog(self, watchdog(self) if watchdog else None),
            clock=FakeClock(),
            companions=tuple(FakeCompanion(self, name) for name in companions),
            evidence=FakeEvidence(self),
            random=lambda: 0.0,
        )


def _now() -> float:
    return asyncio.get_running_loop().time()


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
        self.world.faults.append(on_fault)
        self.world.move(frozen=False)
        self.world.asleep = False
        on_phase("loading_weights", 0.5)
        await self.world.play("engine.start")
        self.world.alive = True

    async def release(self, *, now: bool) -> None:
        self.world.let_go("engine")
        self.world.alive = False
        await self.world.play("engine.release_now" if now else "engine.release")

    def kill(self) -> None:
        self.world.history.append(Call("engine.kill", _now(), _now()))

    def progress(self, rank: int = 0) -> float:
        return self.world.progress

    async def compiling(self) -> str:
        return ""

    async def is_sleeping(self, rank: int = 0) -> bool:
        outcome = await self.world.ask_engine("engine.is_sleeping")
        return self.world.asleep or outcome.says_no

    async def sleep(self, level: int) -> None:
        await self.world.ask_engine("engine.sleep")
        self.world.asleep = True

    async def wake_up(self) -> None:
        await self.world.ask_engine("engine.wake_up")
        self.world.asleep = False

    async def reset_prefix_cache(self) -> None:
        await self.world.ask_engine("engine.reset_prefix_cache")

    async def describe(self) -> Mapping[str, Any]:
        await self.world.ask_engine("engine.describe")
        return {"model": "fake"}


@dataclass
class FakeServer:
    """With a gate in the world, requests pass through it; without one, `in_flight` is a number."""

    world: FakeWorld

    @property
    def in_flight(self) -> int:
        return self.world.gate.in_flight if self.world.gate else self.world.in_flight

    async def open(self, sock: Any, on_fault: FaultReport) -> None:
        self.world.acquire("server")
        self.world.on_server_fault = on_fault
        await self.world.play("server.open")

    async def attach(self) -> None:
        self.world.acquire("app")
        await self.world.play("server.attach")
        if self.world.gate:
            self.world.gate.app = self.world.app

    async def detach(self) -> None:
        self.world.let_go("app")
        if self.world.gate:
            self.world.gate.app = None
        await self.world.play("server.detach")

    async def drained(self) -> None:
        await self.world.play("server.drained")
        if self.world.gate:
            await self.world.gate.drained()

    async def cut(self) -> None:
        await self.world.play("server.cut")
        if self.world.gate:
            await self.world.gate.cut()

    async def close(self) -> None:
        self.world.let_go("server")
        try:
            await self.world.play("server.close")
        finally:
            self.world.hang_up()


@dataclass
class FakeProbe:
    world: FakeWorld

    async def health(self) -> HealthCheck:
        outcome = await self.world.play("probe.health")
        well = self.world.health and not outcome.says_no
        return HealthCheck("" if well else "/health got 503")

    async def inspect(self) -> tuple[Notice, ...]:
        await self.world.play("probe.inspect")
        return self.world.notices

    async def warm_up(self) -> None:
        await self.world.ask_engine("probe.warm_up")

    async def request(self, path: str, body: Mapping[str, Any]) -> None:
        await self.world.ask_engine("probe.request")

    async def canary(self) -> None:
        await self.world.ask_engine("probe.canary")

    async def token(self, rank: int = 0) -> None:
        await self.world.ask_engine("probe.token")


@dataclass
class FakeWatchdog:
    """Without a real one inside, says only what a test has it say, through `world.on_verdict`."""

    world: FakeWorld
    real: Watchdog | None = None
    _start: object = None

    async def start(self, on_verdict: VerdictReport, on_fault: FaultReport) -> None:
        self.world.acquire("watchdog")
        self.world.on_verdict, self.world.on_watchdog_fault = on_verdict, on_fault
        self._start = this = object()
        await self.world.play("watchdog.start")
        # The real one starts without an await: never after the stop, whatever ignores what.
        if self.real and self._start is this:
            await self.real.start(on_verdict, on_fault)

    def pace(self, interval_s: float) -> None:
        self.world.paces.append(interval_s)
        if self.real:
            self.real.pace(interval_s)

    async def stop(self) -> None:
        self.world.let_go("watchdog")
        self._start = None
        if self.real:
            await self.real.stop()
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


@dataclass
class FakeEvidence:
    world: FakeWorld

    async def save(self, case: Case) -> str:
        self.world.cases.append(case)
        await self.world.play("evidence.save")
        return f"/evidence/{case.code}"


_FIRST_DAY = datetime(2026, 1, 1, tzinfo=UTC)


class FakeClock:
    """Follows the loop's virtual time from a fixed day on; `offset_s` is what it was set off by."""

    offset_s = 0.0
    _told = (0.0, _FIRST_DAY)  # much happens at once

    def now(self) -> datetime:
        try:
            seconds = _now() + self.offset_s
        except RuntimeError:
            seconds = self.offset_s
        if self._told[0] != seconds:
            self._told = (seconds, _FIRST_DAY + timedelta(seconds=seconds))
        return self._told[1]


def say(world: FakeWorld, *verdicts: Verdict) -> None:
    """Has the watchdog say these."""
    assert world.on_verdict is not None, "the watchdog is not running"
    for verdict in verdicts:
        world.on_verdict(verdict)
