"""The token of a fleet: given, or made and kept where commands of the same user find it."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import structlog

from ichat_lifecycle.beacon import FLEET_TOKEN_VARIABLE, token_file
from ichat_lifecycle.credentials import header_value

log = structlog.get_logger("ichat_lifecycle.fleet")


@contextlib.contextmanager
def kept_token(given: str | None) -> Iterator[str]:
    """The token that was given; else a new one, in a file that only this user can read.

    A file that a killed supervisor has left is of no use to anybody, and goes with the next one.
    """
    if given:
        yield header_value("fleet.token", given)
        return
    token, path = secrets.token_urlsafe(24), token_file(os.getpid())
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _forget_the_dead(path.parent)
        path.unlink(missing_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(token)
    except OSError as error:
        hint = f"set fleet.token or {FLEET_TOKEN_VARIABLE}: nobody can give commands now"
        log.warning("token_not_kept", path=str(path), error=str(error), hint=hint)
    try:
        yield token
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def _forget_the_dead(directory: Path) -> None:
    for path in directory.glob("*.token"):
        if path.stem.isdecimal() and not Path(f"/proc/{path.stem}").exists():
            path.unlink(missing_ok=True)
