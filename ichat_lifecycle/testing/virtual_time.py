"""An asyncio event loop whose clock jumps to the next timer instead of waiting for it."""

from __future__ import annotations

import asyncio
import collections
import contextvars
import heapq
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar, cast

T = TypeVar("T")


class Deadlock(RuntimeError):
    """Everything waits and no timer is set: this life would never end."""


class _JumpingSelector(selectors.DefaultSelector):
    """Instead of waiting for `timeout` seconds, tells the loop that they have passed."""

    now_s = 0.0
    files = 0

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        self.files += 1
        return super().register(fileobj, events, data)

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        self.files -= 1
        return super().unregister(fileobj)

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise Deadlock("nothing is scheduled and nothing is ready")
        self.now_s += max(0.0, timeout)
        return super().select(0)


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """Starts at 0 s. Real file descriptors work but nothing waits for them.

    Attributes:
        interposed: called before each turn of the loop; may schedule something.
        tasks: every task that was made since the clock was last set back.
    """

    # asyncio's own names, which its stubs do not tell.
    _ready: collections.deque[asyncio.Handle]
    _scheduled: list[asyncio.TimerHandle]

    def __init__(self) -> None:
        self._clock = _JumpingSelector()
        super().__init__(self._clock)
        self.interposed: Callable[[], None] | None = None
        self.tasks: list[asyncio.Task[Any]] = []

    def time(self) -> float:
        return self._clock.now_s

    @property
    def busy(self) -> bool:
        """Whether something is to run now; else everything waits, and time is about to pass."""
        return any(not handle.cancelled() for handle in self._ready)

    def block(self, seconds: float) -> None:
        """Time passes and nothing runs, as when a callback does not come back."""
        self._clock.now_s += seconds

    def start_anew(self) -> None:
        """Sets the clock back to 0 s, for another life. Nothing may be scheduled any more."""
        self._scheduled.clear()
        self.tasks.clear()
        self._clock.now_s = 0.0

    # What follows does what asyncio's own does, without its checks for debugging and for files:
    # half of a simulated life is spent here.

    def call_soon(  # type: ignore[override]  # its stub has more variables
        self, callback: Callable[..., Any], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append(handle)
        return handle

    def create_task(
        self,
        coro: Any,
        *,
        name: object = None,
        context: contextvars.Context | None = None,
        **more: Any,
    ) -> asyncio.Task[Any]:
        task = asyncio.Task(coro, loop=self, name=cast(str, name), context=context, **more)
        self.tasks.append(task)
        return task

    def _run_once(self) -> None:
        if self.interposed is not None:
            self.interposed()
        clock, ready, scheduled = self._clock, self._ready, self._scheduled
        if clock.files > 1:  # more than the loop's own pipe
            super()._run_once()  # type: ignore[misc]  # asyncio's own name
            return
        while scheduled and scheduled[0]._cancelled:
            heapq.heappop(scheduled)._scheduled = False  # type: ignore[attr-defined]
        if not ready:
            if not scheduled:
                raise Deadlock("nothing is scheduled and nothing is ready")
            clock.now_s = max(clock.now_s, scheduled[0].when())
        while scheduled and scheduled[0].when() <= clock.now_s:
            timer = heapq.heappop(scheduled)
            timer._scheduled = False  # type: ignore[attr-defined]
            ready.append(timer)
        for _ in range(len(ready)):
            handle = ready.popleft()
            if not handle._cancelled:
                handle._run()


def run_virtual(main: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run` under virtual time.

    Raises:
        Deadlock: nothing will ever happen again.
    """
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(main)
