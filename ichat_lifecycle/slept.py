"""Watches that were not running themselves must not judge what they have not seen.

A container that is paused, a virtual machine that is moved, and a process that gets SIGSTOP stop
the watch together with what it watches, while the clock goes on. A watch therefore looks at the
clock in short ticks. A tick that ends much too late shows that nobody watched in between: the
silence begins anew, and what may lie unread is read first.
"""

from __future__ import annotations

# So much later than it was due, in seconds, is not a busy machine: the watch was not running.
LAG_S = 1.0

# Looks during a silence that has a limit; each one costs a wake-up.
LOOKS = 20


def overslept(due_s: float, now_s: float) -> bool:
    """Whether a wait that was due at one time has ended so late that we were not running."""
    return now_s - due_s >= LAG_S


class Silence:
    """For how long somebody has reported nothing, while we were there to receive it.

    Args:
        limit_s: the silence that is too long; a look is due each 1/20 of it.
        now_s: the time on the clock of the caller, in seconds.
    """

    def __init__(self, limit_s: float, now_s: float) -> None:
        self._limit_s = limit_s
        self._since_s = self._looked_s = now_s

    def heard(self, now_s: float) -> None:
        """Something was reported."""
        self._since_s = now_s

    @property
    def tick_s(self) -> float:
        """How long to wait between two looks, in seconds."""
        return self._limit_s / LOOKS

    def too_long(self, now_s: float) -> bool:
        """Look, at least each tick: whether it has lasted for the limit."""
        if overslept(self._looked_s + self.tick_s, now_s):
            self._since_s = now_s
        self._looked_s = now_s
        return now_s - self._since_s >= self._limit_s
