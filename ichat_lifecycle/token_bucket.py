"""A limit on how often something may happen. Pure: the caller brings the clock."""

from __future__ import annotations


class TokenBucket:
    """At most `burst` at once, and `per_s` a second in the long run.

    What is taken may be more than what is left, once: what follows waits until that is paid back.
    So a single large amount is never refused for ever.

    Args:
        per_s: what comes back each second.
        burst: what there is after a long rest, and at the beginning.
    """

    def __init__(self, per_s: float, burst: float) -> None:
        self._per_s = per_s
        self._burst = burst
        self._left = burst
        self._at_s: float | None = None

    def take(self, now_s: float, amount: float = 1.0) -> bool:
        """Whether so much may happen now, by a clock in seconds; if so, it is taken."""
        self._refill(now_s)
        if self._left < min(1.0, amount):
            return False
        self._left -= amount
        return True

    def spend(self, now_s: float, amount: float) -> float:
        """Take what has been used already. What is owed is a burst at most, whoever has used it.

        Returns:
            how long to wait until it is paid back, in seconds.
        """
        self._refill(now_s)
        self._left = max(-self._burst, self._left - amount)
        return max(0.0, -self._left) / self._per_s

    def _refill(self, now_s: float) -> None:
        if self._at_s is not None:
            back = max(0.0, now_s - self._at_s) * self._per_s
            self._left = min(self._burst, self._left + back)
        self._at_s = now_s

    def wait_s(self) -> float:
        """How long after the last `take` the next one succeeds, in seconds; 0 for at once."""
        return max(0.0, 1.0 - self._left) / self._per_s
