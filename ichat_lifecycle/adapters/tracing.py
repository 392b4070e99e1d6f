"""Who may read the memory of an engine's process, and with it its Python stacks.

Where Yama restricts tracing (`kernel.yama.ptrace_scope=1`, the default of Debian and Ubuntu), a
process without privileges may trace its descendants alone. py-spy and the engine are siblings, both
children of the worker's main process. So each process of the engine names that one as its tracer,
which allows it, and what it starts, and nobody else.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Mapping
from pathlib import Path

# The pid of the worker's main process, in the environment of its engine's processes.
VARIABLE = "ICHAT_LIFECYCLE_TRACER"

_PR_SET_PTRACER = 0x59616D61  # "Yama"
_ANCESTORS_MAX = 64
_PROC = Path("/proc")


def allow_main_process(environment: Mapping[str, str]) -> bool:
    """Let the worker's main process, and what it starts, trace the calling process.

    The variable is believed only where it names an ancestor. Safe to call again.

    Returns:
        whether the kernel has taken it. Without Yama it does not, and nothing restricts tracing.
    """
    pid = environment.get(VARIABLE, "")
    if sys.platform != "linux" or not pid.isdecimal() or int(pid) not in _ancestors():
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    return bool(libc.prctl(_PR_SET_PTRACER, ctypes.c_ulong(int(pid)), 0, 0, 0) == 0)


def _ancestors() -> list[int]:
    """Our parent, its parent, and so on, without init."""
    found: list[int] = []
    pid = os.getppid()
    while pid > 1 and len(found) < _ANCESTORS_MAX:
        found.append(pid)
        pid = _parent_of(pid)
    return found


def _parent_of(pid: int) -> int:
    try:
        text = (_PROC / str(pid) / "stat").read_bytes()
    except OSError:  # it has ended
        return 0
    return int(text[text.rindex(b")") + 2 :].split()[1])  # the name before it may hold anything
