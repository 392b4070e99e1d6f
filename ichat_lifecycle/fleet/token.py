"""The token of a fleet: given, or made and kept where commands of the same user find it."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import structlog

from ichat_lifecycle import private_files
from ichat_lifecycle.beacon import FLEET_TOKEN_VARIABLE, token_file
from ichat_lifecycle.credentials import WEAK_HINT, header_value, is_weak

log = structlog.get_logger("ichat_lifecycle.fleet")


@contextlib.contextmanager
def kept_token(given: str | None) -> Iterator[str]:
    """The token that was given; else a new one, in a file that only this user can read.

    A file that a killed supervisor has left is of no use to anybody, and goes with the next one.
    """
    if given:
        token = header_value("fleet.token", given)
        if is_weak(token):
            log.warning("weak_token", name="fleet.token", hint=WEAK_HINT)
        yield token
        return
    token, path, fd = secrets.token_urlsafe(24), token_file(os.getpid()), -1
    try:
        private_files.make_directory(path.parent)
        private_files.own_directory(path.parent.parent.resolve())  # it may be a link of the user's
        private_files.own_directory(path.parent)
        _forget_the_dead(path.parent)
        fd = private_files.write_locked(path, token)
    except OSError as error:
        hint = f"set fleet.token or {FLEET_TOKEN_VARIABLE}: nobody can give commands now"
        log.warning("token_not_kept", path=str(path), error=str(error), hint=hint)
    try:
        yield token
    finally:
        if fd >= 0:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            os.close(fd)


def _forget_the_dead(directory: Path) -> None:
    """Removes files that nobody has locked."""
    for path in directory.glob("*.token"):
        with contextlib.suppress(OSError):  # it is in use
            fd = private_files.claimed(path)
            try:
                path.unlink(missing_ok=True)
            finally:
                os.close(fd)
