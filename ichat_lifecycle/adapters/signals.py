"""SIGTERM and SIGINT: the first asks for a graceful stop, the second for one at once.

Plain signal handlers, not the event loop's: they run in the main thread between two instructions of
Python even while the loop is blocked, and need no wake-up descriptor that a child could inherit.

One request can arrive as several signals. A terminal sends Ctrl-C to a whole process group, and a
wrapper in that group forwards its own; `timeout` signals its child and its group. Signals that
arrive within BURST_S of the first one therefore count as one request. The kernel sends the parent's
death signal (see parent) once for each thread that the parent had. In a worker of a supervisor a
repeated SIGTERM is never a request to stop at once: the supervisor uses SIGINT for that.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Protocol

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)

# Copies of one request arrive within milliseconds; nobody presses Ctrl-C again as fast as this.
BURST_S = 0.1


class Stoppable(Protocol):
    def __call__(self, cause: str, *, now: bool) -> None: ...


class StopSignals:
    """Turn signals into calls of `ask_to_stop`.

    Install it from the main thread; `remove` puts the former handlers back.

    Args:
        ask_to_stop: called in the main thread, from within a signal handler.
        supervised: a supervisor has started this process. SIGTERM is then graceful however often it
            comes; SIGINT after another request is a stop at once.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        ask_to_stop: Stoppable,
        *,
        supervised: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ask = ask_to_stop
        self._supervised = supervised
        self._clock = clock
        self._first: tuple[int, float] | None = None
        self._before = {number: signal.getsignal(number) for number in STOP_SIGNALS}

    def install(self) -> None:
        for number in STOP_SIGNALS:
            signal.signal(number, self._handle)

    def remove(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._first is None:
            self._first = number, self._clock()
            self._ask(signal.Signals(number).name, now=False)
        elif not self._is_copy(number, *self._first):
            self._ask(signal.Signals(number).name, now=True)

    def _is_copy(self, number: int, first: int, first_s: float) -> bool:
        """Whether this signal belongs to the first request."""
        if self._supervised:
            return number == signal.SIGTERM
        return number == first and self._clock() - first_s < BURST_S
