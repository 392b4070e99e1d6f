"""The newest lines that each worker of a fleet has printed."""

from __future__ import annotations

import asyncio
import sys
from collections import defaultdict, deque
from collections.abc import AsyncIterator

KEPT = 1000  # lines of each worker
BYTES_KEPT = 2 * 2**20  # and what they take in memory; a line has usually 200 bytes, at most 64 KiB

AT_ONCE, PAUSE_S = 100, 0.1


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

    def last(self, name: str, count: int) -> list[str]:
        """The newest lines of a worker, oldest first."""
        tail = self._tails.get(name)
        lines = list(tail.lines) if tail else []
        return lines[max(0, len(lines) - count) :]

    async def follow(self, name: str, count: int) -> AsyncIterator[str]:
        """The same, and each line that comes from then on, in texts of up to AT_ONCE lines.

        What comes too fast is left out.
        """
        tail = self._tails[name]
        seen = tail.count - len(self.last(name, count))
        while True:
            come = self._come  # before the lines are read: nothing is left out
            new, seen = tail.count - seen, tail.count
            lines = self.last(name, new)
            for first in range(0, len(lines), AT_ONCE):
                yield "\n".join(lines[first : first + AT_ONCE])
            if self._closed:
                return
            await come.wait()
            # Many may follow: a text for each of them and line would cost a core.
            await asyncio.sleep(PAUSE_S)
