"""How often, and how soon, an engine that was lost is replaced within the process."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from ichat_lifecycle.config import Restart


class RestartBudget:
    """At most `max` restarts within `window` seconds, further and further apart.

    Args:
        settings: how many, in which window, how far apart.
        random: gives a number from 0 to 1, so that many workers do not restart in step.
    """

    def __init__(self, settings: Restart, random: Callable[[], float]) -> None:
        self._settings = settings
        self._random = random
        self._spent: deque[float] = deque()

    def left(self, now_s: float) -> int:
        """How many more restarts there may be now. From any thread."""
        return max(0, self._settings.max - self._spent_lately(now_s))

    def delay_s(self, now_s: float) -> float:
        """After how many seconds the next restart may begin.

        The first in a window begins at once; each further one waits twice as long as the one
        before, from `backoff` to `backoff_max`, less up to a half by chance.
        """
        delay_s = 0.0
        for _ in range(self._spent_lately(now_s)):
            # Not 2 ** n: with a budget of a thousand that is no float any more.
            delay_s = min(delay_s * 2 or self._settings.backoff, self._settings.backoff_max)
        return delay_s * (1 - self._random() / 2)

    def spend(self, now_s: float) -> None:
        """A restart has begun."""
        while self._spent and not self._counts(self._spent[0], now_s):
            self._spent.popleft()
        self._spent.append(now_s)

    def _spent_lately(self, now_s: float) -> int:
        return sum(self._counts(at_s, now_s) for at_s in tuple(self._spent))

    def _counts(self, at_s: float, now_s: float) -> bool:
        return at_s > now_s - self._settings.window
