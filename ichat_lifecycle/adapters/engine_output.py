"""What the engine's processes print: read line by line, passed on, and kept for the first cause.

vLLM's children write to the file descriptors 1 and 2 that they inherit. While they are started,
those two lead into a pipe of ours; its end of file is also the proof that all of them are gone.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator

from ichat_lifecycle.adapters.engine_lines import EngineLines
from ichat_lifecycle.adapters.guardian import prints_into
from ichat_lifecycle.adapters.line_throttle import ThrottledLines
from ichat_lifecycle.adapters.line_writer import LineWriter
from ichat_lifecycle.adapters.standard_streams import ESCAPED

CHUNK = 16_384

# The engines that are being started: descriptors 1 and 2 lead into the pipe of the last one.
_redirected: list[EngineOutput] = []


def is_redirected() -> bool:
    """Whether descriptors 1 and 2 of this process lead into the pipe of an engine that starts."""
    return bool(_redirected)


class EngineOutput:
    """A pipe, a thread that reads it, and the last lines of each process.

    Lines that come too fast are left out (see line_throttle), which the sink is told.

    Args:
        sink: gets each line, without its end and without what a terminal would obey, in the
            reader's thread; by default the lines go to the stderr of now.
        watcher: gets each line too.
        peeker: gets what has come of a line that has not ended, such as a progress bar's.
    """

    def __init__(
        self,
        sink: Callable[[str], None] | None = None,
        watcher: Callable[[str], None] = lambda line: None,
        peeker: Callable[[str], None] = lambda rest: None,
    ) -> None:
        self._watcher = watcher
        self._peeker = peeker
        self._stderr = _Stderr() if sink is None else None
        self._sink = self._stderr.write_line if self._stderr else (sink or print)
        self._read_fd, self._write_fd = os.pipe()
        self._pipe = os.fstat(self._read_fd)
        self._lines = EngineLines()
        self._thread = threading.Thread(target=self._read, name="engine-output", daemon=True)
        self._thread.start()

    @property
    def lines(self) -> tuple[str, ...]:
        """The newest lines of all processes, oldest first."""
        return self._lines.all

    def lines_of_the_last(self, seconds: float) -> tuple[str, ...]:
        """Those that arrived within the last seconds, oldest first."""
        return self._lines.since(time.monotonic() - seconds)

    @property
    def lines_by_child(self) -> dict[str, tuple[str, ...]]:
        """The newest lines of each process by its name, oldest first."""
        return self._lines.by_child

    @property
    def read_fd(self) -> int:
        """The reading end of the pipe; the reader closes it at the end of file."""
        return self._read_fd

    def is_of(self, pid: int) -> bool:
        """Whether a process prints into this pipe, as all of the engine's do."""
        return prints_into(pid, self._pipe)

    @property
    def at_end(self) -> bool:
        """Whether every process that held the pipe is gone, and all it printed has been read."""
        return not self._thread.is_alive()

    @contextlib.contextmanager
    def redirected(self) -> Iterator[None]:
        """File descriptors 1 and 2 lead into the pipe; what we print ourselves meanwhile too."""
        _flush()
        saved = [os.dup(1), os.dup(2)]
        os.dup2(self._write_fd, 1)
        os.dup2(self._write_fd, 2)
        _redirected.append(self)
        try:
            yield
        finally:
            _flush()
            _redirected.remove(self)
            for fd, target in zip(saved, (1, 2), strict=True):
                os.dup2(fd, target)
                os.close(fd)

    def close(self) -> None:
        """Gives up our own end; the reader ends with the last process. Safe to call twice."""
        if self._write_fd >= 0:
            os.close(self._write_fd)
            self._write_fd = -1

    def _read(self) -> None:
        try:
            self._read_lines()
        finally:
            if self._stderr is not None:
                self._stderr.close()

    def _read_lines(self) -> None:
        lines = ThrottledLines()
        try:
            while chunk := os.read(self._read_fd, CHUNK):
                now_s = time.monotonic()
                for line in lines.feed(chunk, now_s):
                    self._take(line)
                self._report(lines.take_dropped(now_s))
                # A progress bar ends its line only with its next step.
                if rest := lines.rest:
                    _give(self._peeker, rest)
            for line in lines.end():
                self._take(line)
            self._report(lines.take_dropped(time.monotonic(), at_end=True))
        finally:
            os.close(self._read_fd)

    def _report(self, dropped: int) -> None:
        if dropped:
            _give(self._sink, f"ichat-lifecycle: {dropped} lines were dropped: they came too fast")

    def _take(self, line: str) -> None:
        self._lines.append(line, time.monotonic())
        _give(self._sink, line)
        if line:
            _give(self._watcher, line)


def _give(taker: Callable[[str], None], line: str) -> None:
    # One that fails (a full disk) must not stop the reading: the engine would block.
    with contextlib.suppress(Exception):
        taker(line)


class _Stderr:
    """The stderr of now; nobody waits for its reader, least of all the reader of the engine."""

    def __init__(self) -> None:
        # A copy: while an engine starts, descriptor 2 leads into the pipe.
        self._stream = os.fdopen(os.dup(2), "w", encoding="utf-8", errors=ESCAPED)
        self._lines = LineWriter(self._stream, self._on_dropped)

    def write_line(self, line: str) -> None:
        self._lines.write(f"{line}\n")

    def close(self) -> None:
        if self._lines.close():
            self._stream.close()

    def _on_dropped(self, count: int) -> None:
        self.write_line(f"ichat-lifecycle: {count} lines were dropped: nobody read them")


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
