"""Waiting with a limit that holds even for what ignores its cancellation."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

import structlog

from ichat_lifecycle.errors import TransitionRefused

log = structlog.get_logger("ichat_lifecycle")

T = TypeVar("T")


class Interrupted(Exception):
    """A stop was asked for, or the engine or the server ended, while something else went on."""


class Latch:
    """Stays set once set. Like `asyncio.Event`, but `race` waits for it without a task."""

    def __init__(self) -> None:
        self._set = False
        self._waiter: asyncio.Future[None] | None = None

    def is_set(self) -> bool:
        return self._set

    def set(self) -> None:
        """Sets it and wakes everyone who waits; on the loop only."""
        self._set = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def clear(self) -> None:
        """Unsets it; who was woken stays awake."""
        self._set = False
        self._waiter = None

    def waiter(self) -> asyncio.Future[None]:
        """A future, the same for everyone, that is done once this is set. Not to be cancelled."""
        if self._waiter is None:
            self._waiter = asyncio.get_running_loop().create_future()
            if self._set:
                self._waiter.set_result(None)
        return self._waiter


class Abandoned:
    """Tasks that were cancelled and may not have ended; what they fail with later is logged."""

    def __init__(self) -> None:
        self._tasks: list[asyncio.Task[Any]] = []

    def add(self, task: asyncio.Task[Any]) -> None:
        if not task.done():
            self._tasks.append(task)
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        error = error_of(task)
        # A transition that was given up says so; nobody needs to hear it.
        if error and not isinstance(error, asyncio.CancelledError | TransitionRefused):
            log.warning("abandoned_with_error", task=task.get_name(), error=repr(error))

    @property
    def running(self) -> tuple[str, ...]:
        """The names of those that still run."""
        self._tasks = [task for task in self._tasks if not task.done()]
        return tuple(task.get_name() for task in self._tasks)

    async def wait(self, timeout_s: float) -> None:
        """Waits until all have ended or time is up."""
        if self.running:
            await asyncio.wait(self._tasks, timeout=timeout_s)


async def race(
    task: asyncio.Future[Any], timeout_s: float | None, *interrupts: Latch | None
) -> bool:
    """Waits until the task ends, time is up, or a latch is set; says whether the task ended.

    Unlike `asyncio.timeout` it neither cancels the task nor waits for what it does about that; both
    are the caller's. Raises only CancelledError, when the caller is cancelled.
    """
    # Nearly all that a worker does waits here, and a third of a simulated life was spent in what
    # asyncio.wait gathers on the way. Much of it is done after its first step, and needs nothing.
    await asyncio.sleep(0)
    if task.done():
        return True
    loop = asyncio.get_running_loop()
    woken = loop.create_future()

    def wake(_: object = None) -> None:
        if not woken.done():
            woken.set_result(None)

    awaited = [task, *[latch.waiter() for latch in interrupts if latch is not None]]
    for future in awaited:
        future.add_done_callback(wake)
    timer = None if timeout_s is None else loop.call_later(timeout_s, wake)
    try:
        await woken
    finally:
        if timer is not None:
            timer.cancel()
        for future in awaited:
            future.remove_done_callback(wake)
    return task.done()


async def watched(work: Coroutine[Any, Any, T], watch: Coroutine[Any, Any, T]) -> T:
    """What `work` returns or raises, or, if that comes first, `watch`; the other is cancelled.

    Both have ended when this does, however it ends.
    """
    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(watch)]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        first = next(task for task in tasks if task.done())
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        for task in tasks:
            error_of(task)  # retrieved: what the loser says is no news
    return first.result()


def error_of(task: asyncio.Future[Any]) -> BaseException | None:
    """What an ended task failed with; a cancellation counts as a failure."""
    return asyncio.CancelledError() if task.cancelled() else task.exception()
