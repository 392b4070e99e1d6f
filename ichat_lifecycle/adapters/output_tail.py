"""The newest lines that each worker of a fleet has printed."""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque
from collections.abc import AsyncIterator

KEPT = 1000  # lines of each worker; a line has at most 16 KiB, and usually 200 bytes


class OutputTail:
    """Written and read on one event loop."""

    def __init__(self) -> None:
        self._lines: defaultdict[str, deque[str]] = defaultdict(lambda: deque(maxlen=KEPT))
        self._counts: defaultdict[str, int] = defaultdict(int)
        self._come = asyncio.Event()
        self._closed = False

    def add(self, name: str, line: str) -> None:
        self._lines[name].append(line)
        self._counts[name] += 1
        self._come.set()
        self._come = asyncio.Event()

    def close(self) -> None:
        """Ends all that follow."""
        self._closed = True
        self._come.set()

    def last(self, name: str, count: int) -> list[str]:
        """The newest lines of a worker, oldest first."""
        lines = self._lines.get(name, deque())
        return list(lines)[max(0, len(lines) - count) :]

    async def follow(self, name: str, count: int) -> AsyncIterator[str]:
        """The same, and each line that comes from then on. What comes too fast is left out."""
        seen = self._counts[name] - len(self.last(name, count))
        while True:
            come = self._come  # before the lines are read: nothing is left out
            new = self._counts[name] - seen
            seen = self._counts[name]
            for line in self.last(name, new):
                yield line
            if self._closed:
                return
            await come.wait()
