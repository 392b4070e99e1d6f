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


def kill_all(groups: Iterable[int], pids: Iterable[int]) -> None:
    """SIGKILL to whole process groups, and to each pid with all its descendants."""
    for group in groups:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            for victim in (*process.children(recursive=True), process):
                with contextlib.suppress(psutil.NoSuchProcess):
                    victim.kill()
