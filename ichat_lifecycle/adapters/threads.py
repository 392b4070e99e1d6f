"""Blocking work off the event loop, each piece in a daemon thread of its own.

Not `asyncio.to_thread`: its threads are joined at exit, and an import or a model load that is stuck
must not keep the process from ending.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


# Seconds between two offers of the interpreter lock. Each answer of the control plane needs it
# several times, and Python's default of 5 ms adds up to more than a tenth of a second.
SWITCH_INTERVAL_S = 0.0005


@contextlib.contextmanager
def considerate() -> Iterator[None]:
    """While it lasts, a thread full of imports leaves the others their turns.

    No garbage collection either: imports make a million objects and no garbage, and each full
    collection of them holds the lock for half a second. What is there at the end is frozen, as vLLM
    itself does when it begins to serve, so that no later collection walks through it.

    Not around a fork: the child would inherit both for its life.
    """
    interval, collecting = sys.getswitchinterval(), gc.isenabled()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    gc.disable()
    try:
        yield
    finally:
        sys.setswitchinterval(interval)
        gc.freeze()
        if collecting:
            gc.enable()


def within(seconds: float, action: Callable[[], object]) -> bool:
    """Runs what may wait for somebody else, such as a write; whether it has ended in time.

    Where it has not, its thread goes on. What it raises is suppressed.
    """

    def run() -> None:
        with contextlib.suppress(Exception):
            action()

    thread = threading.Thread(target=run, name="within", daemon=True)
    try:
        thread.start()
    except RuntimeError:  # no thread is left
        run()
        return True
    thread.join(seconds)
    return not thread.is_alive()


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
            self._thread.join()  # it has only to return: who has the outcome finds no thread
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
