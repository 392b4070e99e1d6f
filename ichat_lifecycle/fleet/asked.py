"""What others want of a member of a fleet, until its own loop does it."""

from __future__ import annotations

from dataclasses import dataclass

SHUT_DOWN = "its listening socket was shut down"


@dataclass(slots=True)
class Asked:
    """What somebody wants of it."""

    stop: str | None = None  # why
    now: bool = False
    again: bool = False  # to start, after a stop or from rest
    leave: bool = False  # for good
    socket: bool = False  # to start again, because its socket is dead
