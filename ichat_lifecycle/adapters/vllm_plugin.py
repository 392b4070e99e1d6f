"""What each process of an engine does first: vLLM calls it, as one of its general plugins.

pyproject.toml names it in the entry point group `vllm.general_plugins`, which vLLM loads in the
process of the API, in EngineCore and in every worker, forked or spawned. Where VLLM_PLUGINS names
others only, it is left out, and what is said here does not hold.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import platform
import sys

from ichat_lifecycle.adapters import tracing

# Linux, Documentation/arch/x86/xstate.rst: AMX's tile registers are had only by those who ask.
_ARCH_PRCTL = 158
_ARCH_REQ_XCOMP_PERM = 0x1023
_XFEATURE_XTILEDATA = 18

_STDERR = 2


def prepare() -> None:
    """Prepare a process of the engine to be looked at, also after its end. Safe to call again.

    One end of native code is made impossible, and any other one reports its cause. A process that
    ends by SIGSEGV or SIGILL prints nothing by itself, and of a worker, which is not our child, we
    do not get the signal either. With faulthandler its last words are
    "Fatal Python error: Illegal instruction" and the stack, and become the root cause.
    """
    tracing.allow_main_process(os.environ)
    allow_amx_tiles()
    if not faulthandler.is_enabled():
        faulthandler.enable(_STDERR)


def allow_amx_tiles() -> bool:
    """Asks the kernel for AMX's tiles, and gives whether this process may use them.

    vLLM leaves that to oneDNN, but small weights never go through oneDNN, and its attention uses
    the tiles all the same: a tiny model in bfloat16 ends with SIGILL (measured with 0.32.0). A
    spawned process has to ask anew.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    return bool(libc.syscall(_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA) == 0)
