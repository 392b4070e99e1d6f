"""A directory for sockets that only this user can reach, for as long as this process lives.

It is locked (flock) while its owner lives, whatever namespace of processes that one is in. What a
killed process has left has no lock, and goes with the next one. systemd-tmpfiles, too, leaves a
locked directory alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

PREFIX = "ichat-fleet-"
PATH_LIMIT = 107  # bytes of a socket's path: sun_path has one more, a NUL
NAME_LIMIT = 10  # bytes of a socket's name in the directory
# The longest name that mkdtemp makes of the prefix, a pid and its own eight characters.
_LONGEST = len(PREFIX) + len(str(2**22)) + 1 + 8
_TRIES = 3


class SocketDirectory:
    """Made with mode 0700, in the first place where there is room for the path of a socket.

    Raises:
        OSError: there is no such place.
    """

    def __init__(self) -> None:
        self.path, self._lock_fd = _make()

    def restore(self) -> bool:
        """Make it again where somebody has removed it, as those do who tidy up.

        Where its name is taken by now, it gets another one: `path` changes.

        Returns:
            whether it had to be.

        Raises:
            OSError: it cannot be made.
        """
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(self._lock_fd), self.path.lstat()):
                return False
        try:
            self.path.mkdir(mode=0o700)
            path, lock_fd = self.path, _locked(self.path)
        except OSError:
            path, lock_fd = _make()
        os.close(self._lock_fd)
        self.path, self._lock_fd = path, lock_fd
        return True

    def close(self) -> None:
        """Remove it, with whatever is left in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock_fd)


def _make() -> tuple[Path, int]:
    error: OSError = FileNotFoundError("no directory can be written, or all paths are too long")
    for parent in _parents():
        _forget_the_dead(parent)
        for _ in range(_TRIES):  # somebody who tidies up may come before the lock
            try:
                path = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir=parent))
                return path, _locked(path)
            except OSError as failed:
                error = failed
    raise error


def _parents() -> Iterator[Path]:
    """Where the user wants such things; then what is short. Not where a logout removes it."""
    wanted: list[str] = []
    with contextlib.suppress(OSError):
        wanted.append(tempfile.gettempdir())
    for parent in dict.fromkeys([*wanted, "/tmp", "/dev/shm"]):
        path = Path(parent).absolute()
        if len(os.fsencode(path)) + 1 + _LONGEST + 1 + NAME_LIMIT <= PATH_LIMIT:
            yield path


def _locked(path: Path) -> int:
    """The descriptor that holds the lock. Raises OSError, also where it is not there any more."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(fd), path.lstat()):
            raise FileNotFoundError(f"{path} is another one by now")
    except OSError:
        os.close(fd)
        raise
    return fd


def _forget_the_dead(parent: Path) -> None:
    """Removes what killed processes of this user have left there."""
    with contextlib.suppress(OSError):
        for path in [Path(one.path) for one in os.scandir(parent) if one.name.startswith(PREFIX)]:
            if _is_ours(path):
                _forget(path)


def _is_ours(path: Path) -> bool:
    try:
        found = path.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()


def _forget(path: Path) -> None:
    try:
        fd = _locked(path)
    except OSError:  # its owner lives, or this file system knows no locks
        return
    shutil.rmtree(path, ignore_errors=True)
    os.close(fd)
