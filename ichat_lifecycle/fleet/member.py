"""One worker of a fleet: the one writer of its stage. Others ask; only `run` acts."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import structlog

from ichat_lifecycle.errors import NO_DESCRIPTOR, OPEN_FILES_HINT, PERMANENT, ExitCode
from ichat_lifecycle.fleet.asked import SHUT_DOWN, Asked
from ichat_lifecycle.fleet.journal import FleetKind, StageRecord, StateRecord
from ichat_lifecycle.fleet.ports import (
    KILL_MARGIN_S,
    Plan,
    Process,
    Socket,
)
from ichat_lifecycle.fleet.states import RESTING, Event, Stage, row_for
from ichat_lifecycle.fleet.surroundings import Surroundings
from ichat_lifecycle.fleet.told import Told, shortened
from ichat_lifecycle.ports import Address
from ichat_lifecycle.restart_budget import RestartBudget
from ichat_lifecycle.slept import Silence
from ichat_lifecycle.states import State

log = structlog.get_logger("ichat_lifecycle.fleet")

CAUSE_LIMIT = 2000  # characters of why a process has ended
DESCRIPTOR_WAIT_S = 1.0
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Member:
    """A worker, from its first start to its last end.

    Args:
        accept_from: "ready" where another member serves on the socket until this one is.
        after: those that have to be at rest before its first start.

    Attributes:
        told: what the worker has told last; None before that, and once it has ended.
        reason: why it is not serving.
        ended_with: the exit code of its last process; None while there was none.
        starts: how many processes there were.
        due_s: while it backs off, when it starts again, on the event loop's clock.
    """

    def __init__(
        self,
        plan: Plan,
        socket: Socket,
        around: Surroundings,
        *,
        accept_from: str = "bound",
        after: Sequence[Member] = (),
    ) -> None:
        self.plan = plan
        self.stage = Stage.PENDING
        self.since: datetime = around.clock.now()
        self.since_s = asyncio.get_running_loop().time()
        self.told: Told | None = None
        self.reason: str | None = None
        self.ended_with: int | None = None
        self.starts = 0
        self.due_s: float | None = None
        self.process: Process | None = None
        self.rested = asyncio.Event()  # set while it is at rest
        self.settled = asyncio.Event()  # set once a start has come to something
        self.gone = False  # its life has ended: nothing that is asked has an effect any more
        self._socket = socket
        self._around = around
        self._accept_from = accept_from
        self._after = list(after)
        self._asked = Asked()
        self._woken = asyncio.Event()
        self._may_start = False
        self._lacks = False
        self._watchdog_s = 0.0
        self._quiet: Silence | None = None  # since it was last heard of; None: for ever is fine
        self._silence = ""  # why it was killed, where that was our decision
        self._budget = RestartBudget(around.restart, around.random)

    @property
    def name(self) -> str:
        return self.plan.name

    @property
    def serving(self) -> bool:
        return self.stage is Stage.SERVING

    @property
    def ready(self) -> bool:
        """Whether it serves, and says that it is READY."""
        return self.serving and self.state is State.READY

    @property
    def state(self) -> State | None:
        """Its own, as it has told it last."""
        return self.told.state if self.told else None

    @property
    def control_url(self) -> str | None:
        """Where its control plane answers: on the host of its plan, whatever it tells; or None."""
        port = self.told.control_port if self.told else None
        return Address(self.plan.control.host, port).url if port else None

    @property
    def leaving(self) -> bool:
        """Whether it has been asked to stop for good."""
        return self._asked.leave

    @property
    def restarts_left(self) -> int:
        return self._budget.left(asyncio.get_running_loop().time())

    # --- what others may ask, on the loop

    def ask_to_stop(self, why: str, *, now: bool = False, leave: bool = False) -> None:
        """A graceful stop; with `now`, one without a drain; with `leave`, for good."""
        self._asked.stop = self._asked.stop or why
        self._asked.now |= now
        self._asked.leave |= leave
        self._asked.again = False
        self._wake()

    def ask_to_start_again(self, why: str) -> None:
        """A stop, where it runs, and then a start. What it has ended with before is forgiven."""
        if self.process is not None:
            self._asked.stop = self._asked.stop or why
        self._asked.again = True
        self._budget = RestartBudget(self._around.restart, self._around.random)
        self._wake()

    def lose_socket(self) -> None:
        """Its listening socket is dead: it starts again, within its budget, to get another one."""
        if self.process is not None and self._asked.stop is None:
            self._asked.socket = True
            self._wake()

    def succeeds(self, other: Member) -> None:
        """The other one leaves. Whenever this one starts again, it does so as the only one."""
        self._accept_from = "bound"
        self._after.append(other)

    def renew_certificate(self, plan: Plan) -> None:
        """The same plan, with something else in the files of its certificate."""
        self.plan = plan
        # One that has told nothing yet has not read them, and a signal would end it.
        if self.process is not None and self.told is not None:
            self.process.renew_certificate()

    def _wake(self) -> None:
        self._woken.set()

    # --- the writer

    async def run(self) -> None:
        """Lives until it has been asked to leave, and is at rest."""
        steps = {
            Stage.PENDING: self._wait_for_turn,
            Stage.STARTING: self._watch,
            Stage.SERVING: self._watch,
            Stage.BACKING_OFF: self._back_off,
            Stage.STOPPING: self._stop,
            Stage.STOPPED: self._rest,
            Stage.GIVEN_UP: self._rest,
        }
        try:
            while not (self._asked.leave and self.stage in RESTING):
                try:
                    await steps[self.stage]()
                except Exception as error:
                    if self.stage in RESTING:  # nothing is left to end
                        raise
                    await self._fail(error)
        finally:
            if self.process is not None:
                self.process.kill()
            self.gone = True
            self.settled.set()
            self.rested.set()

    async def _fail(self, error: Exception) -> None:
        """A defect of ours is the end of this worker, and of no other: it can be started again."""
        log.exception("supervision_failed", worker=self.name)
        what = self._around.scrub(f"{type(error).__name__}: {error}")
        code = None
        if (process := self.process) is not None:
            process.kill()
            code = await self._ending(process)
        self._let_go(code)
        self._enter(Event.GIVE_UP, shortened(f"an internal error: {what}", CAUSE_LIMIT), code=code)

    async def _news(
        self, timeout_s: float | None = None, *, until: asyncio.Task[Any] | None = None
    ) -> bool:
        """Waits until something is asked or told, time is up, or that task ends: whether that."""
        woken = asyncio.create_task(self._woken.wait())
        waiting = {woken} if until is None else {woken, until}
        try:
            await asyncio.wait(waiting, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            woken.cancel()
        self._woken.clear()
        return until is not None and until.done()

    def _ending(self, process: Process) -> asyncio.Task[int]:
        if self._end is None or self._end[0] is not process:
            self._end = process, asyncio.create_task(process.wait(), name=f"{self.name} ends")
        return self._end[1]

    _end: tuple[Process, asyncio.Task[int]] | None = None

    async def _wait_for_turn(self) -> None:
        self.settled.clear()
        self._may_start = False
        while self._after and self._asked.stop is None:
            await self._wait_for(self._after[0])
        if self._asked.stop is None:
            self._around.slots.ask(self._go)
        while not self._may_start and self._asked.stop is None:
            await self._news()
        while self._asked.stop is None:
            if self._launch():
                return
            await self._news(DESCRIPTOR_WAIT_S)
        self._around.slots.leave(self._go)
        self._enter(Event.FINISH, self._asked.stop)

    async def _wait_for(self, other: Member) -> None:
        rest = asyncio.create_task(other.rested.wait(), name=f"{self.name} waits")
        try:
            if await self._news(until=rest):
                self._after.remove(other)
        finally:
            rest.cancel()

    def _go(self) -> None:
        self._may_start = True
        self._wake()

    def _launch(self) -> bool:
        """Returns False where there is no file descriptor for a process: that is no start."""
        self.told, self.reason, self.due_s, self._silence = None, None, None, ""
        self._asked.again = self._asked.socket = False
        try:
            self._watchdog_s = self._around.watchdog_s
            now_s = asyncio.get_running_loop().time()
            self._quiet = Silence(self._watchdog_s, now_s) if self._watchdog_s else None
            self.process = self._around.launcher.launch(
                self.plan,
                accept_from=self._accept_from,
                watchdog_s=self._watchdog_s,
                on_news=self._take_news,
            )
        except (OSError, ValueError) as error:  # such as a NUL in a word
            if isinstance(error, OSError) and error.errno in NO_DESCRIPTOR:
                self._note_lack(error)
                return False
            self.starts += 1
            self._enter(Event.START)
            self._ended(ExitCode.SYSTEM_LIMIT, f"no process could be started: {error}")
        else:
            self.starts += 1
            self._enter(Event.START, pid=self.process.pid)
        self._lacks = False
        return True

    def _note_lack(self, error: OSError) -> None:
        """Told once, however often a start is tried."""
        self.reason = f"it waits for file descriptors: {error}"
        if not self._lacks:
            self._lacks = True
            log.warning("worker_waits", worker=self.name, reason=self.reason, hint=OPEN_FILES_HINT)
            self._around.changed()

    def _take_news(self, told: Told | None) -> None:
        if self._quiet is not None:
            self._quiet.heard(asyncio.get_running_loop().time())
        if told is None:
            return
        before, self.told = self.state, told
        if told.state is not before:
            self._note_state(told)
        if told.state in (State.STOPPING, State.STOPPED):
            self._socket.left_by(self)
        elif told.state is State.READY or (
            self._accept_from == "bound" and told.state is not State.PARSED
        ):
            self._socket.served_by(self)
        self._around.changed()
        self._wake()

    def _note_state(self, told: Told) -> None:
        state, reason = told.state.value, told.message
        record = StateRecord(self._around.clock.now(), self.name, state, reason)
        self._around.journal.add(FleetKind.STATE, record)
        log.info("worker_state", worker=self.name, state=state, reason=reason)

    async def _watch(self) -> None:
        """STARTING and SERVING: until it serves, ends, or has to."""
        process = self.process
        assert process is not None
        quiet = self._quiet if not self._silence else None
        if await self._news(quiet.tick_s if quiet else None, until=self._ending(process)):
            said = process.last_words
            self._ended(await self._ending(process), self._silence or said)
        elif self._asked.stop is not None:
            self._enter(Event.STOP, self._asked.stop)
        elif self._asked.socket:
            self._asked.socket = False
            self._change_socket(process)
        elif self.stage is Stage.STARTING and self.state is State.READY:
            self._around.slots.leave(self._go)
            self._enter(Event.SERVE)
        elif quiet is not None and quiet.too_long(asyncio.get_running_loop().time()):
            self._kill_for(process, f"it has told nothing for {self._watchdog_s:g} s")

    def _kill_for(self, process: Process, why: str) -> None:
        self._silence = why
        log.error("worker_killed", worker=self.name, reason=why)
        process.kill()

    def _change_socket(self, process: Process) -> None:
        """A start of its own, which counts; once there have been too many, its end."""
        now_s = asyncio.get_running_loop().time()
        if self._budget.left(now_s):
            self._budget.spend(now_s)
            self._asked.again, self._asked.stop = True, SHUT_DOWN
            self._enter(Event.STOP, SHUT_DOWN)
        else:
            self._kill_for(process, SHUT_DOWN)

    def _ended(self, code: int, said: str) -> None:
        """Its process has ended, unasked."""
        now_s = asyncio.get_running_loop().time()
        cause = self._forget_process(code, said)
        if code == ExitCode.OK:
            self._enter(Event.END, cause, code=code)
        elif code in PERMANENT:
            self._enter(Event.GIVE_UP, cause, code=code)
        elif not self._budget.left(now_s):
            often = f"{self._around.restart.max} starts within {self._around.restart.window:g} s"
            self._enter(Event.GIVE_UP, f"{cause}; no more after {often}", code=code)
        else:
            delay_s = self._budget.delay_s(now_s)
            self._budget.spend(now_s)
            self.due_s = now_s + delay_s
            self._enter(Event.BACK_OFF, cause, code=code, delay_s=delay_s)

    def _forget_process(self, code: int, said: str) -> str:
        """What it ended with, in words."""
        why = shortened(said, CAUSE_LIMIT) or (self.told.message if self.told else None)
        self._let_go(code)
        how = f"killed by signal {-code}" if code < 0 else f"ended with {code}"
        return f"{how}: {why}" if why else how

    def _let_go(self, code: int | None) -> None:
        """Of all that a process has, or waits for."""
        self._socket.left_by(self)
        self._around.slots.leave(self._go)
        if code is not None:
            self.ended_with = code
        self.process = self.told = self.due_s = None

    async def _back_off(self) -> None:
        left_s = (self.due_s or 0.0) - asyncio.get_running_loop().time()
        if self._asked.stop is not None:
            self._enter(Event.FINISH, self._asked.stop)
        elif self._asked.again or left_s <= 0:
            self._enter(Event.RETRY)
        else:
            await self._news(left_s)

    async def _stop(self) -> None:
        """A graceful stop; one at once where that is asked for; SIGKILL when its bound is over."""
        process = self.process
        assert process is not None
        self._socket.left_by(self)
        process.terminate()
        loop = asyncio.get_running_loop()
        patience = Silence(self.plan.stop_bound_s + KILL_MARGIN_S, loop.time())
        hurried = killed = False
        while not await self._news(
            None if killed else patience.tick_s, until=self._ending(process)
        ):
            if self._asked.now and not hurried:
                hurried = True
                process.hurry()
            if not killed and patience.too_long(loop.time()):
                killed = True
                self._kill(process)
        code = await self._ending(process)
        if -code in STOP_SIGNALS:  # it came before the process could listen to it
            code = ExitCode.OK
        cause = self._forget_process(code, process.last_words)
        self._enter(Event.FINISH, self._asked.stop if code == ExitCode.OK else cause, code=code)

    def _kill(self, process: Process) -> None:
        """Its own deadlines have not held."""
        self._kill_for(process, f"its stop has outlasted its bound of {self.plan.stop_bound_s:g} s")

    async def _rest(self) -> None:
        self._asked.stop, self._asked.now = None, False
        if self._asked.again and not self._asked.leave:
            self.rested.clear()
            self._enter(Event.RETRY)
        else:
            self.settled.set()
            self.rested.set()
            await self._news()

    def _enter(
        self,
        event: Event,
        cause: str | None = None,
        *,
        pid: int | None = None,
        code: int | None = None,
        delay_s: float | None = None,
    ) -> None:
        row = row_for(self.stage, event)
        assert row is not None, f"{event} from {self.stage}"
        now = self._around.clock.now()
        if pid is None and self.process is not None:
            pid = self.process.pid
        record = StageRecord(now, self.name, event, self.stage, row.dest, cause, pid, code, delay_s)
        self.stage, self.since = row.dest, now
        self.since_s = asyncio.get_running_loop().time()
        self.reason = cause if row.dest is not Stage.SERVING else None
        self._around.journal.add(FleetKind.WORKER, record)
        fields = {k: v for k, v in record.told().items() if v is not None}
        tell = log.error if row.dest is Stage.GIVEN_UP else log.info
        tell("worker", **fields)
        if row.dest is Stage.SERVING:
            self.settled.set()
        self._around.changed()
