"""From the control plane's thread to the worker's own loop and back, under a deadline."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, Generic, Protocol, TypeVar

from ichat_lifecycle.errors import (
    CommandFailed,
    EngineNotUp,
    LifecycleError,
    TransitionRefused,
)

DESCRIBE_TIMEOUT_S = 2.0

T = TypeVar("T")


class Commanded(Protocol):
    """What the desk needs of a Lifecycle."""

    def ask_to_stop(self, cause: str, *, now: bool = False) -> None: ...

    async def command(self, name: str, argument: Any = None) -> None: ...

    def command_bound_s(self, name: str) -> float: ...


class Described(Protocol):
    """What the desk needs of an engine."""

    @property
    def alive(self) -> bool: ...

    async def describe(self) -> Mapping[str, Any]: ...


class LoopDesk:
    """An EngineDesk for a lifecycle and an engine that live on another thread's loop.

    Args:
        lifecycle: takes the commands, and states how long each may take.
        engine: describes itself.
        main_loop: gives the loop of both, or None before there is one.
        describe_timeout_s: how long a description may take, in seconds (default 2).

    Every method raises TransitionRefused before the main loop runs and after it has ended.
    """

    def __init__(
        self,
        lifecycle: Commanded,
        engine: Described,
        main_loop: Callable[[], asyncio.AbstractEventLoop | None],
        *,
        describe_timeout_s: float = DESCRIBE_TIMEOUT_S,
    ) -> None:
        self._lifecycle = lifecycle
        self._engine = engine
        self._main_loop = main_loop
        self._describe_timeout_s = describe_timeout_s
        # Used on the main loop only. One description at a time: whoever asks in a tight loop
        # keeps the engine no busier than one that asks again after each answer.
        self._describing = asyncio.Lock()

    async def describe(self) -> Mapping[str, Any]:
        """What the engine knows of itself.

        Raises:
            EngineNotUp: there is no engine, or it went away before it answered.
            TimeoutError: no answer in time; the question is withdrawn on the main loop.
            CommandFailed: the engine could not answer.
        """
        return await self._on_main("describe", self._describe, self._describe_timeout_s)

    async def command(self, name: str, argument: Any) -> None:
        """Has the lifecycle run a command to its end.

        Raises:
            TransitionRefused: not possible in this state.
            TimeoutError: no outcome in time. A command that has begun may still succeed; one
                that has not is withdrawn.
            LifecycleError: it was tried and failed.
        """

        async def run() -> None:
            await self._lifecycle.command(name, argument)

        await self._on_main(name, run, self._lifecycle.command_bound_s(name))

    async def stop(self, now: bool) -> None:
        """Asks for a stop and does not wait: a main loop that is blocked must not hold this up."""
        self._running_loop()
        self._lifecycle.ask_to_stop("POST /lifecycle/stop", now=now)

    async def _describe(self) -> Mapping[str, Any]:
        async with self._describing:
            try:
                return await self._engine.describe()
            except Exception as error:
                if self._engine.alive:
                    raise
                raise EngineNotUp("the engine went away before it answered") from error

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        loop = self._main_loop()
        if loop is None:
            raise TransitionRefused("the worker has not started yet")
        if loop.is_closed() or not loop.is_running():
            raise _ended()
        return loop

    async def _on_main(
        self, name: str, make: Callable[[], Coroutine[Any, Any, T]], timeout_s: float
    ) -> T:
        call = _Call(self._running_loop(), make)
        try:
            async with asyncio.timeout(timeout_s):
                return await call.outcome()
        except LifecycleError:
            raise
        except TimeoutError as error:  # ours, or one from within
            raise TimeoutError(str(error) or f"{name}: no answer within {timeout_s:g} s") from None
        except Exception as error:
            text = str(error) or type(error).__name__
            raise CommandFailed(f"{name} failed: {text}") from error


class _Call(Generic[T]):
    """One coroutine on another loop, whose outcome is awaited on this one.

    It is made on the loop where it runs, unlike with `asyncio.run_coroutine_threadsafe`: one that
    was made here would be left unawaited by a loop that closes first.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, make: Callable[[], Coroutine[Any, Any, T]]
    ) -> None:
        self._loop = loop
        self._make = make
        self._task: asyncio.Task[T] | None = None
        self._outcome: concurrent.futures.Future[T] = concurrent.futures.Future()

    def outcome(self) -> Awaitable[T]:
        """Starts the call. Cancelling what this returns cancels the coroutine on its loop."""
        try:
            self._loop.call_soon_threadsafe(self._begin)
        except RuntimeError:  # it has closed since somebody looked
            raise _ended() from None
        return asyncio.wrap_future(self._outcome)

    def _begin(self) -> None:
        if self._outcome.cancelled():
            return
        self._task = self._loop.create_task(self._make(), name="control-desk")
        self._task.add_done_callback(self._finish)
        self._outcome.add_done_callback(self._withdraw)

    def _withdraw(self, outcome: concurrent.futures.Future[T]) -> None:
        if outcome.cancelled() and self._task is not None:
            with contextlib.suppress(RuntimeError):  # closed: its end has cancelled the task
                self._loop.call_soon_threadsafe(self._task.cancel)

    def _finish(self, task: asyncio.Task[T]) -> None:
        error = _ended() if task.cancelled() else task.exception()
        if not self._outcome.set_running_or_notify_cancel():
            return  # nobody waits any more
        if error is not None:
            self._outcome.set_exception(error)
        else:
            self._outcome.set_result(task.result())


def _ended() -> TransitionRefused:
    return TransitionRefused("the worker has ended")
