"""Files that somebody names for us to read: regular ones only, and no more of them than expected.

A pipe, a device, or a socket in the place of a file may never end, or never begin.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from ichat_lifecycle.errors import InputMissingError

_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
_HINT = "give a regular file: it may be read more than once"


class TooLargeError(InputMissingError):
    """The file has more bytes than are read."""


def kind_instead(path: str | Path) -> str | None:
    """Return what stands in the place of a regular file, such as "a pipe".

    None: a regular file, or nothing that can be looked at.
    """
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116  # a path that is no path raises there, too
    except (OSError, ValueError):
        return None
    return _kind(mode)


def _kind(mode: int) -> str | None:
    return next((name for is_one, name in _KINDS if is_one(mode)), None)


def read_input(path: str | Path, limit: int) -> bytes:
    """Return a file's content. Never waits for somebody who writes.

    Args:
        limit: bytes.

    Raises:
        TooLargeError: it has more bytes.
        InputMissingError: it cannot be read, or is not a regular file.
    """
    try:
        # Looked at before it is opened: to open a device may have an effect.
        _refuse(path, os.stat(path).st_mode)  # noqa: PTH116
        # Non-blocking, as something else may stand there by now.
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
        with os.fdopen(file, "rb") as stream:
            _refuse(path, os.fstat(stream.fileno()).st_mode)
            content = stream.read(limit + 1) or b""
    except OSError as error:
        raise InputMissingError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:  # a NUL character in the path
        raise InputMissingError(f"{path!s}: {error}") from error
    if len(content) > limit:
        raise TooLargeError(f"{path}: more than {limit:,} bytes", code="input_too_large")
    return content


def _refuse(path: str | Path, mode: int) -> None:
    kind = _kind(mode)
    if kind is not None:
        raise InputMissingError(f"{path}: {kind}, not a file", hint=_HINT, code="not_a_file")
