"""The writer: one loop that owns the state. Others post events or ask for a stop.

Data flows one way: events in, one decision, effects out. What is asked of a lifecycle goes through
`post_fault`, `ask_to_stop`, `fail` or `command`; only `run()` fires triggers. A stop is a latch,
not a queue item, so that nothing can lose it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, NamedTuple, Protocol, TypeVar

import structlog

from ichat_lifecycle.actions import ENGINE, SERVER, SOCKET, Actions, Hooks
from ichat_lifecycle.bounds import Interrupted, Latch, race
from ichat_lifecycle.config import Settings
from ichat_lifecycle.errors import (
    DeadlineError,
    EngineDiedError,
    LifecycleError,
    StartError,
    StopDeadlineError,
    TransitionRefused,
)
from ichat_lifecycle.guards import Facts
from ichat_lifecycle.journal import Journal, Reason, Snapshot, StageOutcome
from ichat_lifecycle.machine import Machine
from ichat_lifecycle.ports import Case, Fault, Notice, Ports
from ichat_lifecycle.readiness import Readiness
from ichat_lifecycle.recorder import Recorder
from ichat_lifecycle.resources import Released, ResourceStack
from ichat_lifecycle.states import State, Trigger
from ichat_lifecycle.supervision import Supervisor

log = structlog.get_logger("ichat_lifecycle")

T = TypeVar("T")


class Meanwhile(Protocol):
    """What the writer does while a call is under way: `take`, each time that `news` is set."""

    news: Latch

    async def take(self) -> None:
        """Clears `news`."""


class _Limit(NamedTuple):
    at_s: float
    message: str


class Lifecycle:
    """One life of one worker, from PARSED to STOPPED.

    Args:
        ports: the world.
        settings: deadlines, intervals, budgets.
        ready_event: set exactly while the state is READY.
    """

    def __init__(
        self, ports: Ports, settings: Settings, ready_event: asyncio.Event | None = None
    ) -> None:
        self.settings = settings
        self.resources = ResourceStack()
        self.recorder = Recorder(ports.clock, ready_event or asyncio.Event(), ports.scrub)
        self.reason: Reason | None = None
        self.server_lost = False  # for good: no new engine brings it back
        # Called at once in the asker's own thread: a loop that is blocked hears of no stop.
        self.stop_hooks: list[Callable[[], None]] = []
        self._ports = ports
        self._hurry = Latch()
        self._stop_asked = Latch()
        self._interrupt = Latch()
        self._ended = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._fault: Fault | None = None
        self._cause: BaseException | None = None
        self._stop_cause: str | None = None
        self._known: dict[str, Any] = {"recover_after": settings.health.recover_after}
        self._fired_at = 0.0
        self._limit: _Limit | None = None
        self._supervisor = Supervisor(self, ports)
        self._readiness = Readiness(self, ports.probe)
        hooks = Hooks(
            hurry=self._hurry,
            interrupt=self._interrupt,
            call=self.bounded,
            on_fault=self.post_fault,
            on_phase=self.report_phase,
            on_verdict=self._supervisor.on_verdict,
            on_released=self._note_release,
            on_stage=self.recorder.stage,
        )
        self._actions = Actions(ports, settings, self.resources, hooks)
        self._machine = Machine(self._take_facts, self._actions.by_name(), self._entered)

    # --- what others may call, from any thread unless it says otherwise

    @property
    def snapshot(self) -> Snapshot:
        """Where this life is now; immutable."""
        return self.recorder.snapshot

    @property
    def journal(self) -> Journal:
        """What has happened so far."""
        return self.recorder.journal

    @property
    def listeners(self) -> list[Callable[[Snapshot], None]]:
        """Called on the loop with each new snapshot; must be fast and must not await."""
        return self.recorder.listeners

    @property
    def restarts_left(self) -> int:
        """How many engines may still be replaced in the window that ends now."""
        return self._supervisor.budget.left(self.monotonic())

    def ask_to_stop(self, cause: str, *, now: bool = False) -> None:
        """Asks for a graceful stop; with `now`, for one without a drain. Asking again is safe."""
        for hook in tuple(self.stop_hooks):
            hook()
        self._on_loop(self._latch_stop, cause, now)

    def post_fault(self, fault: Fault) -> None:
        """Tells that the engine or the server has ended."""
        self._on_loop(self._latch_fault, fault)

    def fail(self, error: LifecycleError) -> None:
        """Ends this life for a cause from outside the engine, such as a refusal by the gateway."""
        self._on_loop(self._latch_failure, error)

    def warn(self, notice: Notice) -> None:
        """Has `/lifecycle` and the page show a warning, and logs it."""
        self._on_loop(self.recorder.warn, notice)

    def report_phase(self, phase: str, fraction: float | None = None) -> None:
        """Tells how far a start has come."""
        self._on_loop(self._take_phase, phase, fraction)

    def _take_phase(self, phase: str, fraction: float | None) -> None:
        self.recorder.phase(phase, fraction, self.monotonic())

    async def command(self, name: str, argument: Any = None) -> None:
        """Has the writer run `sleep`, `wake`, `reset_prefix_cache` or `restart`; on its loop only.

        Raises:
            TransitionRefused: not possible in this state.
            LifecycleError: it was tried and failed.
        """
        if self._machine.state not in (State.READY, State.DEGRADED):
            raise TransitionRefused(f"{name}: not possible in {self._machine.state}")
        await self._supervisor.command(name, argument)

    def command_bound_s(self, name: str) -> float:
        """How long a command's outcome may take, in seconds; whoever asks waits no less."""
        return self.settings.command_bound(name) + self._supervisor.queue_bound_s

    def commanded(self, before_s: float) -> str:
        """The command under way that began before this time on its loop's clock; "" for none."""
        return self._supervisor.commanded(before_s)

    async def ended(self) -> None:
        """Waits for the end of run(); whoever asks gets the same end. On its loop only."""
        await self._ended.wait()

    def monotonic(self) -> float:
        """The event loop's clock in seconds; 0 before run()."""
        return self._loop.time() if self._loop is not None else 0.0

    def _on_loop(self, function: Callable[..., None], *args: Any) -> None:
        loop = self._loop
        if loop is None:  # before run(): nobody else is there yet
            function(*args)
            return
        try:
            running = asyncio.get_running_loop()
        except RuntimeError:
            running = None
        if running is loop:
            function(*args)
        else:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the life has ended
                loop.call_soon_threadsafe(function, *args)

    # --- latches, on the loop

    def _latch_stop(self, cause: str, now: bool) -> None:
        if not self._stop_asked.is_set():
            self._stop_cause = cause
            self._stop_asked.set()
            self._interrupt.set()
            self.recorder.publish(stop_asked=True)
            log.info("stop_requested", cause=cause, now=now, bound_s=self.settings.stop_bound)
        if now:
            self._hurry.set()

    def _latch_failure(self, error: LifecycleError) -> None:
        if not self._stop_asked.is_set():
            if (first := self.fault_error()) is not None:
                self._note(first)
            self._note(error)
            self._latch_stop(error.message, False)

    def _latch_fault(self, fault: Fault) -> None:
        if fault.code == "server_exited":
            self.server_lost = True
        if self._stop_asked.is_set() or self._fault is not None:
            log.info("fault_ignored", code=fault.code, message=fault.message)
            return
        self._fault = fault
        self._interrupt.set()
        log.error("fault", code=fault.code, message=fault.message, root_cause=fault.root_cause)

    def _note(self, error: BaseException) -> None:
        """Invariant: the first cause survives; later errors are attached, not put in its place."""
        if self._cause is None:
            self._cause = error
        elif error is not self._cause:
            self._cause.add_note(f"later: {type(error).__name__}: {error}")

    # --- what the supervisor and the machine ask, on the loop

    @property
    def state(self) -> State:
        """The machine's own state."""
        return self._machine.state

    def learn(self, **facts: Any) -> None:
        """Facts for the guards that only the writer can know."""
        self._known.update(facts)

    def fault_error(self) -> LifecycleError | None:
        """The fault that has been posted, as the error it ends in; None where there is none."""
        if self._fault is None:
            return None
        kind = EngineDiedError if self.snapshot.ever_ready else StartError
        fault = self._fault
        return kind(
            fault.message,
            code=fault.code,
            hint=fault.hint,
            root_cause=fault.root_cause,
            category=fault.category,
        )

    @property
    def engine_lost(self) -> bool:
        """Whether the engine has been let go of, well or not."""
        return ENGINE not in self.resources.names

    @property
    def stop_asked(self) -> bool:
        """Whether this life is to end."""
        return self._stop_asked.is_set()

    def forget_fault(self) -> None:
        """The engine that had the fault is being replaced."""
        self._fault = None
        if not self._stop_asked.is_set():
            self._interrupt.clear()

    async def drain(self) -> None:
        """Lets running requests finish, and cuts what is left at the deadline."""
        await self._actions.drain()

    async def save_evidence(self, error: BaseException) -> None:
        """Keeps what can be seen of the engine before it is ended, for as long as there is time.

        Raises:
            Interrupted: a stop or another fault came first.
        """
        evidence = self._ports.evidence
        if evidence is None:
            return
        reason = Reason.of(error)
        probes = tuple(record.as_dict() for record in self.journal.verdicts)
        case = Case(reason.code, reason.message, reason.root_cause, reason.hint, probes)
        try:
            with self.deadline(self.settings.health.evidence_timeout, "saving evidence"):
                path = await self.bounded(evidence.save(case), "evidence")
        except Interrupted:
            raise
        except Exception as failed:
            log.warning("evidence_not_saved", error=repr(failed))
        else:
            self.recorder.publish(evidence=path)

    async def cut(self) -> None:
        """Ends running requests, each with an explicit error."""
        await self._actions.cut()

    async def fire(self, trigger: Trigger) -> None:
        """One transition, in the caller's task."""
        source, began_s = self._machine.state, self._now()
        if not self._machine.busy:  # else it is refused, and must change nothing
            self._fired_at = began_s
        try:
            await self._machine.fire(trigger)
        except BaseException as error:
            self.recorder.attempt(trigger, source, self._now() - began_s, error)
            raise

    @contextlib.contextmanager
    def deadline(self, seconds: float, what: str) -> Iterator[None]:
        """All `bounded` calls within it end by then; the nearest deadline counts.

        Raises:
            Interrupted: a stop or a fault was there first; nothing has begun.
        """
        self.check()
        outer = self._limit
        limit = _Limit(self._now() + seconds, f"{what} took longer than {seconds:g} s")
        self._limit = limit if outer is None or limit.at_s < outer.at_s else outer
        try:
            yield
        finally:
            self._limit = outer

    def check(self) -> None:
        """Raises Interrupted where a stop or a fault ends whatever else goes on."""
        if self._interrupt.is_set():
            raise Interrupted

    async def until(self, latch: Latch) -> None:
        """Waits until the latch is set.

        Raises:
            Interrupted: a stop or a fault came first.
        """
        if not self._interrupt.is_set():
            await race(latch.waiter(), None, self._interrupt)
        self.check()

    async def bounded(
        self, work: Coroutine[Any, Any, T], what: str, meanwhile: Meanwhile | None = None
    ) -> T:
        """Runs `work` until it ends, the deadline, a stop, or a fault, whichever comes first.

        For single calls to the world only: what ignores its cancellation goes on, and must find
        nothing further to do.

        Raises:
            Interrupted: a stop or a fault came first.
            DeadlineError: the deadline came first.
            BaseException: what `work` raised.
        """
        if self._interrupt.is_set():
            work.close()
            raise Interrupted
        limit = self._limit
        task = asyncio.create_task(work, name=what)
        ended = False
        try:
            ended = await self._outlast(task, limit, meanwhile)
        finally:
            if not ended:
                await self._abandon(task)
        if ended:
            return _result(task, what)
        if self._interrupt.is_set() or limit is None:
            raise Interrupted
        raise DeadlineError(limit.message)

    async def _outlast(
        self, task: asyncio.Task[Any], limit: _Limit | None, meanwhile: Meanwhile | None
    ) -> bool:
        """Whether the task ended by itself, and in time."""
        while True:
            left_s = max(0.0, limit.at_s - self._now()) if limit is not None else None
            news = meanwhile.news if meanwhile is not None else None
            ended = await race(task, left_s, self._interrupt, news)
            over = ended or self._interrupt.is_set()
            if over or meanwhile is None or not meanwhile.news.is_set():
                return ended
            await meanwhile.take()

    async def _abandon(self, task: asyncio.Task[Any]) -> None:
        """Cancels and waits, within a bound."""
        task.cancel()
        self._actions.abandoned.add(task)
        if not await race(task, self.settings.stop.cancel):
            log.warning("cancellation_ignored", task=task.get_name())

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    def _take_facts(self) -> Facts:
        held = self.resources.names
        return Facts(
            **self._known,
            socket_open=SOCKET in held and SERVER in held,
            stop_asked=self._stop_asked.is_set(),
            engine_alive=self._ports.engine.alive and self._fault is None,
            fault_known=self.reason is not None,
            restarts_left=self._supervisor.restarts_left,
            resources_held=self.resources.unreleased + len(self._actions.abandoned.running),
        )

    def _entered(self, trigger: Trigger, source: State, dest: State) -> None:
        if dest is State.READY:
            self.reason = None
        if dest is State.STOPPING:
            self._supervisor.refuse_all()
        now = self._now()
        self.recorder.entered(
            trigger,
            source,
            dest,
            mono_s=now,
            took_s=now - self._fired_at,
            reason=self.reason,
            cause=self._cause_of(trigger),
        )

    def _note_release(self, released: Released) -> None:
        outcome = StageOutcome.DONE if released.error is None else StageOutcome.FAILED
        if isinstance(released.error, TimeoutError):
            outcome = StageOutcome.TIMED_OUT
        stage = f"release {released.name}"
        self.recorder.stage(stage, outcome, released.took_s, error=released.error)

    def _cause_of(self, trigger: Trigger) -> str | None:
        if trigger is Trigger.STOP:
            return Reason.of(self._cause).message if self._cause else self._stop_cause
        if trigger in (Trigger.DEGRADE, Trigger.RESTART_ENGINE) and self.reason:
            return self.reason.message
        return None

    # --- the life

    async def run(self) -> None:
        """Lives from PARSED to STOPPED. Call it once.

        Returns after a stop that was asked for. Cancelling it stops gracefully and re-raises.

        Raises:
            LifecycleError: the first cause of the end, when nobody asked for it.
            asyncio.CancelledError: this call was cancelled; the stop is complete by then.
        """
        if self._loop is not None:
            raise RuntimeError("a lifecycle runs once; make a new one")
        self._loop = asyncio.get_running_loop()
        self.recorder.begin(self._now())
        cancelled: asyncio.CancelledError | None = None
        try:
            await self._live()
        except Interrupted:
            if (error := self.fault_error()) is not None:
                self._note(error)
        except asyncio.CancelledError as error:
            cancelled = error
            self._latch_stop("run() was cancelled", False)
        except Exception as error:
            self._note(error)
            if not isinstance(error, LifecycleError):
                log.exception("unexpected_error")
        cancelled = await self._shielded_end() or cancelled
        self._ended.set()
        if cancelled is not None:
            raise cancelled
        if self._cause is not None:
            raise self._cause

    async def _live(self) -> None:
        await self._start_companions()
        start = self.settings.start
        with self.deadline(start.arguments_timeout, "validating the arguments"):
            await self.bounded(self._ports.arguments.validate(self.report_phase), "arguments")
        self.learn(arguments_valid=True)
        await self._advance(Trigger.BIND, start.bind_timeout)
        while True:
            if self._machine.state in (State.READY, State.DEGRADED):
                await self._supervise()
            else:
                await self._climb()

    async def _start_companions(self) -> None:
        for companion in self._ports.companions:
            what = f"starting the {companion.name}"
            with self.deadline(self.settings.start.bind_timeout, what):
                await self._actions.start_companion(companion)

    async def _climb(self) -> None:
        """From BOUND to READY."""
        start = self.settings.start
        try:
            await self._advance(Trigger.START_ENGINE, start.engine_timeout)
            self.report_phase("building_app")
            await self._advance(Trigger.SERVE, start.serve_timeout)
            await self._readiness.prove()
            await self._advance(Trigger.BECOME_READY, start.bind_timeout)
        except LifecycleError as error:
            if not self.snapshot.ever_ready:
                raise
            # A restart that fails is still the end of an engine that has served.
            raise EngineDiedError(
                f"the engine could not be restarted: {error.message}",
                code=error.code,
                hint=error.hint,
                root_cause=error.root_cause,
                category=error.category,
            ) from error

    async def _supervise(self) -> None:
        try:
            await self._supervisor.step()
        except Interrupted:
            if self._stop_asked.is_set():
                raise  # else a fault, which the next step takes up

    async def _advance(self, trigger: Trigger, deadline_s: float) -> None:
        with self.deadline(deadline_s, f"the action of {trigger}"):
            await self.fire(trigger)

    # --- the end

    async def _shielded_end(self) -> asyncio.CancelledError | None:
        """Invariant: a cancellation never interrupts the clean-up; another one hurries it."""
        end = asyncio.create_task(self._end(), name="lifecycle-end")
        cancelled: asyncio.CancelledError | None = None
        while not end.done():
            try:
                await asyncio.shield(end)
            except asyncio.CancelledError as error:
                cancelled = error
                self._latch_stop("run() was cancelled", now=True)
        end.result()
        return cancelled

    async def _save_last_evidence(self, cause: BaseException) -> None:
        if ENGINE in self.resources.names and self.state is not State.READY:
            self.forget_fault()  # it is the cause by now, and must not interrupt this
            with contextlib.suppress(Interrupted):
                await self.save_evidence(cause)

    async def _end(self) -> None:
        if self._cause is not None:
            self.reason = Reason.of(self._cause)
            # For those who read the log: the last line is for people, and comes after its end.
            log.error("life_failed", **self.reason.as_dict())
            await self._save_last_evidence(self._cause)
        await self.fire(Trigger.STOP)
        await self._actions.abandoned.wait(self.settings.stop.leftovers)
        if left := (*self.resources.lost, *self._actions.abandoned.running):
            lost = ", ".join(left)
            error = StopDeadlineError(
                f"not released in time: {lost}", hint="what is left ends with the process"
            )
            self._note(error)
            self.recorder.publish(reason=Reason.of(self._cause or error))
        else:
            await self.fire(Trigger.FINISH)


def _result(task: asyncio.Task[T], what: str) -> T:
    if task.cancelled():
        # Nobody of ours did: as a CancelledError it would pass for a cancellation of run().
        raise StartError(f"{what} was cancelled from within", code="cancelled_from_within")
    return task.result()
