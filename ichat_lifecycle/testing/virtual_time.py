"""An asyncio event loop whose clock jumps to the next timer instead of waiting for it."""

from __future__ import annotations

import asyncio
import collections
import contextvars
import heapq
import itertools
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class Deadlock(RuntimeError):
    """Everything waits and no timer is set: this life would never end."""


class _CountingSelector(selectors.DefaultSelector):
    files = 0

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        self.files += 1
        return super().register(fileobj, events, data)

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        self.files -= 1
        return super().unregister(fileobj)


class _Handle(asyncio.Handle):
    """asyncio's own asks at each turn whether the loop is to be debugged."""

    __slots__ = ()
    # asyncio's own names, which its stubs do not tell.
    _context: contextvars.Context
    _callback: Callable[..., Any]
    _args: tuple[Any, ...]
    _repr = _source_traceback = None

    def __init__(
        self,
        callback: Callable[..., Any],
        args: tuple[Any, ...],
        context: contextvars.Context | None,
    ) -> None:
        self._context = contextvars.copy_context() if context is None else context
        self._callback = callback
        self._args = args
        self._cancelled = False

    def cancel(self) -> None:
        self._cancelled = True


class _Timer(_Handle, asyncio.TimerHandle):
    __slots__ = ()
    _when: float


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """Starts at 0 s. Real file descriptors work but nothing waits for them.

    Timers of the same time go off in the order in which they were set.

    Attributes:
        interposed: called before each turn of the loop; may schedule something.
        tasks: every task that was made since the clock was last set back.
    """

    # asyncio's own names, which its stubs do not tell.
    _ready: collections.deque[_Handle]
    _stopping: bool
    _process_events: Callable[[list[Any]], None]

    def __init__(self) -> None:
        self._files = _CountingSelector()
        self._now_s = 0.0
        self._timers: list[tuple[float, int, _Timer]] = []
        self._order = itertools.count()
        super().__init__(self._files)
        self.interposed: Callable[[], None] | None = None
        self.tasks: list[asyncio.Task[Any]] = []

    get_debug = staticmethod(bool)  # False; asked for each task and future

    def time(self) -> float:
        return self._now_s

    @property
    def busy(self) -> bool:
        """Whether something is to run now; else everything waits, and time is about to pass."""
        return any(not handle.cancelled() for handle in self._ready)

    @property
    def timers(self) -> list[asyncio.TimerHandle]:
        """Those that are set, in the order in which they will go off."""
        return [timer for _, _, timer in sorted(self._timers) if not timer._cancelled]

    def block(self, seconds: float) -> None:
        """Time passes and nothing runs, as when a callback does not come back."""
        self._now_s += seconds

    def start_anew(self) -> None:
        """Sets the clock back to 0 s, for another life. Nothing may be scheduled any more."""
        self._timers.clear()
        self.tasks.clear()
        self._now_s = 0.0

    # What follows does what asyncio's own does, without its checks for debugging and for files:
    # half of a simulated life is spent here.

    def call_soon(  # type: ignore[override]  # its stub has more variables
        self, callback: Callable[..., Any], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        handle = _Handle(callback, args, context)
        self._ready.append(handle)
        return handle

    def call_at(  # type: ignore[override]  # its stub has more variables
        self,
        when: float,
        callback: Callable[..., Any],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        timer = _Timer(callback, args, context)
        timer._when = when
        heapq.heappush(self._timers, (when, next(self._order), timer))
        return timer

    def call_later(  # type: ignore[override]  # its stub has more variables
        self,
        delay: float,
        callback: Callable[..., Any],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        return self.call_at(self._now_s + delay, callback, *args, context=context)

    def create_task(
        self,
        coro: Any,
        *,
        name: object = None,
        context: contextvars.Context | None = None,
        **more: Any,
    ) -> asyncio.Task[Any]:
        task = asyncio.Task(coro, loop=self, name=name, context=context, **more)  # type: ignore[arg-type]  # its stub has only str
        self.tasks.append(task)
        return task

    def _run_once(self) -> None:
        ready, timers = self._ready, self._timers
        while True:
            if self.interposed is not None:
                self.interposed()
            if self._files.files > 1:  # more than the loop's own pipe
                self._process_events(self._files.select(0))
            while timers and timers[0][2]._cancelled:
                heapq.heappop(timers)
            if not ready:
                if not timers:
                    raise Deadlock("nothing is scheduled and nothing is ready")
                self._now_s = max(self._now_s, timers[0][0])
            while timers and timers[0][0] <= self._now_s:
                ready.append(heapq.heappop(timers)[2])
            for _ in range(len(ready)):
                handle = ready.popleft()
                if handle._cancelled:
                    continue
                try:
                    handle._context.run(handle._callback, *handle._args)
                except (SystemExit, KeyboardInterrupt):
                    raise
                except BaseException as error:
                    told = {"message": f"exception in {handle!r}", "exception": error}
                    self.call_exception_handler(told)
            if self._stopping:
                return


def run_virtual(main: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run` under virtual time.

    Raises:
        Deadlock: nothing will ever happen again.
    """
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(main)
