"""How workers and fleets are found on their machine: the kernel shows the name of a thread.

No file registers a worker, so that none is left behind by one that was killed.
"""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path

from ichat_lifecycle.home import state_directory

CONTROL_THREAD = "ichat-control"  # the kernel keeps 15 characters
FLEET_TOKEN_VARIABLE = "ICHAT_LIFECYCLE_FLEET_TOKEN"
FLEET_THREAD = "ichat-fleet"  # of a supervisor, its main thread


def name_this_thread(name: str) -> None:
    """Names the calling thread for the kernel.

    Where that is not possible (no /proc, or one that cannot be written), a worker is not found by
    itself, and nothing else.
    """
    comm = Path(f"/proc/self/task/{threading.get_native_id()}/comm")
    with contextlib.suppress(OSError):
        comm.write_text(name, encoding="ascii")


def token_file(pid: int) -> Path:
    """Where the fleet that this process supervises keeps a token that nobody gave.

    The file of a dead supervisor is not that of a later process of the same pid, nor of one with
    this pid in another container that shares the directory.
    """
    return state_directory() / "fleets" / f"{pid}-{_started(pid)}.token"


def _started(pid: int) -> int:
    """When a process was started, in clock ticks since boot; 0 where that cannot be seen."""
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return 0
    return int(text[text.rindex(b")") + 2 :].split()[19])  # a name before it may hold anything
