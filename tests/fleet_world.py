"""A world for a fleet: processes and sockets that do what a test says, under virtual time."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from stand_ins import NOON

from ichat_lifecycle.config import Restart
from ichat_lifecycle.errors import AddressError
from ichat_lifecycle.fleet.fleet import Fleet
from ichat_lifecycle.fleet.journal import LIMITS, FleetKind
from ichat_lifecycle.fleet.member import Member
from ichat_lifecycle.fleet.ports import Hearer, Plan
from ichat_lifecycle.fleet.slots import Slots
from ichat_lifecycle.fleet.states import Stage
from ichat_lifecycle.fleet.surroundings import Surroundings
from ichat_lifecycle.fleet.told import Told, Why
from ichat_lifecycle.journal import Journal
from ichat_lifecycle.states import State
from ichat_lifecycle.testing.virtual_time import run_virtual

BOUND_S, READY_S, STOP_S, SOON_S = 1.0, 10.0, 2.0, 0.001


def clock() -> float:
    """The virtual time, in seconds."""
    return asyncio.get_running_loop().time()


@dataclass(frozen=True)
class Course:
    """What a process does. None: never."""

    bound_s: float | None = BOUND_S
    ready_s: float | None = READY_S
    ends_s: float | None = None  # by itself
    code: int = 0  # and with this
    said: str = ""
    reason: str | None = None
    silent_s: float | None = None  # from then on it tells nothing, and hears no SIGTERM
    stop_s: float | None = STOP_S  # after SIGTERM
    stop_code: int = 0


class FakeProcess:
    accept_from = ""

    def __init__(self, pid: int, plan: Plan, course: Course, tell: Hearer) -> None:
        self.pid = pid
        self.plan = plan
        self.course = course
        self.signals: list[str] = []
        self.renewals = 0
        self.last_words = ""
        self.token = f"token of {pid}"
        self._tell = tell
        self._began_s = clock()
        self._end: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._timers: list[asyncio.TimerHandle] = []
        self._after(0.0, self.tell, "PARSED")
        self._after(course.bound_s, self.tell, "BOUND")
        self._after(course.ready_s, self.tell, "READY")
        self._after(course.ends_s, self.end, course.code)

    def _after(self, seconds: float | None, do: Callable[..., None], *args: Any) -> None:
        if seconds is not None:
            self._timers.append(asyncio.get_running_loop().call_later(seconds, do, *args))

    @property
    def alive(self) -> bool:
        return not self._end.done()

    def beat(self, watchdog_s: float) -> None:
        if watchdog_s and not self._silent:
            self._tell(None)
            self._after(watchdog_s / 2, self.beat, watchdog_s)

    @property
    def _silent(self) -> bool:
        lasted_s = clock() - self._began_s
        return self.course.silent_s is not None and lasted_s >= self.course.silent_s

    def tell(self, state: str) -> None:
        if self._silent:
            return
        reason = self.course.reason
        why = Why(message=reason) if reason else None
        self._tell(Told(state=State(state), reason=why))

    def end(self, code: int) -> None:
        for timer in self._timers:
            timer.cancel()
        if self.alive:
            self.last_words = self.course.said
            self._end.set_result(code)

    async def wait(self) -> int:
        return await asyncio.shield(self._end)

    def terminate(self) -> None:
        assert not self.signals, "asked twice"
        self.signals.append("TERM")
        if self._silent:
            return
        self.tell("STOPPING")
        self._after(self.course.stop_s, self.end, self.course.stop_code)

    def hurry(self) -> None:
        assert self.signals == ["TERM"], "hurried before it was asked"
        self.signals.append("INT")
        self.end(self.course.stop_code)

    def renew_certificate(self) -> None:
        self.renewals += 1

    def kill(self) -> None:
        self.signals.append("KILL")
        self.end(-signal.SIGKILL)


@dataclass
class FakeSocket:
    """Who has served on it, and when the supervisor had to."""

    address: str
    owners: list[Member] = field(default_factory=list)
    most_owners: int = 0
    closed: bool = False
    certificate: tuple[str, str | None] | None = None
    digest: str = ""

    def served_by(self, who: Any) -> None:
        assert not self.closed
        assert all(owner.name == who.name for owner in self.owners), "two workers on one socket"
        if who not in self.owners:
            self.owners.append(who)
        self.most_owners = max(self.most_owners, len(self.owners))

    def left_by(self, who: Any) -> None:
        if who in self.owners:
            self.owners.remove(who)

    def certify(self, certificate: tuple[str, str | None] | None, digest: str = "") -> None:
        self.certificate, self.digest = certificate, digest

    async def close(self) -> None:
        self.close_now()

    def close_now(self) -> None:
        assert not self.closed, "closed twice"
        self.closed = True


class FakeClock:
    def now(self) -> Any:
        return NOON


class World:
    """A fleet in it, and what has happened.

    Attributes:
        courses: by a worker's name, what its processes do, one after the other; the last one again.
        taken: addresses that cannot be had.
    """

    def __init__(
        self,
        *,
        limit: int = 100,
        restart: Restart | None = None,
        watchdog_s: float = 0.0,
        **courses: Sequence[Course],
    ) -> None:
        self.courses = {name: list(given) for name, given in courses.items()}
        self.processes: list[FakeProcess] = []
        self.sockets: list[FakeSocket] = []
        self.taken: set[str] = set()
        self.unlaunchable = 0  # an errno
        self.journal = Journal(LIMITS)
        self.most_starting = 0
        self.slots = Slots(limit)
        restart = restart or Restart(max=3, window=600, backoff=1, backoff_max=60)
        self.around = Surroundings(
            self,
            self.slots,
            restart,
            FakeClock(),
            lambda: 0.0,
            self.journal,
            self._look,
            watchdog_s,
        )
        self.fleet = Fleet(self.around, self.open_socket)

    def _look(self) -> None:
        starting = sum(m.stage is Stage.STARTING for m in self.fleet.members)
        self.most_starting = max(self.most_starting, starting)

    def open_socket(self, plan: Plan) -> FakeSocket:
        address = plan.address
        if address in self.taken:
            raise AddressError(f"{address}: taken")
        socket = FakeSocket(address)
        self.sockets.append(socket)
        return socket

    def launch(
        self, plan: Plan, *, accept_from: str, watchdog_s: float, on_news: Hearer
    ) -> FakeProcess:
        if self.unlaunchable:
            raise OSError(self.unlaunchable, os.strerror(self.unlaunchable))
        left = self.courses.setdefault(plan.name, [Course()])
        course = left.pop(0) if len(left) > 1 else left[0]
        if accept_from == "ready":
            course = replace(course, bound_s=None)
        process = FakeProcess(100 + len(self.processes), plan, course, on_news)
        process.beat(watchdog_s)
        process.accept_from = accept_from
        self.processes.append(process)
        return process

    def alive(self, name: str | None = None) -> list[FakeProcess]:
        return [p for p in self.processes if p.alive and name in (None, p.plan.name)]

    def stages(self, name: str) -> list[str]:
        """The way that the workers of this name have gone."""
        records = (record.as_dict() for record in self.journal.records(FleetKind.WORKER))
        return [record["dest"] for record in records if record["worker"] == name]

    def records(self, name: str) -> list[dict[str, Any]]:
        records = (record.as_dict() for record in self.journal.records(FleetKind.WORKER))
        return [record for record in records if record["worker"] == name]

    def live(
        self, *plans: Plan, scenario: Callable[[World], Coroutine[Any, Any, None]] | None = None
    ) -> int:
        """The fleet's whole life; with a scenario beside it, after which it is stopped."""

        async def main() -> int:
            running = asyncio.create_task(self.fleet.run(plans))
            await asyncio.sleep(SOON_S)
            if scenario is not None:
                try:
                    await scenario(self)
                finally:
                    self.fleet.ask_to_stop()
            code = await running
            assert asyncio.all_tasks() == {asyncio.current_task()}, "a task is left"
            return code

        code = run_virtual(main())
        assert not self.alive(), "a process is left"
        assert all(socket.closed for socket in self.sockets)
        assert all(not socket.owners for socket in self.sockets)
        return code


def plan(name: str, **changes: Any) -> Plan:
    values: dict[str, Any] = {
        "model": name,
        "host": name,
        "port": 1,
        "argv": ("--model", name),
        "env": {},
        "stop_bound_s": 30.0,
    }
    return Plan(name, **{**values, **changes})


async def until(condition: Callable[[], bool], within_s: float = 3600.0) -> None:
    """Waits, in virtual seconds, until something is so."""
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(SOON_S * 10)


def serving(world: World, *names: str) -> Callable[[], bool]:
    members: Callable[[str], Member] = world.fleet.member
    return lambda: all(members(name).serving for name in names)
