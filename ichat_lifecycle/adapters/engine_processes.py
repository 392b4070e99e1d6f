"""Ending the engine's processes by force, whatever state they are in."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
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


def kill_all(groups: Iterable[int], pids: Iterable[int]) -> None:
    """SIGKILL to whole process groups, and to each pid with all its descendants."""
    for group in groups:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)
    for pid in pids:
        for victim in with_descendants(pid):
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.kill()
