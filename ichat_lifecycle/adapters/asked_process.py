"""A process that is asked one question on stdin, and answers on stdout: bounded in time and bytes.

`subprocess.run` keeps all that a process prints, and waits for whoever has inherited its pipes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import IO

LAST_WORDS = 4096  # bytes of stderr that are kept
LAST_WORDS_S = 1.0  # for what it has printed before its end
POLL_S = 0.02
END_S = 10.0  # seconds to end by itself after its answer
_CHUNK = 65_536


@dataclass(frozen=True, slots=True)
class Said:
    """What a process has answered. `last_line` is the last one that it printed on stderr."""

    answer: bytes
    last_line: str


def ask_process(
    program: Sequence[str], question: bytes, timeout_s: float, limit: int
) -> Said | None:
    """Run a program with a question; None where it has not answered in time, and is killed.

    Args:
        limit: bytes of its answer that are read. One that goes on is killed.

    Raises:
        OSError: it cannot be run.
    """
    pipe = subprocess.PIPE
    process = subprocess.Popen(program, stdin=pipe, stdout=pipe, stderr=pipe, process_group=0)
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    answer, last = bytearray(), bytearray()
    _thread(_write, process.stdin, question)
    reader = _thread(_read, process.stdout, answer, limit, lambda: _kill(process))
    errors = _thread(_keep_last, process.stderr, last)
    try:
        reader.join(timeout_s)
        in_time = not reader.is_alive()
        if in_time:
            _end(process)
    finally:
        _kill(process)
        process.wait()
    errors.join(LAST_WORDS_S)
    lines = last.decode("utf-8", "replace").strip().splitlines()
    return Said(bytes(answer), lines[-1] if lines else "") if in_time else None


def _end(process: subprocess.Popen[bytes]) -> None:
    """Has it clean up after itself. Its pid, which is its group's, stays its own until later."""
    until = time.monotonic() + END_S
    how = os.WEXITED | os.WNOWAIT | os.WNOHANG
    while os.waitid(os.P_PID, process.pid, how) is None and time.monotonic() < until:
        time.sleep(POLL_S)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Whatever it has started, too."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _thread(function: Callable[..., None], *args: object) -> threading.Thread:
    """Daemons: what inherits a pipe may keep it open for ever."""
    thread = threading.Thread(target=function, args=args, name="asked", daemon=True)
    thread.start()
    return thread


def _write(stream: IO[bytes], question: bytes) -> None:
    with contextlib.suppress(OSError), stream:  # it may have ended
        stream.write(question)


def _read(stream: IO[bytes], into: bytearray, limit: int, too_much: Callable[[], None]) -> None:
    with stream:
        while chunk := stream.read1(_CHUNK):  # type: ignore[attr-defined]
            into += chunk
            if len(into) > limit:
                too_much()
                return


def _keep_last(stream: IO[bytes], into: bytearray) -> None:
    with stream:
        while chunk := stream.read1(_CHUNK):  # type: ignore[attr-defined]
            into[:] = (into + chunk)[-LAST_WORDS:]
