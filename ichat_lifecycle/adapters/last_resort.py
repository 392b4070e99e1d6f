"""The last-resort deadline: a loop that is blocked cannot time itself out."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import TextIO

from ichat_lifecycle.adapters import termination_log
from ichat_lifecycle.errors import ExitCode
from ichat_lifecycle.slept import overslept

# How much later than the computed bound it strikes: the event loop's own end.
MARGIN_S = 2.0
TICK_S = 0.5
TELLING_S = 1.0  # for the last words


class LastResort:
    """A plain OS thread that ends the process when a stop outruns its bound.

    Args:
        bound_s: seconds from `arm` to the end.
        kill_engine: ends the engine's processes; may be called from any thread.
        stream: where the stacks of all threads go, to show what blocked.
        clock: monotonic seconds.
        cpu_clock: seconds of CPU time of this process.
    """

    def __init__(
        self,
        bound_s: float,
        kill_engine: Callable[[], None],
        stream: TextIO,
        clock: Callable[[], float] = time.monotonic,
        cpu_clock: Callable[[], float] = time.process_time,
    ) -> None:
        self._clock = clock
        self._cpu_clock = cpu_clock
        self._bound_s = bound_s
        self._kill_engine = kill_engine
        self._stream = stream
        self._disarmed = threading.Event()
        self._thread: threading.Thread | None = None

    def arm(self) -> None:
        """Starts the count; arming again changes nothing."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._wait, name="last-resort", daemon=True)
            self._thread.start()

    def disarm(self) -> None:
        self._disarmed.set()
        if self._thread is not None:
            self._thread.join()

    def _wait(self) -> None:
        if self._disarmed_in_time():
            return
        try:
            # In a thread: what blocked the loop may be this very stream, a pipe that nobody reads.
            telling = threading.Thread(target=self._tell, name="last-words", daemon=True)
            telling.start()
            telling.join(TELLING_S)
        finally:
            try:
                self._kill_engine()
            finally:
                os._exit(ExitCode.STOP_OUTRAN_DEADLINE)

    def _disarmed_in_time(self) -> bool:
        """Wait for the bound. Time in which this process did not run does not count.

        A thread that waits for the interpreter's lock is late as well. The CPU time of the process
        distinguishes the two: who holds the lock for long computes.
        """
        left_s = self._bound_s
        while left_s > 0:
            tick_s = min(TICK_S, left_s)
            began_s, began_cpu_s = self._clock(), self._cpu_clock()
            if self._disarmed.wait(tick_s):
                return True
            took_s = self._clock() - began_s
            froze = overslept(tick_s, took_s) and self._cpu_clock() - began_cpu_s < took_s / 2
            left_s -= tick_s if froze else took_s
        return False

    def _tell(self) -> None:
        what = f"the stop outran its deadline of {self._bound_s:g} s"
        termination_log.write_text(what)
        with contextlib.suppress(Exception):
            print(
                f"ichat-lifecycle: {what}; the stacks of all threads follow\n{_stacks()}",
                file=self._stream,
                flush=True,
            )


def _stacks() -> str:
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"Thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in sys._current_frames().items()
    )
