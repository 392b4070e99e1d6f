"""Tells an engine that compiles from one that hangs: neither answers, and no counter moves.

vLLM has some code compiled only when a request first needs it: the first with `logprobs` (0.32) or
the first that is sampled (0.30) keeps an engine on two cores busy for 10 to 20 s, and kernels for a
GPU can take minutes. The Python stacks of the engine's processes show it; where those may not be
read, the compiler that they have started still does.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import psutil
import structlog

from ichat_lifecycle.adapters.process_view import PySpy
from ichat_lifecycle.adapters.threads import in_thread

log = structlog.get_logger("ichat_lifecycle.watchdog")

ERROR_MAX = 300  # characters of what py-spy prints
LIMIT_S = 1.0  # py-spy takes 0.02 to 0.1 s for a process

# What stands in a stack as long as a compiler works, and not while its code runs.
COMPILERS = {
    "_load_adapter (vllm/lora/worker_manager.py:": "the load of a LoRA adapter",
    "(torch/_dynamo/convert_frame.py:": "torch.compile",
    "compile (triton/compiler/compiler.py:": "Triton",
    "(flashinfer/jit/": "FlashInfer",
    "(torch/utils/cpp_extension.py:": "a C++ extension of torch",
    "(numba/core/dispatcher.py:": "Numba",
}

# Programs that a compiler written in Python has do the rest. Those of CUDA: nvcc starts cicc and
# ptxas.
PROGRAMS = frozenset(
    {"cc1plus", "cicc", "clang", "clang++", "g++", "gcc", "hipcc", "ninja", "nvcc", "ptxas"}
)

_STOPPED = (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)


class CompileWatch:
    """Looks for a compiler in an engine's processes.

    Args:
        processes: gives the engine's processes of now.
        limit_s: seconds that a look may take.
        py_spy: the program; by default the one beside our Python or on PATH.
    """

    def __init__(
        self,
        processes: Callable[[], Sequence[int]],
        limit_s: float = LIMIT_S,
        py_spy: str | None = None,
    ) -> None:
        self._processes = processes
        self._limit_s = limit_s
        self._py_spy = py_spy
        self._told_unreadable = False

    async def compiling(self) -> str:
        """The compiler that is at work; "" where there is none, or that cannot be seen in time.

        A process that is stopped gets nothing done, whatever it was at.
        """
        look = partial(self._look, self._processes(), time.monotonic() + self._limit_s)
        try:
            async with asyncio.timeout(self._limit_s):
                return await in_thread(look, "compile-watch")
        except (TimeoutError, OSError, psutil.Error):
            return ""

    def _look(self, pids: Sequence[int], until_mono_s: float) -> str:
        python = [pid for pid in pids if _runs_python(pid)]
        if any(psutil.Process(pid).status() in _STOPPED for pid in python):
            return ""
        programs = {_name(pid) for pid in pids} & PROGRAMS
        return min(programs) if programs else self._in_stacks(python, until_mono_s)

    def _in_stacks(self, pids: Sequence[int], until_mono_s: float) -> str:
        spies = [PySpy(pid, self._py_spy) for pid in pids]
        try:
            stacks = [spy.stacks(until_mono_s - time.monotonic()) for spy in spies]
            if spies and all(spy.refused for spy in spies):
                self._tell_unreadable(stacks)
        finally:
            for spy in spies:
                spy.close()
        return compiler_in("\n".join(stacks))

    def _tell_unreadable(self, stacks: Sequence[str]) -> None:
        """Once: a compiler that runs in Python alone will pass for a hang."""
        if self._told_unreadable or not any(stacks):
            return
        self._told_unreadable = True
        log.warning(
            "stacks_unreadable",
            error=" ".join(stacks[0].split())[:ERROR_MAX],
            hint="an engine that compiles in Python may be taken for one that hangs; install "
            "py-spy and allow tracing (kernel.yama.ptrace_scope, CAP_SYS_PTRACE, seccomp), or "
            "raise health.give_up_after",
        )


def _name(pid: int) -> str:
    """The program's name; "" for one that is gone."""
    try:
        return psutil.Process(pid).name()
    except psutil.Error:
        return ""


def _runs_python(pid: int) -> bool:
    """Ours: the compilers that an engine starts are other programs."""
    try:
        return Path(f"/proc/{pid}/exe").samefile("/proc/self/exe")
    except OSError:
        return False


def compiler_in(stacks: str) -> str:
    """The compiler that these stacks, as py-spy prints them, are within; "" for none."""
    return next((name for mark, name in COMPILERS.items() if mark in stacks), "")
