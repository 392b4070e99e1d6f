"""How a worker is found on its machine: the kernel shows the name of its control plane's thread.

No file registers a worker, so that none is left behind by one that was killed.
"""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path

CONTROL_THREAD = "ichat-control"  # the kernel keeps 15 characters


def name_this_thread(name: str) -> None:
    """Names the calling thread for the kernel.

    Where that is not possible (no /proc, or one that cannot be written), a worker is not found by
    itself, and nothing else.
    """
    comm = Path(f"/proc/self/task/{threading.get_native_id()}/comm")
    with contextlib.suppress(OSError):
        comm.write_text(name, encoding="ascii")
