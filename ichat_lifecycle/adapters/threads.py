"""Blocking work off the event loop, each piece in a daemon thread of its own.

Not `asyncio.to_thread`: its threads are joined at exit, and an import or a model load that is stuck
must not keep the process from ending.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Threaded(Generic[T]):
    """A function that runs in a thread. Cancelling `result()` leaves the thread running."""

    def __init__(self, function: Callable[[], T], name: str) -> None:
        self._function = function
        self._loop = asyncio.get_running_loop()
        self._future: asyncio.Future[T] = self._loop.create_future()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            value = self._function()
        except BaseException as error:
            self._deliver(self._future.set_exception, error)
        else:
            self._deliver(self._future.set_result, value)

    def _deliver(self, setter: Callable[..., None], value: object) -> None:
        def deliver() -> None:
            if not self._future.done():
                setter(value)
                self._future.exception()  # retrieved: an abandoned result is not an error

        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(deliver)

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    async def result(self) -> T:
        """The function's outcome."""
        return await asyncio.shield(self._future)

    async def ended(self, poll_s: float = 0.02) -> None:
        """Waits until the thread is gone, whatever became of its result."""
        while self._thread.is_alive():
            await asyncio.sleep(poll_s)


async def in_thread(function: Callable[[], T], name: str) -> T:
    """Runs `function` in a thread and returns its outcome."""
    return await Threaded(function, name).result()
