"""Directories and files of this user's alone, whatever the umask is and whoever was there before.

A umask of 0, as some containers have it, would make them writable for every user of the machine.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import structlog

log = structlog.get_logger("ichat_lifecycle")

DIRECTORY, FILE = 0o700, 0o600
_WRITE_BY_OTHERS, _WRITE_BY_ALL = 0o022, 0o002

_given_umask: list[int] = []
_foreign: set[Path] = set()  # directories of which it has been told that they are another user's


def restrict_umask() -> int | None:
    """Keeps what this process makes from being writable for every user of the machine.

    Libraries write as well: compiled code of which the next start executes what it finds.

    Returns:
        the umask that allowed it; None where it did not, or where this was done before.
    """
    given = os.umask(0o077)  # there is no other way to read it
    os.umask(given | _WRITE_BY_ALL)
    if not _given_umask:
        _given_umask.append(given)
    return None if given & _WRITE_BY_ALL else given


@contextlib.contextmanager
def given_umask() -> Iterator[None]:
    """For a file whose mode is the user's choice: the umask that this process was started with."""
    if not _given_umask:
        yield
        return
    before = os.umask(_given_umask[0])
    try:
        yield
    finally:
        os.umask(before)


def make_directory(path: Path, mode: int = DIRECTORY) -> None:
    """Makes a directory, and those above it that are missing; by default for this user alone.

    One that is there stays as it is.

    Raises:
        OSError: it cannot be made, or is something else.
    """
    for missing in reversed([one for one in (path, *path.parents) if not one.exists()]):
        with contextlib.suppress(FileExistsError):  # another process was faster
            missing.mkdir(mode=mode)


def own_directory(path: Path) -> None:
    """The same for one in which this user alone may write: one that is open to others is closed.

    Raises:
        PermissionError: it is another user's.
        OSError: it cannot be made, or is a link.
    """
    make_directory(path)
    _close(path, _WRITE_BY_OTHERS, os.O_NOFOLLOW, must=True)


def close_to_all(path: Path) -> None:
    """Takes the right to write from every user of the machine, where a directory is this user's.

    An earlier run under another umask may have made it so. One that belongs to somebody else, who
    can replace what is in it, is a warning, once; root's is one only where others may write too.
    """
    with contextlib.suppress(OSError):
        _close(path, _WRITE_BY_ALL, 0, must=False)


def _close(path: Path, writers: int, flags: int, *, must: bool) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | flags)
    try:
        status = os.fstat(fd)
        is_open = status.st_mode & writers and not status.st_mode & stat.S_ISVTX
        if status.st_uid != os.geteuid():
            if must:
                raise PermissionError(f"{path} belongs to another user (uid {status.st_uid})")
            if is_open or status.st_uid:
                _warn_of_foreign(path, status.st_uid)
        elif is_open:
            mode = stat.S_IMODE(status.st_mode)
            os.fchmod(fd, mode & ~_WRITE_BY_OTHERS)
            log.warning("directory_was_open", path=str(path), mode=f"{mode:o}")
    finally:
        os.close(fd)


def _warn_of_foreign(path: Path, uid: int) -> None:
    if path not in _foreign:
        _foreign.add(path)
        hint = "chown it, or set XDG_CACHE_HOME and XDG_STATE_HOME to directories of this user's"
        log.warning("directory_not_own", path=str(path), uid=uid, hint=hint)


def write(path: Path, text: str) -> None:
    """Puts a file in place as a whole, for this user alone; never through a link.

    Raises:
        OSError: it cannot be written. What was there before stays.
    """
    os.close(write_locked(path, text))


def write_locked(path: Path, text: str) -> int:
    """As `write`; returns a descriptor of the file, which is locked for as long as that is open.

    On a file system without locks it is not.
    """
    fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_EX)
        with os.fdopen(fd, "w", encoding="utf-8", closefd=False) as file:
            file.write(text)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        os.close(fd)
        raise
    return fd


def claimed(path: Path, *, new: bool = False) -> int:
    """A descriptor of a file that nobody has locked; it is locked for as long as that is open.

    A lock shows whether who made the file lives, also across containers that share a directory: a
    pid may be another process's by now.

    Args:
        new: make the file; default: it is there, left by a dead one.

    Raises:
        OSError: it is in use, gone, no file, or there already; or its file system knows no locks.
    """
    # For writing, without which a network's file system locks nothing.
    flags = os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    fd = os.open(path, flags | (os.O_CREAT | os.O_EXCL if new else 0), FILE)
    try:
        # Whoever looks for what the dead have left may hold a new one for a moment.
        fcntl.flock(fd, fcntl.LOCK_EX | (0 if new else fcntl.LOCK_NB))
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or not os.path.samestat(path.lstat(), status):
            raise OSError(f"{path} is another one by now")
    except BaseException:
        os.close(fd)
        raise
    return fd


def read(path: Path, limit: int) -> str:
    """The text of a file of at most `limit` bytes; never waits, and never follows a link.

    Raises:
        OSError: it cannot be read, is no file, or is too large.
        ValueError: it is not UTF-8.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(fd, "rb") as file:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_size > limit:
            raise OSError(f"{path} is not a file of at most {limit} bytes")
        return file.read(limit).decode()
