"""What all members of a fleet share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ichat_lifecycle.config import Restart
from ichat_lifecycle.fleet.ports import Clock, Launcher
from ichat_lifecycle.fleet.slots import Slots
from ichat_lifecycle.journal import Journal


@dataclass(slots=True)
class Surroundings:
    """What all members of a fleet share.

    Attributes:
        restart: how often, and how soon, a worker that has ended is started again.
        watchdog_s: a worker that tells nothing for so long is killed; 0: none is. Of processes that
            are started from now on.
        scrub: takes secrets out of errors of ours that others are shown.
        changed: called with each change of any member.
    """

    launcher: Launcher
    slots: Slots
    restart: Restart
    clock: Clock
    random: Callable[[], float]
    journal: Journal
    changed: Callable[[], None] = lambda: None
    watchdog_s: float = 0.0
    scrub: Callable[[str], str] = str
