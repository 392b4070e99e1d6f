"""Lines that are written by a thread of their own: a reader that stops reading blocks nobody else.

A pipe takes 64 KiB, and a terminal can be stopped with Ctrl-S. An event loop that waited for either
would answer nobody and notice no signal; the reader of the engine's output would block the engine.
"""

from __future__ import annotations

import collections
import contextlib
import select
import threading
import time
from collections.abc import Callable

from ichat_lifecycle.adapters.logs import Writable
from ichat_lifecycle.errors import LimitError

LIMIT = 10_000  # lines that wait
CHARACTERS_LIMIT = 8_000_000  # and their characters
# Characters of one write, unless a line has more: a flood of lines is no flood of writes. Of ASCII
# text a pipe takes so much in one piece, whoever else writes to it.
AT_ONCE = select.PIPE_BUF
CLOSE_S = 1.0


class LineWriter:
    """A stream in front of another one (adapters.logs.Writable). Writes never wait.

    Args:
        on_dropped: called with the number of lines that had no room, once there is some again; from
            the writer's thread.
        limit: how many may wait.

    Attributes:
        dropped: how many lines have had no room, from the beginning on.

    Raises:
        LimitError: the system has no thread left.
    """

    def __init__(
        self, stream: Writable, on_dropped: Callable[[int], None], limit: int = LIMIT
    ) -> None:
        self._stream = stream
        self._on_dropped = on_dropped
        self._limit = limit
        self._waiting: collections.deque[str] = collections.deque()
        self._characters = 0
        self._unreported = 0
        self._closing = False
        # Reentrant, for a signal handler that logs in the middle of a write.
        self._changed = threading.Condition(threading.RLock())
        self.dropped = 0
        self._thread = threading.Thread(target=self._run, name="line writer", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:
            raise LimitError(
                f"no thread for the log: {error}", hint="raise the limit on processes and threads"
            ) from error

    def write(self, text: str) -> int:
        with self._changed:
            if self._has_room(text):
                if not self._waiting:  # else it is on its way
                    self._changed.notify_all()
                self._waiting.append(text)
                self._characters += len(text)
            else:
                self.dropped += 1
                self._unreported += 1
        return len(text)

    def _has_room(self, text: str) -> bool:
        few = len(self._waiting) < self._limit
        return few and self._characters + len(text) <= CHARACTERS_LIMIT

    def flush(self) -> None:
        """Nothing: lines go out as soon as they can."""

    def isatty(self) -> bool:
        return self._stream.isatty()

    def close(self, within_s: float = CLOSE_S) -> bool:
        """Whether all that was written has gone out within so many seconds."""
        end = time.monotonic() + within_s
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(max(0.0, end - time.monotonic()))
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (text := self._next()) is not None:
            with contextlib.suppress(OSError, ValueError):  # its other end is closed
                self._stream.write(text)
                self._stream.flush()
            self._report()

    def _next(self) -> str | None:
        """The next lines, once there are some; None at the end."""
        with self._changed:
            while not self._waiting and not self._closing:
                self._changed.wait()
            if not self._waiting:
                return None
            texts = [self._waiting.popleft()]
            size = len(texts[0])
            while self._waiting and size + len(self._waiting[0]) <= AT_ONCE:
                texts.append(self._waiting.popleft())
                size += len(texts[-1])
            self._characters -= size
            return "".join(texts)

    def _report(self) -> None:
        """Half empty is room enough for the report itself."""
        with self._changed:
            if not self._unreported or len(self._waiting) > self._limit // 2:
                return
            count, self._unreported = self._unreported, 0
        self._on_dropped(count)
