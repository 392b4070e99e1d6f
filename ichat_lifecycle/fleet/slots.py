"""How many workers start at the same time: each load takes cores, memory and disk of the others."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable


class Slots:
    """A queue in the order of asking. For one event loop.

    Args:
        limit: how many may start at the same time.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._waiting: deque[Callable[[], None]] = deque()
        self._starting: set[Callable[[], None]] = set()

    def ask(self, go: Callable[[], None]) -> None:
        """Calls `go` once it may start, maybe at once."""
        self._waiting.append(go)
        self._let_in()

    def leave(self, go: Callable[[], None]) -> None:
        """It has started, or does not want to any more. Saying so again is safe."""
        self._starting.discard(go)
        if go in self._waiting:
            self._waiting.remove(go)
        self._let_in()

    def resize(self, limit: int) -> None:
        """Another limit. Those that are starting go on."""
        self.limit = limit
        self._let_in()

    def _let_in(self) -> None:
        while self._waiting and len(self._starting) < self.limit:
            go = self._waiting.popleft()
            self._starting.add(go)
            go()
