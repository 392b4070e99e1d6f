"""Lines out of what a process prints, at a bounded rate.

Whoever prints without end, by mistake or on purpose, fills no log and takes no core: what comes too
fast is not even taken apart. The burst is generous, so that tracebacks of many processes at once
come whole; and what was printed last, which is why a process has ended, always comes.
"""

from __future__ import annotations

from collections.abc import Iterator

from ichat_lifecycle.adapters.line_splitter import LineSplitter
from ichat_lifecycle.token_bucket import TokenBucket

# In bytes; each line costs as much as so many more, as short ones are not less work.
PER_S, BURST, LINE_COST = 128 * 1024, 4 * 2**20, 128
LAST = 4096  # bytes that come at the end in any case
REPORT_EVERY_S = 10.0


def line_bucket() -> TokenBucket:
    """A full one, with these limits."""
    return TokenBucket(PER_S, BURST)


def cost_of(chunk: bytes) -> int:
    """What a chunk costs, in bytes."""
    return len(chunk) + LINE_COST * _ends(chunk)


class ThrottledLines:
    """A LineSplitter behind a TokenBucket. For one thread.

    Times are in seconds of any one clock.

    Args:
        bucket: what is printed is taken from it; default: one of its own. Processes that follow one
            another share one, or each new one would have a burst again.
    """

    def __init__(self, bucket: TokenBucket | None = None) -> None:
        self._splitter = LineSplitter()
        self._bucket = bucket or line_bucket()
        self._dropping = False
        self._last = b""  # the end of what was dropped
        self._dropped = 0  # lines that nobody has been told of
        self._reported_s: float | None = None

    @property
    def rest(self) -> str:
        """What has come of a line that has not ended; "" while lines are dropped."""
        return self._splitter.rest

    def feed(self, chunk: bytes, now_s: float) -> Iterator[str]:
        """The lines that end in this chunk, or none where it is too much."""
        if not self._bucket.take(now_s, cost_of(chunk)):
            if not self._dropping:
                yield from self._splitter.end()
            self._dropping = True
            self._dropped += _ends(chunk)
            self._last = (self._last + chunk)[-LAST:]
            return
        if self._dropping:
            self._dropping, self._last = False, b""
            chunk = chunk.partition(b"\n")[2]  # it may begin within a line
        yield from self._splitter.feed(chunk)

    def end(self) -> Iterator[str]:
        """What is left at the end of all: also the last of what was dropped."""
        if self._dropping:
            whole = self._last.partition(b"\n")[2]
            last = whole or self._last  # which may be one long line
            self._dropped = max(0, self._dropped - _ends(last))
            yield from self._splitter.feed(last)
            self._dropping, self._last = False, b""
        yield from self._splitter.end()

    def take_dropped(self, now_s: float, *, at_end: bool = False) -> int:
        """How many lines were dropped that are to be told of now: every 10 s, and at the end."""
        due = self._reported_s is None or now_s - self._reported_s >= REPORT_EVERY_S
        if not self._dropped or not (due or at_end):
            return 0
        count, self._dropped, self._reported_s = self._dropped, 0, now_s
        return count


def _ends(chunk: bytes) -> int:
    return chunk.count(b"\n") + chunk.count(b"\r")
