"""Ending with the process that has started us, whatever ends it."""

from __future__ import annotations

import ctypes
import os
import signal

SUPERVISOR_VARIABLE = "ICHAT_LIFECYCLE_SUPERVISOR"  # whose worker this is, by its pid
_PR_SET_PDEATHSIG = 1


def follow(parent: int) -> bool:
    """Has the kernel send us SIGTERM once this parent has ended. False: it has already.

    The signal comes with the end of the parent's thread that has started us: its main one.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    return os.getppid() == parent  # it may have ended before the call
