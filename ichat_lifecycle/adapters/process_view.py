"""What can be seen of a process from outside, also of one that is stopped, stuck or just gone.

Three views: psutil's numbers, the kernel's own words on each thread, and Python's stacks by py-spy.
Nothing here pauses the process. Any read may block for as long as the process is stuck in the
kernel, so that all of this belongs in a thread that nobody waits for without a deadline.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from ichat_lifecycle.redact import redact

THREADS_MAX = 500  # of a process; a GPU's driver and OpenMP start hundreds


# --- numbers


def numbers(pid: int) -> dict[str, Any]:
    """Name, command, status, times, memory, threads and open files of a process, JSON-ready.

    What may not be read or has no answer is None; a process that is gone has `"gone": True`.
    """
    try:
        process = psutil.Process(pid)
    except (psutil.Error, ValueError, OverflowError):
        return {"pid": pid, "gone": True}
    questions: dict[str, Callable[[], Any]] = {
        "name": process.name,
        "cmdline": lambda: " ".join(redact(process.cmdline())),
        "status": process.status,
        "parent": process.ppid,
        "started_at": process.create_time,
        "cpu_times_s": lambda: process.cpu_times()._asdict(),
        "memory_bytes": lambda: process.memory_info()._asdict(),
        "open_fds": process.num_fds,
        "threads": process.num_threads,
    }
    return {"pid": pid, "gone": False} | {key: _asked(ask) for key, ask in questions.items()}


def _asked(ask: Callable[[], Any]) -> Any:
    try:
        return ask()
    except (psutil.Error, OSError, ValueError):
        return None


# --- the kernel


def kernel_view(pid: int) -> str:
    """What /proc shows of a process and of each of its threads: state and where it waits."""
    base = Path(f"/proc/{pid}")
    parts = [f"== /proc/{pid}/status\n{_read(base / 'status')}"]
    parts.append(f"== /proc/{pid}/wchan\n{_read(base / 'wchan')}")
    parts += [_thread_view(thread) for thread in _threads(base / "task")]
    return "\n\n".join(parts) + "\n"


def _threads(tasks: Path) -> list[Path]:
    try:
        return sorted(tasks.iterdir(), key=lambda path: int(path.name))[:THREADS_MAX]
    except OSError:
        return []


def _thread_view(thread: Path) -> str:
    name = _read(thread / "comm")
    lines = [f"== thread {thread.name} {name!r}", f"state: {_state(thread)}"]
    for what in ("wchan", "syscall", "stack"):  # the last two only with the right to trace it
        lines.append(f"{what}: {_read(thread / what)}")
    return "\n".join(lines)


def _state(thread: Path) -> str:
    """The letter after the name, which may itself hold spaces and brackets."""
    return _read(thread / "stat").rpartition(") ")[2][:1] or "?"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError as error:
        return f"({error.strerror})"


# --- Python's stacks


def find_py_spy() -> str | None:
    """The program beside our Python, where pip puts it, else on PATH; or None."""
    beside = Path(sys.executable).with_name("py-spy")
    return str(beside) if os.access(beside, os.X_OK) else shutil.which("py-spy")


class PySpy:
    """One run of py-spy, which reads another process's Python stacks out of its memory.

    `--nonblocking`: it would else stop the process, and wait for ever for one that does not stop.

    Args:
        pid: the process to look at.
        program: py-spy; found beside our Python or on PATH by default.
    """

    def __init__(self, pid: int, program: str | None = None) -> None:
        self._why = "py-spy: not found beside Python or on PATH"
        self._running: subprocess.Popen[bytes] | None = None
        program = program or find_py_spy()
        if program is None:
            return
        try:
            self._running = subprocess.Popen(
                [program, "dump", "--nonblocking", "--pid", str(pid)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        except OSError as error:
            self._why = f"py-spy: {error.strerror}"

    def stacks(self, within_s: float) -> str:
        """Its output; or why there is none after `within_s` seconds, when it is killed."""
        if self._running is None:
            return f"{self._why}\n"
        try:
            printed, _ = self._running.communicate(timeout=max(within_s, 0))
        except subprocess.TimeoutExpired as late:
            some = (late.output or b"").decode(errors="replace")
            return f"{some}\npy-spy: no end after {within_s:.1f} s\n"
        except (OSError, ValueError) as error:
            return f"py-spy: {error}\n"
        return printed.decode(errors="replace")

    @property
    def refused(self) -> bool:
        """Whether it has ended and could not read the stacks."""
        return self._running is None or bool(self._running.returncode)

    def kill(self) -> None:
        """Ends it. Safe at any time, from any thread."""
        if self._running is not None:
            with contextlib.suppress(OSError):
                self._running.kill()

    def close(self) -> None:
        """Ends it and gives its pipe back; reaps it where that takes no waiting."""
        if self._running is None:
            return
        self.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._running.wait(0.2)
        if self._running.stdout is not None:
            self._running.stdout.close()


def own_stacks() -> str:
    """The Python stacks of all threads of this process, which need no tracing."""
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read().decode(errors="replace")
