"""Notices that the worker's own event loop does not turn: then nothing is served, whatever the
state says, and nobody on that loop can say so.

A thread asks the loop for a sign of life; the control plane, on a thread of its own, reads what
came of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import structlog

from ichat_lifecycle.journal import Reason

log = structlog.get_logger("ichat_lifecycle")

INTERVAL_S = 0.5
# Imports and loads hold the interpreter's lock for half a second at a time; on a busy machine more.
BLOCKED_AFTER_S = 3.0
_JOIN_S = 0.5


@dataclass(frozen=True, slots=True)
class LoopHealth:
    """How late the event loop is now.

    Attributes:
        lag_s: how long the last sign of life took, or the one that is waited for has taken so far.
        where: what holds it up, as `FILE:LINE in FUNCTION`, once it is blocked.
    """

    lag_s: float = 0.0
    blocked: bool = False
    where: str | None = None

    @property
    def reason(self) -> Reason | None:
        """Why nothing is served, where the loop is blocked."""
        if not self.blocked:
            return None
        return Reason(
            "loop_blocked",
            f"the event loop has not turned for {self.lag_s:.1f} s, so nothing is served",
            self.where,
            "something calls blocking code on it, a middleware for example; the log has the stack",
        )


class LoopWatch:
    """Watches one loop from a thread of its own.

    Args:
        blocked_after_s: silence from which on the loop counts as blocked.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        blocked_after_s: float = BLOCKED_AFTER_S,
        interval_s: float = INTERVAL_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._blocked_after_s = blocked_after_s
        self._interval_s = interval_s
        self._clock = clock
        self._ended = threading.Event()
        self._asked_at: float | None = None
        self._last_lag_s = 0.0
        self._ident = 0
        self._told = False

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watches the running loop; for the loop's own thread."""
        self._ident = threading.get_ident()
        loop = asyncio.get_running_loop()
        self._ended.clear()
        thread = threading.Thread(target=self._watch, args=(loop,), name="loop-watch", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            self._asked_at = None
            thread.join(_JOIN_S)  # bounded: what blocks may be the log that it writes to

    def health(self) -> LoopHealth:
        """From any thread."""
        asked_at = self._asked_at
        lag_s = self._last_lag_s if asked_at is None else self._clock() - asked_at
        blocked = asked_at is not None and lag_s >= self._blocked_after_s
        return LoopHealth(round(lag_s, 3), blocked, self._where() if blocked else None)

    def _where(self) -> str | None:
        frame = sys._current_frames().get(self._ident)
        if frame is None:
            return None
        return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"

    # --- in the thread

    def _watch(self, loop: asyncio.AbstractEventLoop) -> None:
        while not self._ended.wait(self._interval_s):
            if self._asked_at is None:
                self._asked_at = self._clock()
                try:
                    loop.call_soon_threadsafe(self._answer)
                except RuntimeError:  # it has closed
                    self._asked_at = None
                    return
            elif not self._told and (health := self.health()).blocked:
                self._told = True
                stack = "".join(traceback.format_stack(sys._current_frames().get(self._ident)))
                log.warning("loop_blocked", lag_s=health.lag_s, where=health.where, stack=stack)

    # --- on the loop

    def _answer(self) -> None:
        if self._asked_at is None:
            return
        self._last_lag_s = self._clock() - self._asked_at
        self._asked_at = None
        if self._told:
            self._told = False
            log.warning("loop_turns_again", blocked_s=round(self._last_lag_s, 3))
