"""The last-resort deadline: a loop that is blocked cannot time itself out."""

from __future__ import annotations

import faulthandler
import os
import threading
from collections.abc import Callable
from typing import TextIO

from ichat_lifecycle.errors import ExitCode


class LastResort:
    """A plain OS thread that ends the process when a stop outruns its bound.

    Args:
        bound_s: seconds from `arm` to the end.
        kill_engine: ends the engine's processes; may be called from any thread.
        stream: where the stacks of all threads go, to show what blocked.
    """

    def __init__(self, bound_s: float, kill_engine: Callable[[], None], stream: TextIO) -> None:
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
        if self._disarmed.wait(self._bound_s):
            return
        try:
            print(
                f"ichat-lifecycle: the stop outran its deadline of {self._bound_s:g} s; "
                "the stacks of all threads follow",
                file=self._stream,
                flush=True,
            )
            faulthandler.dump_traceback(self._stream, all_threads=True)
            self._kill_engine()
        finally:
            os._exit(ExitCode.STOP_OUTRAN_DEADLINE)
