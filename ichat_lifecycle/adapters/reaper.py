"""Waiting for the orphans of a container whose PID 1 this process is.

The kernel makes every orphan of the container a child of PID 1: when EngineCore is killed, its
workers and the compilers that they have started. Without a parent that waits for them they stay
zombies, and the number of processes is limited.
"""

from __future__ import annotations

import contextlib
import multiprocessing.process
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

INIT = 1
# A child of our own that has ended is waited for by whoever started it, long before this.
EVERY_S = 10.0

_PROC = Path("/proc")


class Reaper:
    """Waits for adopted processes that have ended: for those that stay zombies for a round.

    Children of multiprocessing are left to it: it could not see their end any more. Whoever else
    waits for a child too late gets ChildProcessError.
    """

    def __init__(self) -> None:
        self._before: frozenset[int] = frozenset()

    def round(self) -> None:
        """Reaps the zombies of the round before that are still there."""
        zombies = frozenset(_zombies()) - _of_multiprocessing()
        for pid in zombies & self._before:
            with contextlib.suppress(OSError):
                os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG)
        self._before = zombies


def reap_as_init() -> None:
    """Starts a thread that reaps, where this process is PID 1; else does nothing."""
    if os.getpid() != INIT:
        return
    reaper = Reaper()

    def run() -> None:
        while True:
            threading.Event().wait(EVERY_S)
            with contextlib.suppress(OSError):
                reaper.round()

    threading.Thread(target=run, name="reaper", daemon=True).start()


def _zombies() -> Iterator[int]:
    own = os.getpid()
    for entry in _PROC.iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError, ValueError, IndexError):
                text = (entry / "stat").read_bytes()
                state, parent = text[text.rindex(b")") + 2 :].split()[:2]
                if state == b"Z" and int(parent) == own:
                    yield int(entry.name)


def _of_multiprocessing() -> frozenset[int]:
    children: Any = getattr(multiprocessing.process, "_children", ())
    return frozenset(child.pid for child in list(children) if child.pid is not None)
