"""Lines that are written by a thread of their own: a reader who stops reading holds nobody up.

A pipe takes 64 KiB and a terminal can be stopped with Ctrl-S. A supervisor that waited for either
would start nothing again, answer nobody, and hear no signal.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable

from ichat_lifecycle.adapters.logs import Writable

LIMIT = 10_000  # lines that wait
CLOSE_S = 1.0


class LineWriter:
    """A stream in front of another one (adapters.logs.Writable). Writes never wait.

    Args:
        on_dropped: called with the number of lines that had no room, once there is some again.
        limit: how many may wait.
    """

    def __init__(
        self, stream: Writable, on_dropped: Callable[[int], None], limit: int = LIMIT
    ) -> None:
        self._stream = stream
        self._on_dropped = on_dropped
        self._waiting: queue.Queue[str | None] = queue.Queue(limit)
        self._dropped = 0
        self._thread = threading.Thread(target=self._run, name="line writer", daemon=True)
        self._thread.start()

    def write(self, text: str) -> int:
        try:
            self._waiting.put_nowait(text)
        except queue.Full:
            self._dropped += 1
        else:
            dropped, self._dropped = self._dropped, 0
            if dropped:
                self._on_dropped(dropped)
        return len(text)

    def flush(self) -> None:
        """Nothing: each line goes out as soon as it can."""

    def isatty(self) -> bool:
        return self._stream.isatty()

    def close(self, within_s: float = CLOSE_S) -> bool:
        """Whether all that was written has gone out within so many seconds."""
        end = time.monotonic() + within_s
        with contextlib.suppress(queue.Full):
            self._waiting.put(None, timeout=within_s)
        self._thread.join(max(0.0, end - time.monotonic()))
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (text := self._waiting.get()) is not None:
            with contextlib.suppress(OSError, ValueError):  # its other end is closed
                self._stream.write(text)
                self._stream.flush()
