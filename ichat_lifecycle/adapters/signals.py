"""SIGTERM and SIGINT: the first asks for a graceful stop, the second for one at once.

Plain signal handlers, not the event loop's: they run in the main thread between two instructions of
Python even while the loop is blocked, and need no wake-up descriptor that a child could inherit.
"""

from __future__ import annotations

import signal
from types import FrameType
from typing import Protocol

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stoppable(Protocol):
    def __call__(self, cause: str, *, now: bool) -> None: ...


class StopSignals:
    """Turns signals into calls of `ask_to_stop`.

    Install it from the main thread; `remove` puts the former handlers back.
    """

    def __init__(self, ask_to_stop: Stoppable) -> None:
        self._ask = ask_to_stop
        self._seen = 0
        self._before = {number: signal.getsignal(number) for number in STOP_SIGNALS}

    def install(self) -> None:
        for number in STOP_SIGNALS:
            signal.signal(number, self._handle)

    def remove(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._seen += 1
        self._ask(signal.Signals(number).name, now=self._seen > 1)
