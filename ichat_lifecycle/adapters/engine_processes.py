"""Ending the engine's processes by force, whatever state they are in."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Iterable

import psutil


def children_now() -> dict[int, multiprocessing.process.BaseProcess]:
    """Our direct children that multiprocessing started, by pid."""
    return {p.pid: p for p in multiprocessing.active_children() if p.pid is not None}


def with_descendants(pid: int) -> list[psutil.Process]:
    """All that a process has started, and itself at the end; nothing where it is gone."""
    try:
        process = psutil.Process(pid)
        return [*process.children(recursive=True), process]
    except psutil.NoSuchProcess:
        return []


def kill_all(children: Iterable[multiprocessing.process.BaseProcess]) -> None:
    """Send SIGKILL to each child that is alive, and to all its descendants.

    The pid of a child that has been reaped may be another process's by now.
    """
    for child in children:
        if child.pid is None or not child.is_alive():
            continue
        for victim in with_descendants(child.pid):
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.kill()
