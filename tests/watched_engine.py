"""An engine that is watched under virtual time: what it does is a script, what is said is kept."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ichat_lifecycle.adapters.senses import Senses
from ichat_lifecycle.adapters.watchdog import EngineWatchdog
from ichat_lifecycle.config import Health
from ichat_lifecycle.ports import Fault, Verdict
from ichat_lifecycle.testing.virtual_time import run_virtual

HEALTH = Health(interval=5, timeout=10, token_interval=0)
TOKENS = Health(interval=5, timeout=10, token_interval=15)
IDLE, BUSY, ASLEEP, HUNG = "idle", "busy", "asleep", "hung"


T = TypeVar("T")


@dataclass
class Rpc:
    """Answers after `takes_s`; notes when it was asked, and that it was asked one at a time."""

    takes_s: float = 0.0
    asleep: bool = False
    error: BaseException | None = None
    asked: list[float] = field(default_factory=list)
    running: int = 0
    # The other signals, and when tokens were asked for.
    moves: bool = False
    in_flight: int = 0
    ready: bool = True
    token_takes_s: float = 0.0
    token_error: Exception | None = None
    tokens: list[float] = field(default_factory=list)
    compiling: str = ""
    look_takes_s: float = 0.0
    # The ranks that neither answer nor move, and those that have requests; tokens by rank.
    ranks: tuple[int, ...] = (0,)
    hanging: set[int] = field(default_factory=set)
    stuck: set[int] = field(default_factory=set)  # these answer, and generate nothing
    working: set[int] | None = None
    tokens_of: list[int] = field(default_factory=list)
    admin: tuple[str, float] | None = None  # a request, and when it began
    broken: set[str] = field(default_factory=set)  # the signs that raise
    looked: list[float] = field(default_factory=list)

    async def __call__(self, rank: int = 0) -> bool:
        assert self.running < len(self.ranks), "never two probes at once"
        self.running += 1
        try:
            self.asked.append(now())
            await asyncio.sleep(self.takes_s)
            while rank in self.hanging:
                await asyncio.sleep(0.1)
            if self.error is not None:
                raise self.error
            return self.asleep
        finally:
            self.running -= 1

    async def token(self, rank: int = 0) -> None:
        self.tokens.append(now())
        self.tokens_of.append(rank)
        await asyncio.sleep(self.token_takes_s)
        while rank in self.hanging | self.stuck:
            await asyncio.sleep(0.1)
        if self.token_error:
            raise self.token_error

    def senses(self) -> Senses:
        return Senses(
            is_sleeping=self,
            progress=self.progress,
            in_flight=lambda: self.sign("in_flight", self.in_flight),
            ready=lambda: self.sign("ready", self.ready),
            token=self.token,
            compiling=self.look_for_compiler,
            ranks=lambda: self.ranks,
            works=self.works,
            admin_request=self.admin_request,
        )

    def progress(self, rank: int) -> float:
        moves = self.moves and rank not in self.hanging | self.stuck
        return self.sign("progress", now() if moves else 0.0)

    def works(self, rank: int) -> bool:
        works = self.in_flight > 0 if self.working is None else rank in self.working
        return self.sign("works", works)

    def admin_request(self, before_s: float) -> str:
        name, began_s = self.admin or ("", 0.0)
        return self.sign("admin_request", name if began_s <= before_s else "")

    def sign(self, name: str, value: T) -> T:
        if name in self.broken:
            raise RuntimeError(f"{name} is broken")
        return value

    async def look_for_compiler(self) -> str:
        self.sign("compiling", "")
        self.looked.append(now())
        await asyncio.sleep(self.look_takes_s)
        return self.compiling


def now() -> float:
    return asyncio.get_running_loop().time()


class Watch:
    """A watchdog that runs, and when it said what."""

    def __init__(self, rpc: Rpc, health: Health) -> None:
        self.rpc = rpc
        self.verdicts: list[Verdict] = []
        self.said: list[tuple[float, str]] = []
        self.faults: list[Fault] = []
        self.dog = EngineWatchdog(rpc.senses(), health)

    deaf = False

    def hear(self, verdict: Verdict) -> None:
        if self.deaf:
            raise LookupError("nobody hears verdicts")
        self.verdicts.append(verdict)
        self.said.append((round(now(), 3), verdict.kind.value))


def watch(
    rpc: Rpc,
    script: Callable[[Watch], Coroutine[Any, Any, None]] | float,
    health: Health = HEALTH,
) -> Watch:
    """Runs the script, or so many seconds, with a watchdog; after stop() no task is left."""

    async def main() -> Watch:
        seen = Watch(rpc, health)
        await seen.dog.start(seen.hear, seen.faults.append)
        await (asyncio.sleep(script) if isinstance(script, int | float) else script(seen))
        await seen.dog.stop()
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert rpc.running == 0
        told = len(seen.verdicts)
        await asyncio.sleep(100)
        assert len(seen.verdicts) == told, "nothing is said after stop()"
        return seen

    return run_virtual(main())
