"""Commands whose output nobody reads any more, or that cannot be written."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def flushing() -> Iterator[None]:
    """Write what was printed at the end: a failure at the interpreter's end cannot be caught."""
    try:
        yield
    finally:
        if sys.stdout is not None:
            sys.stdout.flush()


def end_without_a_reader(error: OSError) -> None:
    """Ends the process where stdout is a pipe that nobody reads, or a file on a full disk; returns
    where the error is another one."""
    if error.errno == errno.EPIPE and _nobody_reads_stdout():
        os._exit(0)  # without the interpreter's own try to write what is left
    if error.errno in (errno.ENOSPC, errno.EDQUOT) and error.filename is None:
        why = error.strerror
        print(f"ichat-lifecycle: error: the output cannot be written: {why}", file=sys.stderr)
        os._exit(71)


def _nobody_reads_stdout() -> bool:
    with contextlib.suppress(OSError, ValueError):
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(events & select.POLLERR for _, events in poll.poll(0))
    return False
