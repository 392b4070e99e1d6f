"""The newest lines that each worker of a fleet has printed."""

from __future__ import annotations

import asyncio
import itertools
import sys
from collections import defaultdict, deque
from collections.abc import AsyncIterator

KEPT = 1000  # lines of each worker
BYTES_KEPT = 2 * 2**20  # and what they take in memory; a line has usually 200 bytes, at most 64 KiB

# Of what is sent at once: lines, and characters. A client that does not read has so much waiting.
AT_ONCE, PIECE = 100, 32 * 1024
PAUSE_S = 0.1


class _Tail:
    """The newest lines of one worker; `count` is how many there were."""

    def __init__(self) -> None:
        self.lines: deque[str] = deque()
        self.count = 0
        self._bytes = 0

    def add(self, line: str) -> None:
        self.lines.append(line)
        self.count += 1
        self._bytes += sys.getsizeof(line)
        while len(self.lines) > KEPT or self._bytes > BYTES_KEPT:
            self._bytes -= sys.getsizeof(self.lines.popleft())

    def begin(self, count: int) -> int:
        """How many there were before the newest `count`."""
        return self.count - min(count, len(self.lines))

    def after(self, seen: int) -> tuple[str, int]:
        """Some lines after the first `seen` ones, as one text, and how many are seen then."""
        first = max(0, len(self.lines) - (self.count - seen))
        some, size = [], 0
        for line in itertools.islice(self.lines, first, first + AT_ONCE):
            some.append(line)
            size += len(line)
            if size >= PIECE:
                break
        return "\n".join(some), self.count - len(self.lines) + first + len(some)


class OutputTail:
    """Written and read on one event loop."""

    def __init__(self) -> None:
        self._tails: defaultdict[str, _Tail] = defaultdict(_Tail)
        self._come = asyncio.Event()
        self._closed = False

    def add(self, name: str, line: str) -> None:
        self._tails[name].add(line)
        self._come.set()
        self._come = asyncio.Event()

    def close(self) -> None:
        """Ends all that follow."""
        self._closed = True
        self._come.set()

    async def read(self, name: str, count: int) -> AsyncIterator[str]:
        """The newest lines of a worker, oldest first, in texts of up to AT_ONCE lines.

        What is gone before its turn is left out.
        """
        tail = self._tails.get(name) or _Tail()
        seen, end = tail.begin(count), tail.count
        while seen < end:
            text, seen = tail.after(seen)
            yield text

    async def follow(self, name: str, count: int) -> AsyncIterator[str]:
        """The same, and each line that comes from then on."""
        tail = self._tails[name]
        seen = tail.begin(count)
        while True:
            come, end = self._come, tail.count  # before the lines are read: nothing is left out
            while seen < end:
                text, seen = tail.after(seen)
                yield text
            if self._closed:
                return
            await come.wait()
            # Many may follow: a text for each of them and line would cost a core.
            await asyncio.sleep(PAUSE_S)
