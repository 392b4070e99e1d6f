"""Makes the three standard streams usable, in whatever state the parent process left them."""

from __future__ import annotations

import contextlib
import os
import stat
import sys
from io import TextIOWrapper

# What a strict stream cannot encode is escaped, as Python itself does it on stderr.
ESCAPED = "backslashreplace"


def prepare() -> None:
    """Opens those that are closed on /dev/null, and lets none fail for a character that it lacks.

    Call this before anything else opens a file or a socket, which would get a number that is free:
    with stdout closed, a listening socket becomes descriptor 1, and all that is printed goes there.
    """
    for fd in (0, 1, 2):
        _open(fd)
    # Python has None where a descriptor was closed when it started.
    if sys.stdin is None:
        sys.stdin = os.fdopen(0, closefd=False)
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", closefd=False)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", buffering=1, errors=ESCAPED, closefd=False)
    for stream in (sys.stdout, sys.stderr):
        # Others than Python's own are replaced ones, in a test for example.
        if isinstance(stream, TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors=ESCAPED)


def never_block() -> None:
    """Let what is printed past Python be lost where nobody reads, instead of waiting for a reader.

    Libraries in C write to the descriptors 1 and 2 themselves: xgrammar prints a client's pattern
    in this process, so that some hundred requests fill a pipe. Whether a write waits belongs to the
    open file, which other processes share; a pipe or a terminal is therefore opened once more, for
    us alone. Files stay as they are: they never wait, and a second opening would begin at their
    start. Call this once the log has a stream of its own.
    """
    for fd in (1, 2):
        with contextlib.suppress(OSError):  # a terminal of another user's
            if stat.S_ISFIFO(os.fstat(fd).st_mode) or os.isatty(fd):
                again = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
                os.dup2(again, fd)
                os.close(again)


def _open(fd: int) -> None:
    """Puts /dev/null in the place of a descriptor that is closed, for the processes we start, too.

    Those below it are open by now, so that it is the lowest free number, which `open` returns.
    """
    try:
        os.fstat(fd)
    except OSError:
        opened = os.open(os.devnull, os.O_RDWR)
        os.set_inheritable(opened, True)
        if opened != fd:  # somebody else was faster
            os.dup2(opened, fd)
            os.close(opened)
