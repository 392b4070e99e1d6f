"""The last words in Kubernetes' termination log: `kubectl describe pod` shows them.

The kubelet puts the file there before a container starts. Where there is none, nothing is written.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

from ichat_lifecycle.errors import LifecycleError
from ichat_lifecycle.printable import one_line

DEFAULT_PATH = Path("/dev/termination-log")  # Kubernetes' default terminationMessagePath
LIMIT = 4096  # bytes; Kubernetes cuts what is longer
_PART_LIMIT = LIMIT // 3 - 32  # bytes of each part, so that a long cause leaves the hint its place


def write(
    error: BaseException, path: Path | None = None, scrub: Callable[[str], str] = str
) -> None:
    """Writes an error's message, root cause and hint, a line each. Never fails.

    Args:
        error: what ends the process.
        path: the termination log, /dev/termination-log by default.
        scrub: applied to each line; nothing is changed by default.
    """
    with contextlib.suppress(Exception):
        write_text("\n".join(_cut(scrub(line), _PART_LIMIT) for line in _lines(error)), path)


def write_text(text: str, path: Path | None = None) -> None:
    """Puts a text, cut to LIMIT bytes, in the place of what the file says. Never fails."""
    path = path or DEFAULT_PATH
    with contextlib.suppress(Exception):
        if path.is_file():
            fd = os.open(path, os.O_WRONLY | os.O_TRUNC)  # never made: it is the kubelet's to make
            with os.fdopen(fd, "wb") as file:
                file.write(_cut(text, LIMIT).encode())


def _lines(error: BaseException) -> list[str]:
    if not isinstance(error, LifecycleError):
        return [f"{type(error).__name__}: {one_line(str(error))}"]
    lines = [one_line(error.message)]
    if error.root_cause:
        lines.append(f"cause: {one_line(error.root_cause)}")
    if error.hint:
        lines.append(f"hint: {one_line(error.hint)}")
    return lines


def _cut(text: str, limit: int) -> str:
    """At most `limit` bytes in UTF-8, no half character at the end."""
    return text.encode(errors="replace")[:limit].decode(errors="ignore")
