"""The last-resort deadline: a loop that is blocked cannot time itself out."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import traceback
from collections.abc import Callable
from typing import TextIO

from ichat_lifecycle.adapters import termination_log
from ichat_lifecycle.errors import ExitCode

# How much later than the computed bound it strikes: the event loop's own end.
MARGIN_S = 2.0
TELLING_S = 1.0  # for the last words


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
            # In a thread: what blocked the loop may be this very stream, a pipe that nobody reads.
            telling = threading.Thread(target=self._tell, name="last-words", daemon=True)
            telling.start()
            telling.join(TELLING_S)
        finally:
            try:
                self._kill_engine()
            finally:
                os._exit(ExitCode.STOP_OUTRAN_DEADLINE)

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
