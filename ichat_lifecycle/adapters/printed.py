"""What is printed in a worker's own process, by a library for example: nobody waits for its reader.

Log records go through a LineWriter; `print`, warnings and tracebacks go to sys.stdout and
sys.stderr, and would block the event loop where nobody reads these. Native code prints to the
descriptors themselves, which do not block either (see standard_streams.never_block).
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TextIO

from ichat_lifecycle.adapters import engine_output
from ichat_lifecycle.adapters.line_writer import CLOSE_S, LineWriter
from ichat_lifecycle.adapters.standard_streams import ESCAPED

_PART_LIMIT = 16_384  # characters that may wait for the end of their line


class Printed(io.TextIOBase):
    """Stands in the place of a standard stream; whole lines go to `lines`, scrubbed of secrets.

    While descriptors 1 and 2 lead into the pipe of the engine's output, which is always read, all
    goes to the stream itself: it is a part of the load then.
    """

    def __init__(
        self, stream: TextIO, lines: LineWriter, scrub: Callable[[str], str] = str
    ) -> None:
        self._scrub = scrub
        self._stream = stream
        self._lines = lines
        self._part = ""
        self._lock = threading.RLock()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding

    @property
    def errors(self) -> str | None:  # type: ignore[override]
        return self._stream.errors

    def fileno(self) -> int:
        return self._stream.fileno()

    def isatty(self) -> bool:
        return self._stream.isatty()

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if engine_output.is_redirected():
            return self._stream.write(text)
        with self._lock:
            whole, end, rest = (self._part + text).rpartition("\n")
            self._part = rest
            if len(rest) > _PART_LIMIT:
                whole, end, self._part = whole + end + rest, "\n", ""
        if end:
            self._lines.write(self._scrub(whole) + end)
        return len(text)

    def flush(self) -> None:
        """Nothing of a line that has not ended: others may write theirs in between."""
        if engine_output.is_redirected():
            self._stream.flush()


@contextlib.contextmanager
def printed_by(
    lines: LineWriter, on_dropped: Callable[[int], None], scrub: Callable[[str], str] = str
) -> Iterator[None]:
    """While it lasts, what is printed goes out without anybody waiting for it.

    Args:
        lines: for stderr, and for stdout where that is the same file or terminal.
        on_dropped: as LineWriter's, for a stdout of its own.
        scrub: takes secrets out of what is printed.
    """
    before = sys.stdout, sys.stderr
    try:
        out = None if os.path.sameopenfile(1, 2) else _own_stdout()
        own = lines if out is None else LineWriter(out, on_dropped)
    except OSError:
        yield
        return
    sys.stdout = Printed(before[0], own, scrub)
    sys.stderr = Printed(before[1], lines, scrub)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        if own is not lines and own.close(CLOSE_S) and out is not None:
            out.close()


def _own_stdout() -> TextIO:
    """A stream on a copy of stdout: while an engine starts, descriptor 1 leads elsewhere."""
    return os.fdopen(os.dup(1), "w", buffering=1, encoding=sys.stdout.encoding, errors=ESCAPED)
