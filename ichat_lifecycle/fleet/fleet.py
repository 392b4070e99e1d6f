"""All workers of a file: started, watched, changed and stopped together. For one event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import structlog

from ichat_lifecycle.errors import AddressError, ExitCode, LifecycleError
from ichat_lifecycle.fleet.journal import FleetKind, ReloadRecord
from ichat_lifecycle.fleet.member import Member
from ichat_lifecycle.fleet.ports import Plan, Socket
from ichat_lifecycle.fleet.states import Stage
from ichat_lifecycle.fleet.surroundings import Surroundings

log = structlog.get_logger("ichat_lifecycle.fleet")

# Opens the listening socket that a plan asks for.
Opener = Callable[[Plan], Socket]


class NoSuchWorkerError(LifecycleError):
    """A name that no worker of the fleet has."""


class Fleet:
    """The members, by name; those that are being replaced live on beside their successors.

    Args:
        open_socket: raises AddressError where an address cannot be had.
    """

    def __init__(self, around: Surroundings, open_socket: Opener) -> None:
        self._around = around
        self._open_socket = open_socket
        self._sockets: dict[str, Socket] = {}
        self._wanted: frozenset[str] = frozenset()  # addresses of the plans
        self._members: dict[str, Member] = {}
        self._others: list[Member] = []  # that are to replace one, or leave
        self._tasks: set[asyncio.Task[None]] = set()
        self._changes: asyncio.Task[None] | None = None
        self._replacing: Member | None = None  # a successor that has not come to anything yet
        self._stopping = self._stop_now = False
        self._woken = asyncio.Event()
        around.changed = _both(around.changed, self._woken.set)

    @property
    def members(self) -> tuple[Member, ...]:
        """In the order of the file; then those that come beside one of them, or leave."""
        return (*self._members.values(), *self._others)

    @property
    def ready(self) -> bool:
        """Whether each worker of the file serves and is READY."""
        return not self._stopping and all(member.ready for member in self._members.values())

    def member(self, name: str) -> Member:
        """Raises NoSuchWorkerError."""
        if name not in self._members:
            known = ", ".join(self._members) or "none"
            raise NoSuchWorkerError(
                f"{name}: no such worker", code="no_such_worker", hint=f"there is: {known}"
            )
        return self._members[name]

    @property
    def stopping(self) -> bool:
        return self._stopping

    # --- a whole life

    async def run(self, plans: Sequence[Plan]) -> int:
        """Starts all, and lives until a stop was asked for, or every worker is at rest.

        Returns:
            0 where each worker's last end was clean, else an exit code that is not.

        Raises:
            AddressError: an address cannot be had. Nothing was started.
        """
        try:
            self._open_all(plans)
            for plan in plans:
                self._members[plan.name] = self._make(plan)
            while not (self._stopping or self._at_rest()):
                await self._something()
            await self._end()
        finally:
            for socket in self._sockets.values():
                await socket.close()
        return self._exit_code()

    async def _something(self) -> None:
        """Waits for any change. A task that fails is a defect, and the end of nothing else."""
        await self._woken.wait()
        self._woken.clear()
        for task in [task for task in self._tasks if task.done()]:
            self._tasks.discard(task)
            if not task.cancelled() and (error := task.exception()):
                log.error("task_failed", task=task.get_name(), exc_info=error)
        self._others = [member for member in self._others if not member.gone]
        await self._close_unused()

    def _at_rest(self) -> bool:
        return not self._changing and all(member.rested.is_set() for member in self.members)

    async def _end(self) -> None:
        self._stopping = True  # also where all have come to rest by themselves
        if self._changes is not None:
            self._changes.cancel()
            await asyncio.wait({self._changes})
        for member in self.members:
            member.ask_to_stop("the fleet stops", now=self._stop_now, leave=True)
        while self._tasks:
            await self._something()

    def _exit_code(self) -> int:
        for member in self._members.values():
            code = member.ended_with
            if code:
                return code if code > 0 else int(ExitCode.ENGINE_DIED)
        return int(ExitCode.OK)

    def ask_to_stop(self, *, now: bool = False) -> None:
        """Stops all at the same time, each with its drain; with `now`, without."""
        self._stop_now |= now
        if self._stopping and now:
            for member in self.members:
                member.ask_to_stop("the fleet stops", now=True, leave=True)
        self._stopping = True
        self._woken.set()

    def restart(self, name: str) -> None:
        """Stops a worker, if it runs, and starts it again.

        Raises:
            NoSuchWorkerError
            LifecycleError: it makes room for another worker, and starts again after that.
        """
        member = self.member(name)
        if member.leaving:
            raise LifecycleError(f"{name} is about to be changed", code="busy")
        member.ask_to_start_again("an operator")

    def lose_socket(self, address: str) -> None:
        """Those who serve there hold a dead socket: they get the new one with a start."""
        for member in self.members:
            if member.plan.address == address:
                member.lose_socket()

    # --- members

    def _make(
        self, plan: Plan, *, accept_from: str = "bound", after: Sequence[Member] = ()
    ) -> Member:
        """A member, once those have rested that come before it, or are in its way."""
        in_the_way = [member for member in self.members if _collide(member, plan)]
        for member in in_the_way:
            member.ask_to_stop(f"{plan.name} gets its address", leave=True)
        member = Member(
            plan,
            self._socket(plan),
            self._around,
            accept_from=accept_from,
            after=[*after, *in_the_way],
        )
        self._tend(member.run(), f"worker {plan.name}")
        return member

    def _tend(self, life: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(life, name=name)
        task.add_done_callback(lambda _: self._woken.set())
        self._tasks.add(task)
        return task

    # --- sockets

    def _socket(self, plan: Plan) -> Socket:
        if plan.address not in self._sockets:
            self._sockets[plan.address] = self._open_socket(plan)
        return self._sockets[plan.address]

    def _open_all(self, plans: Sequence[Plan]) -> None:
        """All sockets, or none of those that are new."""
        before = set(self._sockets)
        try:
            for plan in plans:
                self._check_held(plan)
                self._socket(plan).certify(plan.certificate, plan.certificate_digest)
        except LifecycleError:
            for address in set(self._sockets) - before:
                self._sockets.pop(address).close_now()
            for plan in [member.plan for member in self._members.values()]:
                if plan.address in self._sockets:
                    self._sockets[plan.address].certify(plan.certificate, plan.certificate_digest)
            raise
        self._wanted = frozenset(plan.address for plan in plans)

    def _check_held(self, plan: Plan) -> None:
        """The kernel would say that the address is taken: by us. Raises AddressError."""
        for member in self.members:
            held = member.plan.listener
            if member.plan.address != plan.address and held.collides(plan.listener):
                raise AddressError(
                    f"{plan.name}: {plan.address} cannot be had while {member.name} has "
                    f"{member.plan.address}",
                    hint=f"take {member.name} out of the file and reload before",
                )

    async def _close_unused(self) -> None:
        while unused := self._sockets.keys() - self._used():  # closing takes a while: look again
            await self._sockets.pop(unused.pop()).close()

    def _used(self) -> set[str]:
        return {m.plan.address for m in self.members if not m.gone} | self._wanted

    # --- changes

    def change(self, plans: Sequence[Plan]) -> ReloadRecord:
        """Makes the fleet what the plans say, and touches only what differs.

        In the background new workers start, removed ones are stopped, all at the same time;
        changed ones are replaced one at a time. What is left of the change before is not done any
        more: it is a part of this one. Returns what will be done.

        Raises:
            AddressError: an address cannot be had. Nothing was changed.
            LifecycleError: the fleet stops.
        """
        if self._stopping:
            raise LifecycleError("the fleet stops", code="stopping")
        self._open_all(plans)
        change = _Change.between(self._members, plans)
        record = change.record(self._around.clock.now())
        self._around.journal.add(FleetKind.RELOAD, record)
        log.info("reload", **{k: v for k, v in record.told().items() if v})
        for plan in change.renewed:
            self._members[plan.name].renew_certificate(plan)
        before = self._changes
        if before is not None:
            before.cancel()
        self._changes = self._tend(self._carry_out(change, before), "changes")
        return record

    @property
    def _changing(self) -> bool:
        return self._changes is not None and not self._changes.done()

    async def _carry_out(self, change: _Change, before: asyncio.Task[None] | None) -> None:
        if before is not None:
            await asyncio.wait({before})
        for name in change.removed:
            self._leave(self._members.pop(name), "it is not in the file any more")
        for plan in change.new:
            self._members[plan.name] = self._make(plan, after=self._leaving(plan.name))
        self._members = {name: self._members[name] for name in change.order}
        if await self._finish_replacing(change):
            for number, plan in enumerate(change.changed, start=1):
                if not await self._replace(plan):
                    self._bring_back(change.changed[number:])
                    break

    def _bring_back(self, plans: Sequence[Plan]) -> None:
        """Those of them that had to make room already: nobody else would start them again."""
        for plan in plans:
            old = self._members[plan.name]
            if old.leaving:
                self._others.append(old)
                self._members[plan.name] = self._make(plan, after=self._leaving(plan.name))

    def _leave(self, member: Member, why: str) -> None:
        self._others.append(member)
        member.ask_to_stop(why, leave=True)

    def _leaving(self, name: str) -> list[Member]:
        return [member for member in self._others if member.name == name]

    async def _finish_replacing(self, change: _Change) -> bool:
        """One at a time, also across changes: what the change before has begun comes to an end.

        Not where this change has something else for it.
        """
        begun = self._replacing
        goes_on = begun is not None and begun is self._members.get(begun.name)
        if begun is None or not goes_on or begun.name in {plan.name for plan in change.changed}:
            return True
        return await self._settle(begun)

    async def _settle(self, member: Member) -> bool:
        """Whether it serves, once that is known."""
        self._replacing = member
        await member.settled.wait()
        self._replacing = None  # not where this is cancelled: it goes on with the next change
        if not member.serving:
            log.error("reload_stopped", worker=member.name, reason="it did not start")
        return member.serving

    async def _replace(self, plan: Plan) -> bool:
        """Whether the new one serves."""
        old = self._members[plan.name]
        if plan.replace == "before" and old.serving and not old.leaving:
            return await self._replace_beside(plan, old)
        self._leave(old, "it is replaced")
        new = self._members[plan.name] = self._make(plan, after=self._leaving(plan.name))
        return await self._settle(new)

    async def _replace_beside(self, plan: Plan, old: Member) -> bool:
        new = self._make(plan, accept_from="ready", after=self._leaving(plan.name))
        self._others.append(new)
        try:
            serves = await self._settle(new)
        except asyncio.CancelledError:
            new.ask_to_stop("the file has changed again", leave=True)
            raise
        if not serves:
            new.ask_to_stop("it did not start", leave=True)
            return False
        new.succeeds(old)
        self._members[plan.name] = new
        self._others.remove(new)
        self._leave(old, "it is replaced")
        await old.rested.wait()
        return True


@dataclass(frozen=True, slots=True)
class _Change:
    """What has to be done to a fleet."""

    new: tuple[Plan, ...]
    changed: tuple[Plan, ...]
    removed: tuple[str, ...]
    renewed: tuple[Plan, ...]
    order: tuple[str, ...]

    @classmethod
    def between(cls, members: Mapping[str, Member], plans: Sequence[Plan]) -> _Change:
        names = tuple(plan.name for plan in plans)
        return cls(
            tuple(plan for plan in plans if plan.name not in members),
            tuple(p for p in plans if p.name in members and not _goes_on(members[p.name], p)),
            tuple(name for name in members if name not in names),
            tuple(p for p in plans if p.name in members and _is_renewed(members[p.name], p)),
            names,
        )

    def record(self, at: datetime) -> ReloadRecord:
        groups = (self.new, self.changed, self.renewed)
        new, changed, renewed = (tuple(p.name for p in plans) for plans in groups)
        return ReloadRecord(at, new, changed, self.removed, renewed)


def _collide(member: Member, plan: Plan) -> bool:
    """Whether a worker of another name has what this one needs for itself."""
    if member.name == plan.name or member.gone:
        return False
    return any(one.collides(other) for one in member.plan.listeners for other in plan.listeners)


def _goes_on(member: Member, plan: Plan) -> bool:
    """Whether it already is what it should be, and stays."""
    return member.plan == plan and not member.leaving


def _is_renewed(member: Member, plan: Plan) -> bool:
    """Whether it goes on, with something else in the files of its certificate."""
    changed = member.plan.certificate_digest != plan.certificate_digest
    return changed and _goes_on(member, plan)


def _both(first: Callable[[], None], second: Callable[[], None]) -> Callable[[], None]:
    def call() -> None:
        first()
        second()

    return call


def summary(members: Sequence[Member]) -> Mapping[str, int]:
    """How many members there are in each stage."""
    return {stage.value: sum(m.stage is stage for m in members) for stage in Stage}
